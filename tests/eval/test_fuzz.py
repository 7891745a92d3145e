"""Thousands of seeded mutations of every file that the evaluation reads: no hang, no traceback, no lost answer.

Everything runs in this process. `python -m tests.fuzzing` does the same with more mutations and other seeds, and prints
the figures that docs/reliability.md quotes.
"""

import io
import random
from contextlib import contextmanager

import pytest
from PIL import Image

from llava.eval.answering.answer_file import AnswerFile
from llava.eval.answering.answerer import SampleError, open_image
from llava.eval.answering.merging import choose_lines, read_part
from llava.eval.common.questions import read_questions
from llava.utils import UserError
from tests.eval.fuzz_targets import TARGETS
from tests.eval.helpers import write_jsonl
from tests.fuzzing import Figures, fuzz, mutate, mutate_bytes, no_hang

QUESTIONS, ANSWERS, IMAGES, READERS, SEED = 600, 500, 500, 3600, 0


@contextmanager
def only_user_errors(seed, counts):
    try:
        with no_hang():
            yield
        counts["fine"] += 1
    except (UserError, SampleError) as error:
        counts["refused"] += 1
        assert str(error) and "\n" not in str(error), (seed, error)
    except SystemExit as error:
        counts["refused"] += 1
        assert error.code == 2, seed
    except AssertionError:
        raise
    except BaseException as error:
        raise AssertionError(f"mutation {seed}: {type(error).__name__}: {error}") from error


RECORDS = [
    {"question_id": i, "image": f"{i}.png", "text": f"What is it? \u00e4\u4e2d {i}", "category": "x"} for i in range(12)
]


def test_question_files(tmp_path):
    path, counts = tmp_path / "q.jsonl", {"fine": 0, "refused": 0}
    original = write_jsonl(path, RECORDS).read_bytes()
    for seed in range(QUESTIONS):
        path.write_bytes(mutate(path.name, original, random.Random(seed)))
        with only_user_errors(seed, counts):
            questions = read_questions(path)
            again = list(questions)  # what is read line by line is what is read by position
            assert [questions[i] for i in range(len(questions))] == again
            assert all(isinstance(q.text, str) and q.index == i for i, q in enumerate(again))
    assert min(counts.values()) > 10, counts


def test_answer_files_lose_nothing(tmp_path):
    """A mutated file is either refused untouched, or continued with every whole line that was in it."""
    questions = read_questions(write_jsonl(tmp_path / "q.jsonl", RECORDS))
    path, counts = tmp_path / "a.jsonl", {"fine": 0, "refused": 0}
    metadata = {"method": "dense"}
    answers = AnswerFile(path, "m", metadata)
    answers.open()
    for question in questions:
        answers.append(question, f"answer {question.id}", {"visual": 4, "nominal": 2.0, "processed": 3.0})
    answers.close(questions)
    original = path.read_bytes()
    for seed in range(ANSWERS):
        mutated = mutate(path.name, original, random.Random(seed))
        path.write_bytes(mutated)
        with only_user_errors(seed, counts):
            try:
                answers = AnswerFile(path, "m", metadata)
            except UserError:
                assert path.read_bytes() == mutated, f"mutation {seed}: a refused file was changed"
                raise
            pending = list(answers.pending(questions))
            answers.open()
            for question in pending:
                answers.append(question, "new")
            answers.close(questions)
            kept = path.read_bytes().split(b"\n")
            whole = [line for line in mutated[: mutated.rfind(b"\n") + 1].split(b"\n") if line.strip()]
            assert set(whole) <= set(kept), f"mutation {seed}: an answer is lost"
            part = read_part(path)
            assert choose_lines(questions, [part], allow_missing=False, keep_others=True)[1] == 0
    assert min(counts.values()) > 10, counts


def test_images(tmp_path):
    counts = {"fine": 0, "refused": 0}
    originals = []
    picture = Image.effect_noise((48, 40), 60)
    for kind, mode in (("PNG", "RGB"), ("JPEG", "L"), ("GIF", "P"), ("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB")):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, kind)
        originals.append(buffer.getvalue())
    for seed in range(IMAGES):
        draw = random.Random(seed)
        # The beginning holds sizes and tables: that is where decoders go wrong.
        original = originals[seed % len(originals)]
        head = mutate_bytes(original[:200], draw)
        (tmp_path / "x.png").write_bytes(head + original[200:] if draw.random() < 0.6 else mutate_bytes(original, draw))
        with only_user_errors(seed, counts):
            image = open_image(tmp_path, "x.png", max_pixels=1_000_000)
            assert image.mode == "RGB" and image.width * image.height <= 1_000_000
    assert min(counts.values()) > 10, counts


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_readers(target, tmp_path, monkeypatch, capsys):
    """Every mutated file is read or refused in one line, and what is refused leaves no half-written file behind."""
    monkeypatch.chdir(tmp_path)
    figures = Figures()
    fuzz(target, tmp_path, round(READERS * target.weight / sum(t.weight for t in TARGETS)), SEED, figures)
    capsys.readouterr()
    print(f"{target.name}: {figures}")
    if target.name != "tiles":  # a guess that takes everything
        assert figures.refused > 5, "mutations that nothing notices test nothing"
    assert not list(tmp_path.glob("out/.*.tmp")), "a temporary file is left"
