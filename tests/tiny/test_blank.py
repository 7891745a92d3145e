"""Stage `blank`: the prompts it draws are those that other programs write, and its targets are the usual answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from playground.tiny.train import blank, export, text
from playground.tiny.train.common import train_rng
from playground.tiny.train.extend import mixture
from tests.tiny.prompts import of_vlmevalkit

QUESTION = "How many stars are there?\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module", params=[False, True], ids=["few patches", "all patches"])
def batch(request) -> blank.Batch:
    return blank.draw_batch(train_rng("test"), 3, 300, request.param, mixture())


def answers(data: blank.packing.Pack) -> list[list[int]]:
    return [data.targets[data.owner == k].tolist() for k in range(len(data.kinds))]


def asked(data: blank.packing.Pack) -> list[str]:
    """The text in front of every answer, from the head on, the picture left out."""
    out = []
    for place in data.rows.tolist():
        row, column = divmod(place, data.ids.shape[1])
        seen = (data.segment[row] == data.segment[row, column]) | (data.segment[row] == 0)
        ids = data.ids[row][seen & (data.visual[row] < 0) & (torch.arange(len(seen)) <= column)]
        out.append(text.tokenizer().decode(ids, skip_special_tokens=True))
    return out


def test_other_prompts_have_the_same_answers(batch: blank.Batch) -> None:
    assert answers(batch.usual) == answers(batch.asked)
    assert batch.usual.kinds == batch.asked.kinds


def test_prompts_end_with_a_blank_where_the_batch_says_so(batch: blank.Batch) -> None:
    usual, other = asked(batch.usual), asked(batch.asked)
    first = torch.isin(batch.asked.where, batch.asked.rows)
    behind = batch.behind[first].tolist()
    assert any(behind) and not all(behind) and not batch.behind[~first].any()
    assert all(prompt.endswith("ASSISTANT:") for prompt in usual)
    assert [prompt.endswith("ASSISTANT: ") for prompt in other] == behind
    for was, is_now in zip(usual, other, strict=True):
        if "human" not in is_now:
            assert is_now.removesuffix(" ") == was


@pytest.mark.parametrize(("answer", "kept"), [("red", 2), ("Yes", 2), ("2", 2)])
def test_ids_are_those_of_the_prompt_of_vlmevalkit(answer: str, kept: int) -> None:
    head, tail = (text.tokenizer()(part).input_ids for part in of_vlmevalkit(QUESTION).split("<image>"))
    assert list(blank.other_head()) == head
    ours = list(blank.other_tail(QUESTION, answer))
    assert ours[: len(tail) - 1] == tail[1:]
    said = ours[len(tail) - 1 :]
    assert len(said) == kept and said[-1] == 2
    assert text.tokenizer().decode(said[:-1]).strip() == answer


def test_a_digit_begins_with_the_blank() -> None:
    digit, word = (text.tail_ids(QUESTION, answer) for answer in ("2", "red"))
    assert blank.with_blank(*digit) == digit[0]
    assert blank.with_blank(*word) == (*word[0][: -word[1]], blank.token_of(" "), *word[0][-word[1] :])


def test_one_short_run_lets_only_the_blank_learn_first(tmp_path, monkeypatch) -> None:
    """With all of the time `alone` nothing but the embedding of the blank moves."""
    monkeypatch.setattr(blank, "Log", lambda name: None)
    model, before = export.load(), export.load()
    blank.train_blank(model, tmp_path, minutes=0.01, batch=1, tokens=60, full_share=0.0, alone=1.0)
    saved = torch.load(tmp_path / "blank.pt")
    assert saved["step"] >= 1
    was, now = before.decoder.state_dict(), {k.removeprefix("decoder."): v for k, v in saved["model"].items()}
    words = ("model.embed_tokens.weight", "lm_head.weight")  # one matrix
    assert [name for name, value in was.items() if not torch.equal(value, now[name])] == list(words)
    rows = (was[words[0]] != now[words[0]]).any(1)
    assert np.flatnonzero(rows.numpy()).tolist() == [blank.token_of(" ")]
