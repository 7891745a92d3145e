"""MMTok, "Multimodal Coverage Maximization for Efficient Inference of VLMs" (ICLR 2026).

In front of the decoder, greedily: the chosen patches of a crop shall cover the text of the prompt and all patches. How
much of a text token a patch covers is the softmax over patches of their cosines (projected features and embeddings,
``text_temperature``), how much of another patch likewise (features in front of the projector,
``vision_temperature``); a token is covered as well as by the best of the chosen patches. The next patch is the one that
adds most. Raster order.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Crops
and images share the budget in proportion to their patches.

Deviations: the published code takes the words of the question that are neither stop words nor the benchmark's
instruction; a method here sees embeddings, and so takes all text tokens behind the last image. Padding patches are
chosen last; they are those whose CLS attention is masked elsewhere in this package, a row fewer on either side of the
picture than in the published code. On models whose projector is out of sight (a bare decoder, models of transformers)
both terms look at projected features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.pruning.coverage import coverage_order
from llava.pruning.engine.notices import say
from llava.pruning.method import VisionReducer
from llava.pruning.selection import counts_to_mask, on_device
from llava.pruning.vision import Reduction, VisionView


def text_coverage(view: VisionView, temperature: float) -> Tensor:
    """How much of each text token a patch covers, ``[N, T, P]``, over the number of tokens; 0 in the padding."""
    text, patches = normalize(view.text_NTD.float(), dim=2), normalize(view.projected_NPD.float(), dim=2)
    shares = torch.softmax(text @ patches.transpose(1, 2) / temperature, dim=2)
    counts = on_device([max(length, 1) for length in view.text_lengths], shares.device)
    real = counts_to_mask(view.text_lengths, shares.shape[1], shares.device)
    return shares * (real / counts[:, None])[:, :, None]


def vision_coverage(tokens_NPC: Tensor, temperature: float) -> Tensor:
    """How much of each patch another one covers, ``[N, P, P]``, over the number of patches."""
    unit = normalize(tokens_NPC.float(), dim=2)
    return torch.softmax(unit @ unit.transpose(1, 2) / temperature, dim=2) / unit.shape[1]


@dataclass(frozen=True, kw_only=True)
class MMTok(VisionReducer):
    """Patches that cover text and picture.

    Attributes:
        vision_weight: weight of covering the picture beside covering the text (alpha).
        text_temperature: of the softmax between text and patches.
        vision_temperature: of the one between patches.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    vision_weight: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    name: ClassVar[str] = "mmtok"
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("vision_weight", self.vision_weight >= 0, "must not be negative")
        for option in ("text_temperature", "vision_temperature"):
            self.require(option, getattr(self, option) > 0, "must be above 0")

    def reduce(self, view: VisionView) -> Reduction:
        if view.project is None:
            say(self.name, "the projector is out of sight here, so both terms look at projected features")
        of_text = text_coverage(view, self.text_temperature)
        of_vision = vision_coverage(view.tokens_NPC, self.vision_temperature) * self.vision_weight
        coverage = torch.cat((of_text, of_vision), dim=1).transpose(1, 2)
        order = coverage_order(coverage, view.target, last_NP=view.padding_NP)
        return Reduction.keep(view.tokens_NPC, order.sort(dim=1).values)
