"""Trace lines as a report needs them: checked, and small.

Survivors of a prompt are nested, so one number per visual token says all: after how many layers it is still there.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from llava.eval.reports.trace_summary import LINE
from llava.schema import ID, NUMBER, TEXT, Fields, ListOf, at_least, between, check, optional
from llava.utils import UserError

MOST_TOKENS = 2**16 - 1
MOST_LAYERS = 255
_INDEX = between(-1, MOST_TOKENS, at_least(-1))
_RASTER = Fields(
    {
        "grid": ListOf(between(1, 4096, at_least(1)), 2, 2),
        "box": ListOf(between(-1e6, 1e6), 4, 4),
        "tiles": ListOf(between(1, 4096, at_least(1)), 2, 2),
        "first": between(0, MOST_TOKENS, at_least(0)),
        "image": between(0, MOST_TOKENS, at_least(0)),
    }
)
_LOOKED_AT = Fields(
    {
        "question_id": ID,
        "prompt": TEXT,
        "visual_tokens": between(0, MOST_TOKENS, at_least(0)),
        "tokens_out": ListOf(at_least(0), 0, MOST_LAYERS),
        "target_tokens?": optional(at_least(0, NUMBER)),
        "kept?": optional(ListOf(ListOf(_INDEX))),
        "members?": optional(ListOf(ListOf(ListOf(_INDEX)))),
        "rasters?": optional(ListOf(_RASTER)),
        "encode_seconds?": optional(at_least(0, NUMBER)),
        "prefill_seconds?": optional(at_least(0, NUMBER)),
        "decode_seconds?": optional(at_least(0, NUMBER)),
        "seconds?": optional(at_least(0, NUMBER)),
    }
)
TIMES = ("encode_seconds", "prefill_seconds", "decode_seconds", "seconds")


@dataclass(frozen=True)
class Group:
    """A merged token: which patches it is made of, and the first and last layer that it leaves."""

    members: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Looked:
    """What is kept of a trace.

    Attributes:
        visual: visual tokens of the prompt.
        target: mean that was asked for.
        counts: tokens leaving each layer.
        depth: of every visual token after how many layers it is still there as itself, uint8 `[visual]`; None if the
            trace does not say.
        groups: merged tokens; None if the trace does not say what they are made of.
        information: bits of layers 0 and 1.
        rasters: see `answering.rasters`; None where the trace has none.
        seconds: of encoding, prefill, decoding, in all.
    """

    visual: int
    counts: tuple[int, ...]
    target: float | None = None
    depth: np.ndarray | None = None
    groups: tuple[Group, ...] | None = None
    information: tuple[float | None, float | None] = (None, None)
    slope: float | None = None
    flops: float | None = None
    dense_flops: float | None = None
    rasters: tuple[Mapping[str, Any], ...] | None = None
    seconds: tuple[float | None, ...] = (None,) * len(TIMES)


def read_line(line: Mapping[str, Any], where: str) -> Looked:
    """A line of a trace file; raises `UserError`, beginning with `where`, for anything else."""
    where = f"{where}: not a line of a trace file"
    check(line, LINE, where)
    check(line, _LOOKED_AT, where)
    visual, counts, kept = line["visual_tokens"], line["tokens_out"], line.get("kept")
    bits = line.get("mutual_information") or {}
    return Looked(
        visual,
        tuple(counts),
        line.get("target_tokens"),
        None if kept is None or not visual else _depth(kept, visual, len(counts), where),
        None if line.get("members") is None or kept is None else _groups(kept, line["members"], visual, where),
        (bits.get("layer0"), bits.get("layer1")),
        line.get("slope"),
        line.get("flops"),
        line.get("dense_flops"),
        None if line.get("rasters") is None else tuple(line["rasters"]),
        tuple(line.get(name) for name in TIMES),
    )


def _depth(kept: Sequence[Sequence[int]], visual: int, layers: int, where: str) -> np.ndarray:
    if len(kept) != layers:
        raise UserError(f"{where}: 'kept' has {len(kept)} layers, 'tokens_out' has {layers}")
    depth = np.zeros(visual, dtype=np.uint8)
    for layer, survivors in enumerate(kept):
        own = np.asarray(survivors, dtype=np.int64)
        own = own[own >= 0]
        if len(own) and own.max() >= visual:
            raise UserError(f"{where}: 'kept' names token {own.max()} of {visual}")
        if (depth[own] != layer).any():
            raise UserError(f"{where}: a token that layer {layer} keeps was dropped before")
        depth[own] = layer + 1
    return depth


def _groups(
    kept: Sequence[Sequence[int]], members: Sequence[Sequence[Sequence[int]]], visual: int, where: str
) -> tuple[Group, ...]:
    if [len(layer) for layer in members] != [list(layer).count(-1) for layer in kept]:
        raise UserError(f"{where}: 'members' and 'kept' differ in their merged tokens")
    lasts: dict[tuple[int, ...], list[int]] = {}
    for layer, groups in enumerate(members):
        for group in groups:
            if any(not 0 <= token < visual for token in group):
                raise UserError(f"{where}: 'members' names a token that is not there")
            lasts.setdefault(tuple(group), []).append(layer)
    return tuple(Group(group, layers[0], layers[-1]) for group, layers in lasts.items())


def first_difference(one: Looked | None, other: Looked | None) -> int | None:
    """The first layer after which other tokens are left, merged ones included; None if none is, or it is not known."""
    if one is None or other is None or one.visual != other.visual or len(one.counts) != len(other.counts):
        return None
    if one.depth is None or other.depth is None:
        return None
    layers = len(one.counts)
    differ = [layer for layer in range(layers) if one.counts[layer] != other.counts[layer]][:1]
    unlike = one.depth != other.depth
    if unlike.any():
        differ.append(int(np.minimum(one.depth[unlike], other.depth[unlike]).min()))
    return min(differ, default=None)


# --- as the page has it ------------------------------------------------------------------------------------------


def packed(looked: Looked, raster_number: int | None) -> dict[str, Any]:
    """The trace in the page's data; the script in `page/` reads it."""
    return {
        "v": looked.visual,
        "o": _runs(looked.counts),
        "g": looked.target,
        "mi": [_short(bits) for bits in looked.information],
        "s": _short(looked.slope),
        "t": [None if seconds is None else round(1000 * seconds, 3) for seconds in looked.seconds],
        "w": raster_number,
        "k": None if looked.depth is None else pack_depth(looked.depth),
        "m": None if looked.groups is None else [_pack_group(group) for group in looked.groups],
    }


def pack_depth(depth: np.ndarray) -> str | int:
    """One number where all are alike, base64 of a byte per token otherwise."""
    if len(depth) and (depth == depth[0]).all():
        return int(depth[0])
    return base64.b64encode(depth.tobytes()).decode("ascii")


def _pack_group(group: Group) -> list[Any]:
    data = np.asarray(group.members, dtype="<u2").tobytes()
    return [group.first, group.last, base64.b64encode(data).decode("ascii")]


def _runs(counts: Sequence[int]) -> list[int]:
    """Count and number of layers in turns: dense runs have one count for all."""
    return [number for count, layers in groupby(counts) for number in (count, len(list(layers)))]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
