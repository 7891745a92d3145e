"""The Triton candidate against the engine's own operations, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton (Linux)")

_CHECK = """
import torch
from benchmarks.fused import score_select_move
from llava.pruning.scores import attention_rows, causal_bias
from llava.pruning.selection import descending_order, first_in_sequence_order, merge_all

generator = torch.Generator().manual_seed(0)
cases = [(1, 4, 4, 9, 70, 48, 5, 20, 7), (2, 4, 2, 17, 150, 100, 0, 99, 1), (1, 2, 2, 5, 50, 30, 10, 12, 0),
         (2, 2, 1, 3, 33, 29, 1, 0, 9)]
for batch, heads, groups, rows, keys, visual, first, keep, recycle in cases:
    query = torch.randn(batch, heads, rows, 16, generator=generator) * 2
    key = torch.randn(batch, groups, keys, 16, generator=generator)
    hidden = torch.randn(batch, keys, 40, generator=generator)
    attention = attention_rows(query, key, 0.25, causal_bias(rows, query.device))[..., first : first + visual]
    order = descending_order(attention.mean((1, 2)), (visual,) * batch)
    kept = first_in_sequence_order(order, (keep,) * batch)
    recycled = order[:, keep : keep + recycle]

    def of(index):
        return hidden[:, first : first + visual].gather(1, index[..., None].expand(-1, -1, 40))

    merged = [merge_all(of(recycled), [recycle] * batch)] if recycle else []
    wanted = torch.cat((hidden[:, :first], of(kept), *merged, hidden[:, first + visual :]), 1)
    for move in (True, False):
        moved, ids = score_select_move(query, key, 0.25, hidden, first, visual, keep, recycle, move=move)
        assert torch.equal(ids, torch.cat((kept, recycled), 1)), (ids, kept, recycled)
        torch.testing.assert_close(moved, wanted)
print("equal")
"""


def test_one_launch_does_what_the_engine_does():
    # In a process of its own: Triton reads the variable when the kernels are defined.
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CHECK], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr
