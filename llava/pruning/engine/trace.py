"""What happened to one sample: visual tokens per layer, who survived, and what it cost.

Costs are counted in multiply-adds with the paper's formula and always from the tokens that a layer really processed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that costs depend on."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    key_value_size: int  # key heads x head width
    bytes_per_value: int
    query_size: int | None = None  # query heads x head width; None: the hidden size

    def layer_flops(self, tokens: int) -> int:
        """Multiply-adds of one layer on ``tokens`` tokens: projections, attention, feed-forward.

        With as many key heads as query heads this is ``4nd^2 + 2n^2d + 3ndm``, the paper's convention. The projections
        of grouped-query attention are counted as they are: narrower keys and values.
        """
        n, d, m = tokens, self.hidden_size, self.intermediate_size
        queries = self.query_size or d
        return 2 * n * d * (queries + self.key_value_size) + 2 * n * n * queries + 3 * n * d * m


@dataclass
class Trace:
    """Record of one sample's prefill.

    Attributes:
        shape: sizes of the decoder.
        text_tokens: tokens that are not visual, structure tokens included; they are never pruned.
        visual_tokens: visual tokens of the prompt, before any pruning.
        tokens_in: visual tokens entering each layer (what the layer computes on).
        tokens_out: visual tokens leaving each layer.
        scoring_flops: multiply-adds spent on attention rows for scores.
        details: what the method reported, by name.
        target_tokens: mean that the method was to meet; None if it had no budget.
        target_ratio: the share of ``visual_tokens`` that it comes from; None if it was given in tokens.
        budget: how that mean counts, ``nominal`` or ``processed``.
        views: visual tokens of each image in the prompt, before any pruning; empty where nobody can say (behind a
            method that reduced them in front of the decoder).
        structure_tokens: how many of ``text_tokens`` are newline tokens of an image (LLaVA-1.6 with unpadding). They
            count in costs and cache, not in the means of visual tokens.
    """

    shape: DecoderShape
    text_tokens: int
    visual_tokens: int
    tokens_in: list[int] = field(default_factory=list)
    tokens_out: list[int] = field(default_factory=list)
    scoring_flops: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    structure_tokens: int = 0
    target_tokens: int | None = None
    target_ratio: float | None = None
    budget: str = "nominal"
    views: tuple[int, ...] = ()
    _origins: Callable[[], list[Tensor]] = field(default=list, repr=False)  # asked when somebody reads `kept`
    _members: Callable[[], list[list[list[int]]] | None] = field(default=lambda: None, repr=False)

    @property
    def kept(self) -> list[Tensor]:
        """Per layer a LongTensor: original visual index of each token leaving it, in sequence order; -1 if merged."""
        return [origins.cpu() for origins in self._origins()]

    @property
    def kept_per_view(self) -> list[list[int]] | None:
        """Per layer the tokens of each image that leave it; merged tokens are of none. None without :attr:`views`."""
        if not self.views:
            return None
        ends = torch.tensor(self.views).cumsum(0)
        views = [torch.bucketize(origins[origins >= 0], ends, right=True) for origins in self.kept]
        return [torch.bincount(view, minlength=len(self.views)).tolist() for view in views]

    @property
    def members(self) -> list[list[list[int]]] | None:
        """Per layer, for each -1 in :attr:`kept`, the original visual indices that were merged into it, ascending.

        None unless the run was told to note them (:attr:`~llava.pruning.PruningRun.notes_members`); also where tokens
        were merged before the decoder, which is not noted.
        """
        return self._members()

    @property
    def mutual_information(self) -> dict[str, float] | None:
        """``{"layer0": ..., "layer1": ...}``: bits summed over heads; layer 0 also divided by the text tokens."""
        return self.details.get("mutual_information")

    @property
    def slope(self) -> float | None:
        """Slope of the retention curve that was used."""
        return self.details.get("slope")

    def mean_tokens(self, kind: str = "nominal") -> float:
        """Mean visual tokens per layer.

        Args:
            kind: ``nominal`` counts what leaves each layer, as the paper does; ``processed`` what a layer computed on.
        """
        if kind not in ("nominal", "processed"):
            raise ValueError(f"kind must be 'nominal' or 'processed', got {kind!r}")
        counts = self.tokens_out if kind == "nominal" else self.tokens_in
        return sum(counts) / len(counts)

    @property
    def budget_error(self) -> float | None:
        """Mean visual tokens per layer above (or below) what was asked for; None without a budget.

        A sample with fewer visual tokens than the budget is asked for all of them.
        """
        if self.target_tokens is None:
            return None
        return self.mean_tokens(self.budget) - min(self.target_tokens, self.visual_tokens)

    def flops(self) -> int:
        """Multiply-adds of the decoder layers in the prefill, from processed tokens; selection not included."""
        return sum(self.shape.layer_flops(self.text_tokens + tokens) for tokens in self.tokens_in)

    def dense_flops(self) -> int:
        """The same without pruning."""
        return self.shape.num_layers * self.shape.layer_flops(self.text_tokens + self.visual_tokens)

    def selection_flops(self) -> int:
        """Multiply-adds spent on choosing: attention rows and merging."""
        return self.scoring_flops + int(self.details.get("merge_flops", 0))

    def kv_bytes(self) -> int:
        """Bytes of keys and values in the cache after the prefill."""
        tokens = sum(self.text_tokens + tokens for tokens in self.tokens_in)
        return 2 * tokens * self.shape.key_value_size * self.shape.bytes_per_value

    def to_dict(self, kept: bool = False) -> dict[str, Any]:
        """JSON-able summary; ``kept`` adds the surviving indices per layer and, where they are noted, the members of
        merged tokens.
        """
        summary = {
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "structure_tokens": self.structure_tokens,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "mean_nominal": self.mean_tokens("nominal"),
            "mean_processed": self.mean_tokens("processed"),
            "target_tokens": self.target_tokens,
            "budget": self.budget,
            "budget_error": self.budget_error,
            "flops": self.flops(),
            "dense_flops": self.dense_flops(),
            "selection_flops": self.selection_flops(),
            "kv_bytes": self.kv_bytes(),
            **({} if self.target_ratio is None else {"target_ratio": self.target_ratio}),
            **self.details,
        }
        if len(self.views) > 1:
            summary |= {"views": list(self.views), "kept_per_view": self.kept_per_view}
        if kept:
            summary["kept"] = [origins.tolist() for origins in self.kept]
            members = self.members
            if members is not None and any(members):
                summary["members"] = members
        return summary
