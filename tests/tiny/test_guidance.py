"""What training points at: the places of names, options, letters and Chinese words among the token ids."""

from __future__ import annotations

import numpy as np
import torch

from playground.tiny.train import extend, guidance, packing, text
from playground.tiny.train.packing import attributes
from playground.tiny.world import chinese, formats
from playground.tiny.world.questions import Question
from playground.tiny.world.scenes import sample_scene


def drawn(count: int = 25) -> list[Question]:
    rng = np.random.default_rng(12)
    out = []
    for _ in range(count):
        scene = sample_scene(rng, 4, 6, held_out=False)
        makers = [
            *formats.CHOICES.values(),
            *chinese.CHOICES.values(),
            formats.vizwiz,
            *(m for m, _ in formats.OPEN.values()),
        ]
        out += [question for make in makers if (question := make(scene, rng)) is not None]
        out.append(formats.hinted(formats.text_only(rng), rng, "Context: "))
    return out


def said_before(question: Question, place: int) -> str:
    """The text up to and including the token at a place behind the picture."""
    ids, _ = text.tail_ids(question.text, question.answer, question.picture)
    return text.tokenizer().decode(ids[: place + 1])


def test_token_ends_find_names_options_and_letters() -> None:
    seen = set()
    for question in drawn():
        seen.add(question.kind)
        ends = text.token_ends(question.text, question.picture)
        for (last, letter), option, mark in zip(guidance.option_ends(question), question.options, "ABCD", strict=False):
            assert said_before(question, ends[last]).endswith(f"\n{mark}. {option}")
            assert said_before(question, ends[letter]).endswith(f"\n{mark}")
        offset = len(question.lead) + 1 if question.lead else 0
        for name, _ in question.names:
            place = ends[offset + question.question.index(name) + len(name)]
            assert said_before(question, place).endswith(name)
        for end, english in guidance.words_of(question):
            chinese_words = {**chinese.MEANING, **chinese.ANSWERS}
            assert any(w == english and said_before(question, ends[end]).endswith(c) for c, w in chinese_words.items())
    assert any(kind.startswith("zh_") for kind in seen) and "text" in seen and "open_word_color" in seen


def test_a_packed_batch_points_at_its_own_tokens() -> None:
    rng = np.random.default_rng(13)
    _, data = extend.draw_batch(rng, 4, 260, False, extend.mixture())
    flat, tokenizer = data.ids.flatten(), text.tokenizer()
    assert len(data.letters) == len(data.lettered) > 0 and len(data.chosen) > 0 and len(data.meanings) > 0
    marks = tokenizer.convert_ids_to_tokens(flat[data.letters[:, 1]].tolist())
    assert set(marks) <= set("ABCD")
    answers = tokenizer.convert_ids_to_tokens(data.lettered[:, 1].tolist())
    assert answers == ["▁" + mark for mark in marks], "an option answers with its own letter"
    # The answering place is followed by the letter of the option it should look at.
    first = {
        int(row): token for row, token in zip(data.chosen[:, 0], flat[data.chosen[:, 0] + 1].tolist(), strict=True)
    }
    letter_of = {int(last): int(token) for last, token in data.lettered}
    for row, last in data.chosen.tolist():
        assert first[row] == letter_of[last]
    assert (data.visual[-1] == -1).all(), "the last row has no picture"


def test_losses_fall_when_attention_is_right() -> None:
    """`saying_loss` and `pointing_loss` on a decoder that already does what they ask are near zero, else not."""

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Module()
            self.model.norm = torch.nn.Identity()
            self.lm_head = torch.nn.Linear(8, 8, bias=False)
            torch.nn.init.eye_(self.lm_head.weight)

    hidden = 20 * torch.eye(8)[None]
    right = torch.tensor([[2, 2], [5, 5]])
    wrong = torch.tensor([[2, 3], [5, 4]])
    decoder = Decoder()
    assert guidance.saying_loss(decoder, hidden, right) < 1e-3 < 5 < guidance.saying_loss(decoder, hidden, wrong)


def test_rows_without_a_picture_are_packed_as_they_are_asked() -> None:
    question = formats.text_only(np.random.default_rng(1))
    data = packing.pack([np.arange(0)], [[question]], np.zeros(1, dtype=bool))
    length = int((data.positions[0] > 0).sum()) + 1
    whole = text.tokenizer()(text.prompt_of(question.text, question.answer, picture=False)).input_ids
    assert data.ids[0, :length].tolist() == whole
    assert data.positions[0, :length].tolist() == list(range(length))


def test_mixture_knows_every_format() -> None:
    rng = np.random.default_rng(14)
    kinds, weights = set(), [w for _, w in extend.mixture()]
    assert abs(sum(weights) - 100) < 1e-6
    for _ in range(60):
        scene = sample_scene(rng, 4, 6, held_out=False)
        assert attributes(scene).shape == (576, 6)
        kinds |= {q.kind for q in extend.sample(scene, rng, 300, extend.mixture())}
    assert {"choice_color", "zh_color", "vizwiz", "vizwiz_no", "open_color", "describe", "count", "relation"} <= kinds
