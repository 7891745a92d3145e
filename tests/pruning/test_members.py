"""Traces say what merged tokens are made of: by hand, and against what the vectors themselves tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from llava.pruning import AutoPrune, PruningMethod, Rows, Selection, VisualLayout
from llava.pruning.selection import top_k
from tests.pruning.models import Batch, random_llama


@dataclass(frozen=True, kw_only=True)
class Halves(PruningMethod):
    """After layers 1 and 3 the second half of the visual tokens becomes two: its even places, and its odd ones."""

    name: ClassVar[str] = "halves"

    def stages(self, num_layers):
        return {1: Rows.NONE, 3: Rows.NONE}

    def select(self, view, memory):
        keep = tuple(count // 2 for count in view.counts)
        falling = -torch.arange(max(view.counts)).float().expand(len(keep), -1)
        weights = torch.zeros(len(keep), 2, max(view.counts))
        for row, (kept, count) in enumerate(zip(keep, view.counts, strict=True)):
            for place in range(kept, count):
                weights[row, place % 2, place] = 1.0
        weights = weights / weights.sum(2, keepdim=True)
        sources = torch.tensor([[kept, kept] for kept in keep])
        merged = weights @ view.hidden_BVC
        return Selection(top_k(falling, view.counts, keep), keep, merged, (2,) * len(keep), sources, lambda: weights)


def prefill(model, batch, method, rows, notes=True):
    width = max(len(batch.embeds[row]) for row in rows)
    hidden = torch.zeros(len(rows), width, 64)
    mask, spans, cls = torch.zeros(len(rows), width, dtype=torch.long), [], []
    for place, row in enumerate(rows):
        shift = width - len(batch.embeds[row])
        hidden[place, shift:], mask[place, shift:] = batch.embeds[row], 1
        spans.append([(start + shift, end + shift) for start, end in batch.spans[row]])
        cls.append(batch.cls[row])
    with torch.inference_mode(), method.attach(model.model) as run:
        run.notes_members = notes
        run.set_visual(VisualLayout.from_spans(spans), cls if run.needs_cls_attention else None)
        model.model(inputs_embeds=hidden, attention_mask=mask, use_cache=True)
    return run.traces


def test_members_of_members_in_a_batch_of_unequal_rows():
    model = random_llama()
    batch = Batch(model, samples=((2, 12, 5), (1, 8, 4)))
    twelve, eight = prefill(model, batch, Halves(), [0, 1])
    # 12: places 6..11 merge; then of 0..5, a, b the places 4, 5, a (6) and b (7).
    first, second = [[6, 8, 10], [7, 9, 11]], [[4, 6, 8, 10], [5, 7, 9, 11]]
    assert twelve.kept[1].tolist() == [0, 1, 2, 3, 4, 5, -1, -1] and twelve.kept[3].tolist() == [0, 1, 2, 3, -1, -1]
    assert twelve.members == [[], first, first, second, second, second]
    # 8: places 4..7 merge; then of 0..3, a, b the places 3 (odd), a (4) and b (5).
    assert eight.kept[3].tolist() == [0, 1, 2, -1, -1]
    assert eight.members[1] == [[4, 6], [5, 7]] and eight.members[5] == [[4, 6], [3, 5, 7]]
    assert twelve.to_dict(kept=True)["members"] == twelve.members and "members" not in twelve.to_dict()


def test_members_are_noted_only_where_they_are_asked_for():
    model = random_llama()
    batch = Batch(model)
    (silent,) = prefill(model, batch, Halves(), [0], notes=False)
    assert silent.members is None and "members" not in silent.to_dict(kept=True)
    (dense,) = prefill(model, batch, AutoPrune(target_tokens=8, recycle_fraction=0), [0])
    assert not any(dense.members) and "members" not in dense.to_dict(kept=True)


@pytest.mark.parametrize("row", [0, 2])
def test_autoprune_merges_what_it_says(row):
    """Behind the first layer that merges, no merged token shares a patch with another or with a survivor, and members
    were there before: dropped patches that appear again in a merged token.
    """
    model = random_llama()
    batch = Batch(model)
    (trace,) = prefill(model, batch, AutoPrune(target_tokens=8, x0=3.0), [row])
    merging = [layer for layer in range(6) if -1 in trace.kept[layer].tolist()]
    assert merging
    for layer in merging:
        made, alone = trace.members[layer], set(trace.kept[layer].tolist()) - {-1}
        assert len(made) == trace.kept[layer].tolist().count(-1)
        flat = [patch for group in made for patch in group]
        assert len(flat) == len(set(flat)) and not alone & set(flat)
        assert set(flat) <= set(trace.kept[0].tolist())
        assert all(group == sorted(group) for group in made)
