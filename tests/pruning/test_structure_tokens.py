"""Structure tokens (newlines between rows of patches): kept everywhere, chosen nowhere, counted as what they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from llava.pruning import AutoPrune, Dense, PruningMethod, Rows, VisualLayout, get_method
from llava.pruning.budget import crop_quotas
from tests.pruning.models import generate, masked_oracle, random_llama

# Text, then images as lists of rows of patches (each closed by a newline, but for a block of plain patches), text.
SAMPLES = (
    (5, [("plain", 16), *[("row", 4)] * 6], 7),
    (2, [("plain", 16), *[("row", 8)] * 3], 12),
    (9, [("plain", 16)], 3),
    (6, [], 4),
)


@pytest.fixture(scope="module")
def model():
    return random_llama()


class Prompts:
    """Embeddings, patches' and newlines' places and CLS attention of the samples, alone or left padded."""

    def __init__(self, model, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embeds, self.spans, self.newlines, self.cls, self.text = [], [], [], [], []
        for before, blocks, after in SAMPLES:
            at, spans, newlines = before, [], []
            for kind, patches in blocks:
                spans.append((at, at + patches))
                at += patches
                if kind == "row":
                    newlines.append((at, at + 1))
                    at += 1
            self.embeds.append(torch.randn(at + after, model.config.hidden_size, generator=generator))
            self.spans.append(spans)
            self.newlines.append(newlines)
            self.cls.append(torch.rand(sum(e - s for s, e in spans), generator=generator) / 50)
            self.text.append(before + after)

    def inputs(self, rows) -> dict:
        width = max(len(self.embeds[row]) for row in rows)
        embeds = torch.zeros(len(rows), width, self.embeds[0].shape[1])
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        moved = ([], [])
        for place, row in enumerate(rows):
            shift = width - len(self.embeds[row])
            embeds[place, shift:], mask[place, shift:] = self.embeds[row], 1
            for target, spans in zip(moved, (self.spans[row], self.newlines[row]), strict=True):
                target.append([(start + shift, end + shift) for start, end in spans])
        return {
            "embeds": embeds,
            "mask": mask,
            "layout": VisualLayout.from_spans(moved[0], structure=moved[1]),
            "cls": [self.cls[row] for row in rows],
        }


def build(name: str, positions: str) -> PruningMethod:
    options = {"target_tokens": 12, "positions": positions}
    if name in ("autoprune", "sparsevlm"):  # the oracle knows no merged tokens
        options["recycle_fraction"] = 0.0
    if name == "autoprune":
        options["x0"] = 3.0
    if name in ("fastv", "entropyprune"):
        options["target_tokens"] = 22
    if name == "dense":
        options = {"visual_token_num": 12, "positions": positions}
    return get_method(name)(**options)


BEFORE_DECODER = ("dense", "random", "uniform", "fastervlm", "divprune", "todre")
METHODS = (*BEFORE_DECODER, "fastv", "autoprune", "pdrop", "sparsevlm", "entropyprune", "transprune", "adaptinfer")
METHODS += ("sparsevlm_v2",)
# Methods at work in front of the decoder are crossed with newlines in tests/model/test_vision_methods.


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", METHODS)
def test_pruned_run_equals_an_oracle_that_never_drops_a_newline(model, name, positions):
    prompts = Prompts(model)
    rows = [0, 1] if name != "random" else [0]
    tokens, logits, traces = generate(model, build(name, positions), prompts.inputs(rows))
    for row in rows:
        trace = traces[row]
        kept = [identity.tolist() for identity in trace.kept]
        assert min(trace.tokens_out) < trace.visual_tokens == sum(e - s for s, e in prompts.spans[row])
        expected_tokens, expected = masked_oracle(
            model,
            prompts.embeds[row],
            prompts.spans[row],
            kept,
            6,
            kept[0] if name in BEFORE_DECODER else None,
            positions == "compact",
        )
        assert tokens[row].tolist() == expected_tokens
        torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", [*METHODS, "autoprune-merging"])
def test_newlines_stay_in_every_cache_and_count_in_costs_but_not_in_means(model, name, positions):
    prompts = Prompts(model)
    if name == "autoprune-merging":
        method = AutoPrune(target_tokens=12, x0=3.0, positions=positions)
    else:
        method = build(name, positions)
    inputs = prompts.inputs([0])
    with method.attach(model) as run, torch.no_grad():
        run.set_visual(inputs["layout"], inputs["cls"] if run.needs_cls_attention else None)
        cache = model.model(inputs_embeds=inputs["embeds"], use_cache=True).past_key_values
    (trace,) = run.traces
    newlines = len(prompts.newlines[0])
    assert (trace.visual_tokens, trace.structure_tokens) == (40, newlines)
    assert trace.text_tokens == prompts.text[0] + newlines
    lengths = [cache.get_seq_length(layer) for layer in range(6)]
    assert lengths == [prompts.text[0] + newlines + tokens for tokens in trace.tokens_in]
    assert trace.kv_bytes() == sum(lengths) * 2 * 64 * 4
    assert trace.flops() == sum(4 * n * 64**2 + 2 * n * n * 64 + 3 * n * 64 * 96 for n in lengths)
    assert max(trace.tokens_in) <= 40 and trace.mean_tokens("processed") == sum(trace.tokens_in) / 6
    assert trace.to_dict()["structure_tokens"] == newlines
    assert all(int(index) < 40 for kept in trace.kept for index in kept)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_rows_of_a_batch_equal_the_samples_alone(model, name):
    prompts = Prompts(model)
    method = build(name, "compact")
    rows = [2, 0, 3, 1]
    tokens, logits, traces = generate(model, method, prompts.inputs(rows))
    for place, row in enumerate(rows):
        alone, alone_logits, (trace,) = generate(model, method, prompts.inputs([row]))
        assert traces[place].tokens_out == trace.tokens_out
        assert traces[place].structure_tokens == trace.structure_tokens == len(prompts.newlines[row])
        assert tokens[place].tolist() == alone[0].tolist()
        torch.testing.assert_close(logits[place], alone_logits[0], atol=2e-4, rtol=1e-4)


def test_text_rows_begin_behind_the_last_newline_and_attention_is_to_patches_only(model):
    prompts = Prompts(model)
    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Look(PruningMethod):
        name: ClassVar[str] = "look"

        def stages(self, num_layers):
            return {0: Rows.TEXT}

        def select(self, view, memory):
            seen["rows"], seen["attention"] = view.query_rows, view.attention_BHTV
            return None

    inputs = prompts.inputs([0])
    _, _, (trace,) = generate(model, Look(), inputs, new_tokens=1)
    assert seen["rows"] == (7,)
    with torch.no_grad():  # an independent look at layer 0, through the eager attention of the stock model
        eager = random_llama("eager")
        full = eager(inputs_embeds=inputs["embeds"], output_attentions=True).attentions[0]
    visual = [slot for start, end in prompts.spans[0] for slot in range(start, end)]
    torch.testing.assert_close(seen["attention"], full[:, :, -7:, visual], atol=1e-5, rtol=1e-4)
    assert trace.structure_tokens == 6


def test_prompt_that_ends_in_a_newline_keeps_all_patches_as_candidates(model):
    layout = VisualLayout.from_spans([[(2, 12)]], structure=[[(12, 13)]])
    embeds = torch.randn(1, 13, 64, generator=torch.Generator().manual_seed(0))
    with Dense(visual_token_num=4).attach(model) as run, torch.no_grad():
        run.set_visual(layout, torch.arange(10.0)[None])
        model(inputs_embeds=embeds)
    assert run.traces[0].visual_tokens == 10 and run.traces[0].kept[0].tolist() == [6, 7, 8, 9]


# --- the layout itself ---


def test_layout_counts():
    layout = VisualLayout.from_spans(
        [[(1, 5), (5, 7), (8, 10)], [], [(3, 4)]], lengths=[12, 3, 9], structure=[[(7, 8), (10, 11)], [], []]
    )
    assert layout.counts == (8, 0, 1) and layout.structure_counts == (2, 0, 0)
    assert layout.text_starts == (11, 0, 4)
    # (1, 5) and (5, 7) have nothing between them: two images, the second with two rows.
    assert layout.image_crops(0) == ((0,) * 4, (0,) * 4) and layout.image_crops(2) == ((0,),)
    twice = layout.expand(2)
    assert twice.text_starts == (11, 11, 0, 0, 4, 4) and twice.lengths == (12, 12, 3, 3, 9, 9)
    plain = VisualLayout.from_spans([[(1, 5)], []])
    assert plain.text_starts == (5, 0) and plain.structure_counts == (0, 0) and plain.expand(2).structure is None


@pytest.mark.parametrize(
    ("structure", "crops", "message"),
    [
        ([[(4, 6)]], None, "overlaps"),
        ([[(7, 7)]], None, "empty"),
        ([[], []], None, "2 structure"),
        (None, [[[0, 0]]], "crops of 2 tokens for 4"),
    ],
)
def test_wrong_layouts_are_refused(structure, crops, message):
    with pytest.raises(ValueError, match=message):
        VisualLayout.from_spans([[(1, 5)]], structure=structure, crops=crops)


def test_structure_outside_the_prompt_is_refused(model):
    layout = VisualLayout.from_spans([[(1, 5)]], structure=[[(5, 20)]])
    with Dense(visual_token_num=2).attach(model) as run, pytest.raises(ValueError, match="outside"):
        run.set_visual(layout, torch.rand(4))
        model(inputs_embeds=torch.randn(1, 9, 64))


# --- the cap on visual tokens per image ---


def test_quotas_are_proportional_and_add_up():
    assert crop_quotas([576] * 5, 2880) == [576] * 5
    assert crop_quotas([576] * 5, 640) == [128] * 5
    assert crop_quotas([576] * 3, 640) == [214, 213, 213]
    assert crop_quotas([16, 8, 8], 10) == [5, 3, 2]  # 5, 2.5, 2.5: the tie goes to the earlier crop
    assert crop_quotas([4, 4], 1) == [1, 0]
    for cap in range(1, 60):
        sizes = [16, 3, 11, 0, 7]
        quotas = crop_quotas(sizes, cap)
        assert sum(quotas) == min(cap, sum(sizes))
        assert all(quota <= size for quota, size in zip(quotas, sizes, strict=True))
        if cap < 37:
            assert all(abs(quota - cap * size / 37) < 1 for quota, size in zip(quotas, sizes, strict=True))


@pytest.mark.parametrize("cap", [1, 7, 20, 31])
def test_cap_takes_from_each_crop_its_strongest_tokens(model, cap):
    """Against a plain loop, on interleaved crops, two images in a prompt, rows of different make-up."""
    generator = torch.Generator().manual_seed(cap)
    first = [0] * 8 + [1, 1, 2, 2] * 5  # tiles of one raster interleave
    crops = [[first, [0] * 9], [[0] * 4 + [2, 1] * 6]]
    spans = [[(0, 28), (30, 39)], [(25, 41)]]
    cls = [torch.rand(37, generator=generator), torch.rand(16, generator=generator).mul(3).round()]  # with ties
    layout = VisualLayout.from_spans(spans, crops=crops, lengths=[45, 45])
    with Dense(visual_token_num=cap).attach(model) as run, torch.no_grad():
        run.set_visual(layout, cls)
        model(inputs_embeds=torch.randn(2, 45, 64, generator=generator))
    for row, trace in enumerate(run.traces):
        expected, offset = [], 0
        for labels in crops[row]:
            sizes = Counter(labels)
            quotas = crop_quotas([sizes[crop] for crop in sorted(sizes)], cap)
            for crop, quota in zip(sorted(sizes), quotas, strict=True):
                own = [offset + i for i, label in enumerate(labels) if label == crop]
                own.sort(key=lambda i: (-cls[row][i].item(), i))
                expected += own[:quota]
            offset += len(labels)
        assert trace.kept[0].tolist() == sorted(expected)
        assert len(expected) == sum(min(cap, len(labels)) for labels in crops[row])


def test_a_cap_counts_per_image_not_per_prompt(model):
    """576 means all tokens of an image also where a prompt has two, 2880 all whatever the number of crops."""
    layout = VisualLayout.from_spans([[(0, 10), (12, 22)]])
    with Dense(visual_token_num=10).attach(model) as run, torch.no_grad():
        run.set_visual(layout, torch.rand(20))
        model(inputs_embeds=torch.randn(1, 25, 64))
    assert run.traces[0].tokens_in == [20] * 6
