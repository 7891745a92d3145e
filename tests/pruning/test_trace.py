"""Accounting by hand."""

from __future__ import annotations

import json

import pytest
import torch

from llava.pruning import Trace, retention_schedule
from llava.pruning.engine.trace import DecoderShape

SEVEN_B = DecoderShape(num_layers=32, hidden_size=4096, intermediate_size=11008, key_value_size=4096, bytes_per_value=2)


def trace_of(counts, visual, text, shape=SEVEN_B) -> Trace:
    return Trace(
        shape=shape, text_tokens=text, visual_tokens=visual, tokens_in=[visual, *counts[:-1]], tokens_out=list(counts)
    )


def test_costs_of_a_small_decoder_by_hand():
    shape = DecoderShape(num_layers=2, hidden_size=8, intermediate_size=16, key_value_size=4, bytes_per_value=2)
    trace = trace_of([6, 3], visual=10, text=5, shape=shape)
    # n = 15 then 11: queries and output 2nd^2, keys and values of half the width nd^2, 2n^2d, 3ndm
    first = 3 * 15 * 64 + 2 * 225 * 8 + 3 * 15 * 8 * 16
    second = 3 * 11 * 64 + 2 * 121 * 8 + 3 * 11 * 8 * 16
    assert trace.flops() == first + second and trace.dense_flops() == 2 * first
    assert trace.kv_bytes() == 2 * (15 + 11) * 4 * 2
    whole = DecoderShape(num_layers=2, hidden_size=8, intermediate_size=16, key_value_size=8, bytes_per_value=2)
    assert whole.layer_flops(15) == 4 * 15 * 64 + 2 * 225 * 8 + 3 * 15 * 8 * 16  # the paper's formula
    wide = DecoderShape(2, 8, 16, 4, 2, query_size=12)  # heads wider than the hidden size, as in Qwen3
    assert wide.layer_flops(15) == 2 * 15 * 8 * (12 + 4) + 2 * 225 * 12 + 3 * 15 * 8 * 16
    assert trace.mean_tokens("nominal") == 4.5 and trace.mean_tokens("processed") == 8.0


@pytest.mark.parametrize(("target", "processed"), [(64, 81.8), (128, 145.6), (192, 209.5)])
def test_published_geometry(target, processed):
    """The processed mean is T + (N - tokens leaving the last layer) / L."""
    trace = trace_of(retention_schedule(32, 576, target, 0.2), visual=576, text=60)
    assert trace.mean_tokens("nominal") == pytest.approx(target, abs=0.05)
    assert trace.mean_tokens("processed") == pytest.approx(processed, abs=0.06)


def test_visual_flops_of_the_paper_at_64_tokens():
    trace = trace_of(retention_schedule(32, 576, 64, 0.2), visual=576, text=0)
    assert trace.dense_flops() == pytest.approx(3.82e12, rel=2e-3)
    assert trace.flops() / trace.dense_flops() == pytest.approx(0.14, abs=2e-3)


def test_json_round_trip():
    trace = trace_of([6, 3], 10, 5)
    trace.details = {"slope": 0.2, "mutual_information": {"layer0": 0.1, "layer1": 1.0}, "merge_flops": 7}
    trace.scoring_flops = 5
    trace._origins = lambda: [torch.arange(6), torch.tensor([0, 4, -1])]
    facts = json.loads(json.dumps(trace.to_dict(kept=True)))
    assert facts["kept"][1] == [0, 4, -1] and facts["slope"] == 0.2 and facts["selection_flops"] == 12
    assert "kept" not in trace.to_dict()
    assert trace.slope == 0.2 and trace.mutual_information["layer1"] == 1.0


def test_unknown_mean_is_refused():
    with pytest.raises(ValueError, match="nominal"):
        trace_of([6, 3], 10, 5).mean_tokens("average")
