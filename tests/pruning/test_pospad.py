"""Markers for runs of dropped tokens: which there are, what they are, that the decoder sees them in their places."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
import torch

from llava.pruning import OptionError, VisualLayout, get_method
from llava.pruning.reduction import Crop, reduce_crops
from tests.pruning.models import Batch, generate, random_llama


@pytest.fixture(scope="module")
def model():
    return random_llama()


def runs(kept, slots) -> list[list[int]]:
    """Dropped tokens, by their numbers, that stand side by side."""
    dropped = [i for i in range(len(slots)) if i not in kept]
    places = enumerate(dropped)
    return [[i for _, i in group] for _, group in groupby(places, key=lambda pair: slots[pair[1]] - pair[0])]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("row", [0, 1, 3])
@pytest.mark.parametrize("name", ["divprune", "random"])
def test_the_decoder_sees_survivors_and_markers_in_their_places(model, name, row, positions):
    batch = Batch(model)
    (plain,) = generate(model, get_method(name)(target_tokens=9, positions=positions), batch.alone(row), 1)[2]
    kept = plain.kept[0].tolist()
    slots = [slot for start, end in batch.spans[row] for slot in range(start, end)]
    slots = slots[:-1] if slots[-1] == len(batch.embeds[row]) - 1 else slots
    embeds, markers, gone = batch.embeds[row].clone(), [], set()
    for run in runs(kept, slots):
        embeds[slots[run[-1]]] = batch.embeds[row][[slots[i] for i in run]].mean(0)
        markers.append(run[-1])
        gone.update(slots[i] for i in run[:-1])
    left = [slot for slot in range(len(embeds)) if slot not in gone]
    numbers = torch.tensor([left]) if positions == "original" else None
    with torch.no_grad():
        expected = model(inputs_embeds=embeds[left][None], position_ids=numbers).logits[0, -1]
    method = get_method(name)(target_tokens=9, positions=positions, pospad=True)
    _, logits, (trace,) = generate(model, method, batch.alone(row), new_tokens=1)
    torch.testing.assert_close(logits[0, 0], expected, atol=2e-4, rtol=1e-4)
    ids = sorted([(i, i) for i in kept] + [(i, -1) for i in markers])
    assert trace.kept[0].tolist() == [origin for _, origin in ids] and len(markers) > 2
    assert trace.tokens_in == [9 + len(markers)] * 6 and trace.budget_error == len(markers)


def test_text_and_newlines_end_a_run(model):
    """Eight tokens in two rows with a newline behind each; one survivor."""
    batch = Batch(model, samples=((3, 4, 1, 4, 1, 6),))
    prompt = batch.alone(0)
    layout = VisualLayout.from_spans([[(3, 7), (8, 12)]], structure=[[(7, 8), (12, 13)]])
    method = get_method("divprune")(target_tokens=1, pospad=True)
    _, _, (trace,) = generate(model, method, {**prompt, "layout": layout}, new_tokens=1)
    kept = trace.kept[0].tolist()
    (survivor,) = [i for i in kept if i >= 0]
    assert len(kept) == 1 + len(runs([survivor], [3, 4, 5, 6, 8, 9, 10, 11]))


def test_markers_in_front_of_the_projector():
    one = Crop(
        torch.randn(36, 5, generator=torch.Generator().manual_seed(0)), {"cls_attention": torch.arange(36.0) % 7}
    )
    (plain,) = reduce_crops(get_method("vispruner")(important_ratio=1.0), [one], [10])
    (got,) = reduce_crops(get_method("vispruner")(important_ratio=1.0, pospad=True), [one], [10])
    kept = plain.origin_K.tolist()
    found = runs(kept, range(36))
    assert got.origin_K.tolist() == kept + [-1] * len(found) and not got.behind_K.any()
    assert got.source_K.tolist() == kept + [run[-1] for run in found]
    torch.testing.assert_close(got.tokens_KC[10:], torch.stack([one.tokens_PC[run].mean(0) for run in found]))
    torch.testing.assert_close(got.weights() @ one.tokens_PC, got.tokens_KC)
    place = got.order(torch.arange(36), 36).argsort().tolist()
    assert [got.source_K[i].item() for i in place] == sorted(got.source_K.tolist())


def test_every_row_of_a_batch_has_its_own_markers(model):
    batch, rows = Batch(model), [3, 0, 4, 1]
    for name in ("divprune", "visionzip", "divprune+autoprune"):
        first = f"{name.partition('+')[0]}." if "+" in name else ""
        options = {f"{first}target_tokens": 9, f"{first}pospad": "true"} | ({"target_tokens": 7} if first else {})
        method = get_method(name).from_options(options)
        _, logits, traces = generate(model, method, batch.together(rows))
        for place, row in enumerate(rows):
            _, own, (alone,) = generate(model, method, batch.alone(row))
            assert alone.tokens_in == traces[place].tokens_in
            torch.testing.assert_close(own[0], logits[place], atol=2e-4, rtol=1e-4)


def test_what_is_recorded_and_what_is_refused():
    plain, marked = get_method("divprune")(), get_method("divprune")(pospad=True)
    assert "pospad" not in plain.settings() and marked.settings()["pospad"] is True
    assert replace(marked, pospad=False) == plain
    for name in ("tome", "flowcut", "gtp_vit"):
        with pytest.raises(OptionError, match="pospad needs tokens that are dropped"):
            get_method(name)(pospad=True)
    assert get_method("tome")(inside=False, pospad=True).pospad
