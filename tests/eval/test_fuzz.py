"""Some thousand seeded mutations of question files, answer files and images: no hang, no traceback, no lost answer.

Everything runs in this process, so an error that is no `UserError` or `SampleError` fails the test with its seed.
"""

import io
import json
import random
import runpy
import signal
from contextlib import contextmanager

import pytest
from PIL import Image

from llava.eval import (
    eval_gqa,
    eval_mmbench,
    eval_mme,
    eval_mmvet,
    eval_pope,
    eval_science_qa,
    eval_textvqa,
    eval_vqa,
)
from llava.eval.answers import AnswerFile
from llava.eval.images import SampleError, open_image
from llava.eval.merge_answers import choose_lines, read_part
from llava.eval.questions import read_questions
from llava.eval.reports.trace_summary import read_traces
from llava.utils import UserError
from tests.eval.helpers import ROOT, TINY_DATA, answer, write_json, write_jsonl

QUESTIONS, ANSWERS, IMAGES, SCORED, SMALL = 600, 600, 600, 200, 40
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
        assert error.code in (2, 3), seed  # 3: done, something left out
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


# Small benchmarks with every kind of file: name -> content. What a tool reads is mutated, one file at a time.
TSV = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category\tsplit\n" + "".join(
    f'{index}\t"Which\none?"\tnan\tcat\tdog\t\t\t{letter}\tanimals\tAAAA\tall\tdev\n'
    for index, letter in ((0, "A"), (1, "B"), (1_000_000, "B"), (1_000_001, "A"))
)
PROBLEM = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "image": "i.png", "subject": "nature"}
ANNOTATED = {"question_id": 1, "answer_type": "other", "answers": [{"answer": "a red dog", "answer_id": 1}] * 10}
FILES = {
    "answers.jsonl": [
        answer(i, text, "Which?\n<image>")
        for i, text in enumerate(("A", "B. dog", "The answer is C.", "None of them, isn't it?"))
    ] + [{**answer(1_000_000, "B"), "round_id": 1, "options": ["dog", "cat"], "option_char": ["B", "A"]}],
    "questions.jsonl": [{"question_id": i, "image": f"{i}.png", "text": "Which?"} for i in range(4)],
    "problems.json": {str(i): PROBLEM for i in range(4)},
    "pid_splits.json": {"test": ["0", "1", "2"]},
    "rows.tsv": TSV,
    "mm-vet.json": {f"v1_{i}": {"question": "?", "answer": "a", "capability": ["rec", "ocr"]} for i in range(4)},
    "grades.json": {f"v1_{i}": {"score": [0.5, 1.0], "content": ["0.5", "1"]} for i in range(4)},
    "plain_grades.json": {f"v1_{i}": 0.25 for i in range(4)},
    "vqa.json": {"annotations": [{**ANNOTATED, "question_id": i} for i in range(4)]},
    "vizwiz.json": [{**ANNOTATED, "image": f"{i}.png"} for i in range(4)],
    "upload.json": [{"question_id": i, "answer": "dog"} for i in range(4)],
    "questions.json": {
        str(i): {"question": "Which?", "answer": "dog", "isBalanced": True, "types": {"structural": "query"}}
        for i in range(4)
    },
    "predictions.json": [{"questionId": str(i), "prediction": "dog"} for i in range(4)],
    "SEED-Bench.json": {
        "question_type": {"Scene": 1, "Action": 2},
        "questions": [
            {"question_id": i, "question_type_id": 1 + i % 2, "answer": "A", "data_type": "image"} for i in range(4)
        ],
    },
}  # fmt: skip
# The tool and its flags; `@` stands before files that are read, `>` before what is written.
TOOLS = [
    (eval_science_qa.main, "--base-dir . --result-file @answers.jsonl --output-file >o --output-result >r --json >j",
     "problems.json pid_splits.json"),
    (eval_mmbench.main, "--annotation-file @rows.tsv --result-file @answers.jsonl --json >j", ""),
    (eval_mmvet.main, "--annotation-file @mm-vet.json --result-file @grades.json --json >j", ""),
    (eval_mmvet.main, "--annotation-file @mm-vet.json --result-file @plain_grades.json --json >j", ""),
    (eval_vqa.main, "--annotation-file @vqa.json --result-file @answers.jsonl --json >j", ""),
    (eval_vqa.main, "--annotation-file @vizwiz.json --question-file @questions.jsonl --result-file @answers.jsonl", ""),
    (eval_vqa.main, "--annotation-file @vqa.json --result-file @upload.json", ""),
    (eval_gqa.main, "--annotation-file @questions.json --result-file @predictions.json --json >j", ""),
    ("gqa_for_eval", "--src @answers.jsonl --dst >u", ""),
    ("mmvet_for_eval", "--src @answers.jsonl --dst >u", ""),
    ("vizwiz_for_submission",
     "--annotation-file @questions.jsonl --result-file @answers.jsonl --result-upload-file >u", ""),
    ("vqav2_for_submission",
     "--question-file @questions.jsonl --result-file @answers.jsonl --result-upload-file >u", ""),
    ("seed_for_submission",
     "--annotation-file @SEED-Bench.json --result-file @answers.jsonl --result-upload-file >u --json >j", ""),
    ("mmbench_for_submission",
     "--annotation-file @rows.tsv --result-dir . --upload-dir >u --experiment answers", "answers.jsonl"),
    ("sqa_to_llava", "--base-dir . --prompt-format QCM-LEPA", "problems.json pid_splits.json"),
]  # fmt: skip


def write_small(folder, name):
    content = FILES[name]
    if isinstance(content, str):
        (folder / name).write_text(content, encoding="utf-8", newline="")
    elif name.endswith(".jsonl"):
        write_jsonl(folder / name, content)
    else:
        write_json(folder / name, content)
    return folder / name


@pytest.mark.parametrize("number", range(len(TOOLS)))
def test_scorers_and_converters_on_every_file_they_read(number, tmp_path, capsys, monkeypatch):
    """What is refused says so in one line and leaves no upload behind; the intact files pass."""
    tool, flags, more = TOOLS[number]
    if isinstance(tool, str):
        tool = runpy.run_path(str(ROOT / "scripts" / f"convert_{tool}.py"))["main"]
    monkeypatch.chdir(tmp_path)
    read = [flag[1:] for flag in flags.split() if flag[0] == "@"] + more.split()
    argv = [flag.lstrip("@").replace(">", "out/") for flag in flags.split()]
    for name in read:
        write_small(tmp_path, name)
    tool(argv)
    counts = {"fine": 0, "refused": 0}
    for name in read:
        path = tmp_path / name
        original = path.read_bytes()
        for seed in range(SMALL):
            path.write_bytes(mutate(original, random.Random(2000 + seed)))
            with only_user_errors((name, seed), counts):
                tool(argv)
        path.write_bytes(original)
    capsys.readouterr()
    assert counts["refused"] > 10, counts
    assert not list(tmp_path.glob("out/.*")), "a temporary file is left"


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
