"""TextVQA scorer: published digits, prompt layouts, joining, bad input."""

import json

import pytest

from llava.eval import eval_textvqa
from llava.eval.tasks import textvqa as textvqa_task
from tests.eval.helpers import SHARED, answer, fails_with_one_line, needs_shared, write_json, write_jsonl


@needs_shared
def test_published_answers_give_the_published_digits(tmp_path, capsys):
    out = tmp_path / "textvqa.json"
    eval_textvqa.main(
        ["--annotation-file", f"{SHARED}/textvqa/TextVQA_0.5.1_val.json", "--json", str(out)]
        + ["--result-file", f"{SHARED}/textvqa/answers/llava-v1.5-13b.jsonl"]
    )
    printed = capsys.readouterr()
    assert printed.out == "llava-v1.5-13b\nSamples: 5000\nAccuracy: 61.25%\n\n" and printed.err == ""
    result = json.loads(out.read_text())
    assert result["accuracy"] == pytest.approx(61.254, abs=1e-6)
    assert (result["samples"], result["missing"], result["unmatched"]) == (5000, 0, 0)


@pytest.mark.parametrize(
    "prompt",
    [
        "What IS it?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "Reference OCR token: A, B\nWhat IS it?\nAnswer the question using a single word or phrase.",
        "What IS it?\nAnswer the question using a single word or phrase.",
        "OCR tokens: A, B. Question: What IS it? Short answer:",
        "What IS it?",
    ],
)
def test_prompt_layouts(prompt):
    assert textvqa_task.question_of_prompt(prompt) == "what is it?"


ANNOTATIONS = [
    {"image_id": "x", "question": "what word?", "answers": ["stop"] * 10, "question_id": 1},
    {"image_id": "x", "question": "what color?", "answers": ["red"] * 3 + ["dark red"] * 7, "question_id": 2},
]


def test_two_questions_of_an_image_are_told_apart():
    answers = [answer("x", "Red", "What color?\nAnswer"), answer("x", "Stop", "What word?\nAnswer")]
    result = textvqa_task.textvqa_accuracy(ANNOTATIONS, answers)
    assert result["accuracy"] == pytest.approx(95.0)  # (0.9 + 1) / 2
    assert result["coverage"].complete


def test_unmatched_and_missing_are_counted():
    answers = [answer("x", "stop", "What word?\nAnswer"), answer("y", "stop", "What word?\nAnswer")]
    coverage = textvqa_task.textvqa_accuracy(ANNOTATIONS, answers)["coverage"]
    assert coverage.to_dict() == {"expected": 2, "scored": 1, "missing": 1, "duplicate": 0, "unmatched": 1}


def test_result_dir_scores_every_file(tmp_path, capsys):
    annotation = write_json(tmp_path / "val.json", {"data": ANNOTATIONS})
    for name in ("a", "b"):
        write_jsonl(tmp_path / "answers" / f"{name}.jsonl", [answer("x", "stop", "What word?\nAnswer")])
    eval_textvqa.main(["--annotation-file", str(annotation), "--result-dir", str(tmp_path / "answers")])
    assert capsys.readouterr().out == "a\nSamples: 1\nAccuracy: 100.00%\n\nb\nSamples: 1\nAccuracy: 100.00%\n\n"


def test_a_literal_backslash_n_behind_the_question(tmp_path):
    annotations = [{"image_id": "x", "question": text, "answers": ["stop"] * 10} for text in ("what", "what word?")]
    annotations.append({"image_id": "y", "question": "what word is it?", "answers": ["go"] * 10})
    prompt = "What word?\\nReference OCR token: what, stop\\nAnswer the question"
    result = textvqa_task.textvqa_accuracy(annotations, [answer("x", "stop", prompt), answer("y", "go", prompt)])
    assert (result["samples"], result["accuracy"]) == (1, 100.0)
    assert result["coverage"].unmatched == ["y"], "another image, whose question only begins alike"


def test_bad_input(tmp_path, capsys):
    annotation = write_json(tmp_path / "val.json", {"data": ANNOTATIONS})
    answers = write_jsonl(tmp_path / "a.jsonl", [answer("x", "stop", "What word?\nAnswer")])
    main = eval_textvqa.main
    fails_with_one_line(main, ["--annotation-file", annotation], capsys, "--result-file")
    fails_with_one_line(
        main, ["--annotation-file", annotation, "--result-file", tmp_path / "n"], capsys, tmp_path / "n"
    )
    fails_with_one_line(main, ["--annotation-file", answers, "--result-file", answers], capsys, "a.jsonl")
    wrong = write_json(tmp_path / "wrong.json", {"data": [{"image_id": 1}]})
    fails_with_one_line(main, ["--annotation-file", wrong, "--result-file", answers], capsys, "data[0]")
    broken = tmp_path / "broken.json"
    broken.write_text('{"data": [\n}')
    fails_with_one_line(main, ["--annotation-file", broken, "--result-file", answers], capsys, "broken.json:2")
