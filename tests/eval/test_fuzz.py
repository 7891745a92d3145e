"""Two thousand seeded mutations of question files, answer files and images: no hang, no traceback, no lost answer.

Everything runs in this process, so an error that is no `UserError` or `SampleError` fails the test with its seed.
"""

import io
import json
import random
import signal
from contextlib import contextmanager

import pytest
from PIL import Image

from llava.eval import eval_gqa, eval_mme, eval_pope, eval_textvqa
from llava.eval.answers import AnswerFile
from llava.eval.images import SampleError, open_image
from llava.eval.merge_answers import choose_lines, read_part
from llava.eval.questions import read_questions
from llava.eval.trace_summary import read_traces
from llava.utils import UserError
from tests.eval.helpers import TINY_DATA, write_jsonl

QUESTIONS, ANSWERS, IMAGES, SCORED = 600, 600, 600, 200
TOKENS = [b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"\r", b"\0", b",", b":", b"null", b"true", b"-1e999", b"\xff",
          b"\\ud800", b"NaN", b"1" * 5000, b"\xef\xbb\xbf", b"[" * 3000, b'"question_id"', b'"text": 5']  # fmt: skip


def mutate(content: bytes, draw: random.Random) -> bytes:
    """A few random cuts, flips, insertions and swaps."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            del data[at : at + draw.randint(1, 40)]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[at:at] = draw.choice(TOKENS)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            other = draw.randrange(len(data) + 1)
            data[at:at] = data[other : other + draw.randint(1, 200)]
        else:
            data[at : at + 4] = bytes(draw.randrange(256) for _ in range(4))
    return bytes(data)


@contextmanager
def no_hang(seconds=20):
    """Fails instead of waiting for ever."""

    def late(number, frame):
        raise AssertionError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


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
        path.write_bytes(mutate(original, random.Random(seed)))
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
        mutated = mutate(original, random.Random(seed))
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
        head = mutate(original[:200], draw)
        (tmp_path / "x.png").write_bytes(head + original[200:] if draw.random() < 0.6 else mutate(original, draw))
        with only_user_errors(seed, counts):
            image = open_image(tmp_path, "x.png", max_pixels=1_000_000)
            assert image.mode == "RGB" and image.width * image.height <= 1_000_000
    assert min(counts.values()) > 10, counts


SCORERS = {
    "pope": (eval_pope, ["--annotation-dir", "{data}/pope/coco",
                         "--question-file", "{data}/pope/llava_pope_test.jsonl"], "pope/llava_pope_test.jsonl"),
    "gqa": (eval_gqa, ["--annotation-file", "{data}/gqa/data/testdev_balanced_questions.json"],
            "gqa/llava_gqa_testdev_balanced.jsonl"),
    "textvqa": (eval_textvqa, ["--annotation-file", "{data}/textvqa/TextVQA_0.5.1_val.json"],
                "textvqa/llava_textvqa_val_v051_ocr.jsonl"),
    "mme": (eval_mme, ["--annotation-dir", "{data}/MME/MME_Benchmark_release_version",
                       "--question-file", "{data}/MME/llava_mme.jsonl"], "MME/llava_mme.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_scorers(name, tmp_path, capsys):
    """Mutated answers go through the scorers, whose own messages name what does not join."""
    module, flags, question_file = SCORERS[name]
    if not (TINY_DATA / question_file).is_file():
        pytest.skip(f"the miniature data lack {question_file}")
    counts = {"fine": 0, "refused": 0}
    with open(TINY_DATA / question_file, encoding="utf-8") as file:
        asked = [json.loads(line) for _, line in zip(range(8), file, strict=False)]
    records = [
        {"question_id": q["question_id"], "prompt": q["text"], "text": "yes", "model_id": "m", "metadata": {}}
        for q in asked
    ]
    path = tmp_path / "a.jsonl"
    original = write_jsonl(path, records).read_bytes()
    flags = [flag.format(data=TINY_DATA) for flag in flags]
    for seed in range(SCORED // len(SCORERS)):
        path.write_bytes(mutate(original, random.Random(1000 + seed)))
        with only_user_errors(seed, counts):
            module.main([*flags, "--result-file", str(path)])
    capsys.readouterr()
    assert sum(counts.values()) == SCORED // len(SCORERS)


def test_traces(tmp_path):
    counts = {"fine": 0, "refused": 0}
    line = {"question_id": 1, "prompt": "?", "visual_tokens": 4, "tokens_out": [3, 2], "flops": 5, "dense_flops": 9}
    line |= {"mutual_information": {"layer0": 0.1, "layer1": 0.2}, "slope": 0.3, "prefill_seconds": 0.1}
    path = tmp_path / "t.jsonl"
    original = write_jsonl(path, [line] * 5).read_bytes()
    for seed in range(200):
        path.write_bytes(mutate(original, random.Random(seed)))
        with only_user_errors(seed, counts):
            read_traces(str(path)).summary(4)
    assert min(counts.values()) > 10, counts
