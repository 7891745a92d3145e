"""What answers of a run add up to, and how two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from llava.schema import NUMBER, Fields, at_least, check
from llava.utils import UserError

if TYPE_CHECKING:
    from llava.pruning.engine.trace import Trace

TOKENS = "tokens"  # key in the metadata for what differs from sample to sample
REMEDY = "give another --answers-file, or --overwrite to start over"
FAILED = "failed"  # key in the metadata of a sample whose answer is worthless, with the reason
_COUNT = at_least(0, NUMBER)
_COUNTS = Fields({f"{name}?": _COUNT for name in ("visual", "nominal", "processed", "flops", "dense_flops")})
_IMAGE_COUNTS = Fields({"nominal": _COUNT, "processed": _COUNT})


def token_counts(trace: Trace) -> dict[str, Any]:
    """What the metadata of an answer says about the tokens of its sample: visual tokens before pruning, their means per
    decoder layer, multiply-adds of the decoder's prefill and of a dense one.
    """
    return {
        "visual": trace.visual_tokens,
        "nominal": round(trace.mean_tokens("nominal"), 3),
        "processed": round(trace.mean_tokens("processed"), 3),
        "flops": trace.flops(),
        "dense_flops": trace.dense_flops(),
    }


@dataclass
class TokenTotals:
    """Sums over answers, from their `token_counts`. Means of tokens are over samples with an image, FLOPs over all."""

    with_image: int = 0
    visual: int = 0
    nominal: float = 0.0
    processed: float = 0.0
    flops: int = 0
    dense_flops: int = 0

    def add(self, tokens: Mapping[str, Any] | None, where: str = "") -> None:
        """Counts one answer; raises `UserError`, beginning with `where`, if these are no counts."""
        if not tokens:
            return
        try:
            check(tokens, _COUNTS, "tokens")
            if tokens.get("visual"):
                check(tokens, _IMAGE_COUNTS, "tokens")
        except UserError as error:
            raise UserError(f"{where}: 'tokens' in the metadata are no token counts ({error}); {REMEDY}") from None
        numbers = {item.name: tokens.get(item.name, 0) for item in fields(self)[1:]}
        self.flops += numbers["flops"]
        self.dense_flops += numbers["dense_flops"]
        if numbers["visual"]:
            self.with_image += 1
            self.visual += numbers["visual"]
            self.nominal += numbers["nominal"]
            self.processed += numbers["processed"]

    def merge(self, other: TokenTotals) -> None:
        """Adds another part's sums."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def means(self) -> dict[str, float] | None:
        """Mean visual tokens per layer: before pruning, nominal, processed. None without any image."""
        if not self.with_image:
            return None
        return {name: round(getattr(self, name) / self.with_image, 3) for name in ("visual", "nominal", "processed")}

    def flops_ratio(self) -> float | None:
        """Decoder prefill relative to dense."""
        return round(self.flops / self.dense_flops, 6) if self.dense_flops else None


def run_options(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer's metadata says about its run: everything but what belongs to the sample alone."""
    return {name: value for name, value in metadata.items() if name not in (TOKENS, FAILED)}


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """`key OLD, now NEW` for the first key in which two runs differ, or None.

    Options are compared as JSON has them: the tuple of a composition's members comes back from a file as a list.
    """
    for key in [*wanted, *found]:
        old, new = found.get(key), wanted.get(key)
        if old != new and json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
            return f"{key} {found.get(key)!r}, now {wanted.get(key)!r}"
    return None
