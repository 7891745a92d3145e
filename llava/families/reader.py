"""Reads the prompts of a model for a pruning run: hears ids and images, tells the run where the visual tokens are.

The model's ``get_image_features`` (and ``..._video_...``) are watched: what the tower says for the method is collected
there and travels with the features. Its ``forward`` is watched for ids. When the decoder begins a prefill, both become
what :meth:`~llava.pruning.PruningRun.set_visual` wants.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava import compat
from llava.families.base import Call, Family, Placed
from llava.families.tower import Place, TowerFacts, side_by_side, split_values
from llava.pruning.engine.cache import CacheRecord
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.notices import say
from llava.pruning.engine.support import check_generation
from llava.pruning.types import UnsupportedError
from llava.pruning.vision import TowerValue, VisionFact

_ATTRIBUTE = "pruning_encoded"
_PROMPTS = ("input_ids", "inputs", "inputs_embeds")
_CLS_ROWS = (TowerValue.CLS_ATTENTION, TowerValue.WIDE_CLS_ATTENTION)


@dataclass(frozen=True)
class Encoded:
    """What is known of the features of one call: tokens per image, and of each token in the order of the prompt whether
    it is a newline, its crop, and by name what the tower says.
    """

    sizes: list[int]
    newline: list[bool] | None = None
    crop: list[int] | None = None
    facts: dict[str, Tensor] = field(default_factory=dict)


class FamilyReader:
    """The reader of one model."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        if family.refused is not None:
            raise UnsupportedError(f"{family.name} ({type(model).__name__}) cannot be pruned: it has {family.refused}")
        self._family, self._top = family, cast(Any, model)
        self._model = family.without_head(model)
        self._here = threading.local()

    @property
    def family(self) -> str:
        return self._family.name

    # --- what the method needs of the tower ---

    def check(self, run: Any) -> None:
        """Refuse a method that this model cannot serve."""
        method = run.method
        if method.merges_in_tower:
            raise UnsupportedError(
                f"method '{method.name}' merges tokens inside the vision tower, which is done in the package's own "
                f"LLaVA models only, not in {self.family}"
            )
        for modality in self._family.modalities:
            self._places(run, modality)

    def _places(self, run: Any, modality: str) -> dict[str, Place]:
        """Layer and value of everything that the method wants to know, by name."""
        layers = len(self._family.attentions(self._model, modality))
        wanted = run.vision_facts(layers)
        return {name: self._place(run.method.name, name, fact, layers, modality) for name, fact in wanted.items()}

    def _place(self, method: str, name: str, fact: VisionFact, layers: int, modality: str) -> Place:
        layer = self._family.used_layer(self._model, modality) if fact.layer is None else fact.layer % layers
        value = fact.value
        value.check_known()
        if value is TowerValue.PADDING:
            raise UnsupportedError(
                f"method '{method}': debias_padding needs to know how pictures were padded to squares, which is known "
                f"in the package's own LLaVA models only, not in {self.family}; leave it out"
            )
        if fact.layer is not None and not -layers <= fact.layer < layers:
            raise UnsupportedError(
                f"method '{method}' asks for layer {fact.layer} of a tower of {layers} ({self.family})"
            )
        if value in _CLS_ROWS and not self._family.has_cls:
            say(
                method,
                f"the vision tower of {self.family} has no CLS token; the attention that each patch receives takes its "
                "place",
            )
            value = TowerValue.RECEIVED_ATTENTION
        if value.of_all_rows:
            seeing_all = self._family.global_layers(self._model, modality)
            if not seeing_all:
                raise UnsupportedError(
                    f"method '{method}' needs attention of the vision tower ({name}), and no layer of this tower of "
                    f"{self.family} sees a whole picture (AutoPrune does without it with cls_weight=0)"
                )
            layer = max([index for index in seeing_all if index <= layer] or seeing_all[:1])
        return layer, value

    # --- watching the model ---

    def enter(self, run: Any, undo: ExitStack) -> None:
        """Watch the model until ``undo``."""
        undo.callback(self._forget)
        hook = self._model.register_forward_pre_hook(self._see_prompt, with_kwargs=True)
        undo.callback(hook.remove)
        for modality in self._family.modalities:
            name = f"get_{modality}_features"
            run._replace(undo, self._model, name, self._watched(run, modality, getattr(self._model, name)))
        if hasattr(self._top, "_expand_inputs_for_generation"):
            expand = self._top._expand_inputs_for_generation

            @functools.wraps(expand)
            def expanded(*args: Any, **kwargs: Any) -> Any:
                self._here.repeats = kwargs.get("expand_size", args[0] if args else 1)
                return expand(*args, **kwargs)

            run._replace(undo, self._top, "_expand_inputs_for_generation", expanded)

        if hasattr(self._top, "generate") and run.selects:
            generate = self._top.generate

            @functools.wraps(generate)
            def whole(*args: Any, **kwargs: Any) -> Any:
                configs = [kwargs.get("generation_config"), *args, getattr(self._top, "generation_config", None)]
                check_generation(kwargs, configs)
                prompt = next((kwargs[name] for name in _PROMPTS if kwargs.get(name) is not None), None)
                prompt = args[0] if prompt is None and args else prompt
                self._here.width = None if prompt is None else prompt.shape[1]
                try:
                    return generate(*args, **kwargs)
                finally:
                    self._here.width = None

            run._replace(undo, self._top, "generate", whole)

    def _forget(self) -> None:
        self._here.__dict__.pop("latest", None)

    def _see_prompt(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the ids of a prompt and what was encoded for it; refuse an image on a pruned cache."""
        if args:
            kwargs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        encoded = {name: value for name, value in (kwargs.get("mm_encoder_outputs") or {}).items() if value is not None}
        pixels = [name for name in kwargs if name.startswith("pixel_values") and kwargs[name] is not None]
        cache = kwargs.get("past_key_values")
        if compat.cached_length(cache) > 0:
            if CacheRecord.of(cache) is not None and (encoded or pixels):
                raise UnsupportedError(
                    f"{self.family}: a later turn brings an image to a cache that was pruned; start again with the "
                    "whole conversation as one prompt"
                )
            return
        ids = kwargs.get("input_ids")
        if ids is None and (encoded or pixels) and kwargs.get("inputs_embeds") is not None:
            ids = self._ids_of(kwargs["inputs_embeds"])
        self._here.prompt = ids, encoded
        self._here.encoded = {}

    def _ids_of(self, embeds: Tensor) -> Tensor:
        """Ids ``[B, N]`` of a prompt given as embeddings ``[B, N, C]``: those of placeholders, -1 for others."""
        embed = self._model.get_input_embeddings()
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        for token in self._family.tokens(self._model.config).values():
            own = embed(torch.tensor(token, device=embed.weight.device)).to(embeds.device)
            ids[(embeds == own).all(-1)] = token
        return ids

    def _watched(self, run: Any, modality: str, own: Callable[..., Any]) -> Callable[..., Any]:
        """The model's own encoding, with what the method wants to know of the tower beside the features."""
        signature = inspect.signature(own)

        @functools.wraps(own)  # generate looks at the signature
        def encode(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._here, "inside", False):  # Qwen3-VL encodes videos as images
                return own(*args, **kwargs)
            with run.exclusive(), ExitStack() as undo:
                self._here.inside = True
                undo.callback(setattr, self._here, "inside", False)
                places = self._places(run, modality)
                attentions = self._family.attentions(self._model, modality) if places else []
                packs = self._seen_packing(run, undo)
                watch = TowerFacts(attentions, set(places.values())) if places else None
                with watch or nullcontext():
                    output = own(*args, **kwargs)
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                call = Call(self._model, modality, bound.arguments, packs)
                with run.selection_timer():
                    encoded = self._encoded(call, output, places, watch)
            if encoded is not None:
                setattr(output, _ATTRIBUTE, encoded)
                self._here.encoded = {**getattr(self._here, "encoded", {}), modality: encoded}
                self._here.latest = {**getattr(self._here, "latest", {}), modality: (encoded, output.pooler_output)}
            return output

        return encode

    def _seen_packing(self, run: Any, undo: ExitStack) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Calls of ``pack_image_features`` from here on."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        if hasattr(self._model, "pack_image_features"):
            own = self._model.pack_image_features

            @functools.wraps(own)
            def pack(*args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                return own(*args, **kwargs)

            run._replace(undo, self._model, "pack_image_features", pack)
        return calls

    def _encoded(
        self, call: Call, output: Any, places: Mapping[str, Place], facts: TowerFacts | None
    ) -> Encoded | None:
        features = getattr(output, "pooler_output", None)
        if features is None:
            return None  # return_dict=False: somebody looks at features, no prompt is made of them
        if not places and not self._family.has_newlines:
            return Encoded([len(image) for image in features])
        if places and facts is not None:
            runs = side_by_side(facts, places.values())
            widths = {name: facts.runs(place)[0].shape[2] for name, place in places.items()}
        else:
            # Nothing but newlines and crops is asked for.
            runs, widths = [torch.zeros(*output.last_hidden_state.shape[:2], 1, device=call.model.device)], {}
        placed = self._family.place(call, runs)
        values = torch.cat([image.values_VF for image in placed])
        return Encoded(
            [len(image.values_VF) for image in placed],
            _joined(placed, "newline_V"),
            _joined(placed, "crop_V"),
            split_values(values, widths) if widths else {},
        )

    # --- telling the run ---

    def tell(self, run: Any) -> None:
        """Say where the visual tokens of the prompt are that the model was just given."""
        ids, given = self._here.__dict__.pop("prompt", (None, {}))
        repeats = self._here.__dict__.pop("repeats", 1)
        if ids is None:
            return
        encoded = {
            modality: getattr(output, _ATTRIBUTE, None) or self._known(modality, output) or _bare(output)
            for modality, output in given.items()
        } or self._here.__dict__.get("encoded", {})
        tokens = self._family.tokens(self._model.config)
        width = getattr(self._here, "width", None)  # behind it stand guesses of assisted decoding
        rows = ids[:, :width].tolist()
        total = sum(row.count(token) for row in rows for token in tokens.values())
        known = sum(sum(part.sizes) for part in encoded.values())
        if known and total % known == 0:
            repeats = total // known  # features stay those of each prompt once
        if len(rows) % max(repeats, 1) == 0:
            rows = rows[:: max(repeats, 1)]
        counts = {modality: sum(row.count(token) for row in rows) for modality, token in tokens.items()}
        for modality, part in encoded.items():
            if sum(part.sizes) != counts.get(modality):
                return  # the model says itself that images and prompt do not fit together
        self._check_known(run, encoded)
        seen = {m: t for m, t in tokens.items() if counts[m] and m in encoded}  # placeholders of nothing are text
        layout, facts = read(rows, seen, encoded)
        run.set_visual(layout, facts=facts, sample_ids=run.sample_ids, width=width)

    def _known(self, modality: str, output: Any) -> Encoded | None:
        """What is known of a copy of the features that were encoded last: accelerate copies them on their way to the
        device of the decoder.
        """
        encoded, features = getattr(self._here, "latest", {}).get(modality, (None, ()))
        if [len(image) for image in features] != [len(image) for image in output.pooler_output]:
            return None
        pairs = zip(features, output.pooler_output, strict=True)
        return encoded if all(torch.equal(own, copy.to(own.device)) for own, copy in pairs) else None

    def _check_known(self, run: Any, encoded: Mapping[str, Encoded]) -> None:
        for modality, part in encoded.items():
            missing = [name for name in self._places(run, modality) if name not in part.facts]
            if run.selects and (missing or (self._family.has_newlines and part.newline is None)):
                raise UnsupportedError(
                    f"method '{run.method.name}' needs {', '.join(missing) or 'the places of newlines'} of the "
                    f"{modality}s, which were encoded outside of the run's context: call {self.family}'s "
                    f"get_{modality}_features while the method is attached"
                )


def read(
    rows: Sequence[Sequence[int]], tokens: Mapping[str, int], encoded: Mapping[str, Encoded]
) -> tuple[VisualLayout, dict[str, list[Tensor]]]:
    """Layout and facts of a batch of ids.

    Args:
        rows: ids, padding included.
        tokens: id of the placeholder, by modality.
        encoded: what is known of the features, by modality, in reading order over the whole batch.
    """
    kinds = {token: modality for modality, token in tokens.items()}
    owners = {modality: _owners(encoded[modality].sizes) for modality in tokens}
    places: dict[str, Iterator[int]] = {modality: iter(range(len(owner))) for modality, owner in owners.items()}
    names = next((list(part.facts) for part in encoded.values()), [])
    spans, structure, crops = [], [], []
    facts: dict[str, list[Tensor]] = {name: [] for name in names}
    with_crops = any(part.crop is not None for part in encoded.values())
    for row in rows:
        # Every placeholder with the image it belongs to, its number among the features, and whether it is a newline.
        seen = []
        for slot, token in enumerate(row):
            modality = kinds.get(token)
            if modality is not None:
                place = next(places[modality])
                newline = encoded[modality].newline
                seen.append((slot, modality, owners[modality][place], place, newline is not None and newline[place]))
        own: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        parts: list[tuple[str, int, int]] = []
        # Runs of neighbors of one image.
        for key, group in groupby(enumerate(seen), key=lambda item: (item[1][0] - item[0], *item[1][1:3], item[1][4])):
            members = [item for _, item in group]
            own[key[3]].append((members[0][0], members[-1][0] + 1))
            if not key[3]:
                parts.append((key[1], members[0][3], members[-1][3] + 1))
        spans.append(own[False])
        structure.append(own[True])
        crops.append(
            [
                [(encoded[image[0]].crop or [0] * (item[3] + 1))[item[3]] for item in group]
                for image, group in (
                    (key, list(items))
                    for key, items in groupby((item for item in seen if not item[4]), key=lambda item: item[1:3])
                )
            ]
        )
        for name in names:
            pieces = [encoded[modality].facts[name][first:last] for modality, first, last in parts]
            like = next(iter(encoded.values())).facts[name]
            facts[name].append(torch.cat(pieces) if pieces else like[:0])
    any_structure = any(structure)
    layout = VisualLayout.from_spans(
        spans, structure=structure if any_structure else None, crops=crops if with_crops else None
    )
    return layout, facts


def _owners(sizes: Sequence[int]) -> list[int]:
    return [image for image, size in enumerate(sizes) for _ in range(size)]


def _joined(placed: Sequence[Placed], name: str) -> list[Any] | None:
    values = [getattr(image, name) for image in placed]
    if all(value is None for value in values):
        return None
    joined: list[Any] = torch.cat([value for value in values if value is not None]).tolist()
    return joined


def _bare(output: Any) -> Encoded:
    """Of features that were encoded elsewhere only their numbers are known."""
    return Encoded([len(image) for image in output.pooler_output])
