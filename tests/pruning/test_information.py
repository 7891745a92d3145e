"""Mutual information against recorded values and against its textbook identity."""

from __future__ import annotations

import pytest
import torch

from llava.pruning import mutual_information


def test_goldens(golden):
    facts, arrays = golden("pure_functions")
    for name, fact in facts["mutual_information"].items():
        value = mutual_information(torch.from_numpy(arrays[f"{name}/attn"]))
        assert value.item() == pytest.approx(fact["mi"], abs=1e-6)


def test_without_epsilon_it_is_the_mean_divergence_of_columns():
    attention = torch.rand(9, 17, dtype=torch.float64) / 40
    share = attention / attention.sum(0)
    divergence = (share * (share * len(share)).log2()).sum(0)
    expected = (attention.mean(0) * divergence).sum()
    assert mutual_information(attention, eps=1e-300).item() == pytest.approx(expected.item(), rel=1e-9)


def test_leading_axes_are_independent():
    attention = torch.rand(3, 4, 5, 8) / 30
    values = mutual_information(attention)
    assert values.shape == (3, 4)
    assert values[2, 1].item() == pytest.approx(mutual_information(attention[2, 1]).item(), rel=1e-6)


def test_padding_rows_and_columns_contribute_nothing():
    attention = torch.rand(2, 4, 5, 8) / 30
    padded = torch.zeros(2, 4, 9, 13)
    padded[:, :, -5:, :8] = attention
    rows = torch.full((2, 1), 5)
    torch.testing.assert_close(mutual_information(padded, text_rows=rows), mutual_information(attention))


def test_half_precision_is_widened():
    attention = (torch.rand(6, 300) / 900).half()
    assert mutual_information(attention).dtype == torch.float32
    assert mutual_information(attention) == mutual_information(attention.float())


def test_one_text_row_gives_a_tiny_negative_number():
    value = mutual_information(torch.rand(1, 64) / 64).item()
    assert -1e-3 < value < 0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (5,)])
def test_empty_input_is_refused(shape):
    with pytest.raises(ValueError, match="T, V >= 1"):
        mutual_information(torch.zeros(shape))
