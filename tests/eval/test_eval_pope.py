"""POPE scorer: published digits, reading of answers, joining, bad input."""

import json
from pathlib import Path

import pytest

from llava.eval import eval_pope
from llava.eval.tasks import pope as pope_task
from tests.eval.helpers import SHARED, answer, fails_with_one_line, needs_shared, write_jsonl


@needs_shared
def test_published_answers_give_the_published_digits(tmp_path, capsys):
    out = tmp_path / "pope.json"
    eval_pope.main(
        ["--annotation-dir", f"{SHARED}/pope/coco", "--question-file", f"{SHARED}/pope/llava_pope_test.jsonl"]
        + ["--result-file", f"{SHARED}/pope/answers/llava-v1.5-13b.jsonl", "--json", str(out)]
    )
    result = json.loads(out.read_text())
    expected = {
        "adversarial": (1182, 117, 1383, 318, 0.855, 0.9099307159353349, 0.788, 0.8445873526259379, 0.433),
        "random": (1182, 31, 1379, 318, 0.8800687285223368, 0.9744435284418796, 0.788, 0.8713601179506082,
                   0.4168384879725086),
        "popular": (1182, 59, 1441, 318, 0.8743333333333333, 0.9524576954069299, 0.788, 0.8624589565851879,
                    0.4136666666666667),
    }  # fmt: skip
    names = ("tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1", "yes_ratio")
    for category, values in expected.items():
        assert [result[f"{name}_{category}"] for name in names] == pytest.approx(values, abs=1e-12)
    assert result["f1_mean"] == pytest.approx(0.8594688090539112, abs=1e-12)
    printed = capsys.readouterr()
    assert "Category: random, # samples: 2910" in printed.out
    assert "F1 score: 0.8445873526259379" in printed.out
    assert "0.845, 0.855, 0.910, 0.788, 0.433" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("text", "no"),
    [
        ("No", True), ("no", True), ("No, there is not", True), ("There is not a dog", True), ("No.", True),
        ("NO", False), ("No!", False), ("No;", False), ("None", False), ("It isn't", False),
        ("cannot", False), ("No\nmore", False), ("Yes. No", False), ("", False), ("I see,no dog", False),
        ("yes, no", True),
    ],
)  # fmt: skip
def test_reading_of_answers(text, no):
    assert pope_task.says_no(text) is no


def test_scores_by_hand():
    scores = pope_task.pope_scores([True, True, True, False, False], ["Yes", "Yes", "No", "Yes", "No"])
    assert (scores["tp"], scores["fp"], scores["tn"], scores["fn"]) == (2, 1, 1, 1)
    assert scores["accuracy"] == pytest.approx(0.6)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(2 / 3)
    assert scores["yes_ratio"] == pytest.approx(0.6)
    assert pope_task.pope_scores([False], ["no"])["f1"] == 0.0


def make_files(folder, answers):
    """Two categories with two questions each; ids restart in the label files as in the real ones."""
    questions = []
    for offset, category in ((0, "adversarial"), (10_000_000, "random")):
        labels = []
        for i, (thing, label) in enumerate((("cat", "yes"), ("car", "no")), start=1):
            text = f"Is there a {thing} in the image?"
            labels.append({"question_id": i, "image": "a.jpg", "text": text, "label": label})
            questions.append(
                {
                    "question_id": offset + i,
                    "image": "a.jpg",
                    "text": f"{text}\nAnswer.",
                    "category": category,
                }
            )
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(folder / "q.jsonl", questions)
    write_jsonl(folder / "a.jsonl", answers)
    return [
        "--annotation-dir",
        folder / "coco",
        "--question-file",
        folder / "q.jsonl",
        "--result-file",
        folder / "a.jsonl",
    ]


ANSWERS = [answer(1, "Yes"), answer(2, "No"), answer(10_000_001, "No"), answer(10_000_002, "No")]


def test_answers_join_by_id_whatever_their_order(tmp_path):
    argv = make_files(tmp_path, ANSWERS[::-1])
    result = pope_task.score_files(*map(str, argv[1::2]))
    assert result["categories"]["adversarial"]["f1"] == 1.0
    assert result["categories"]["random"]["f1"] == 0.0
    assert result["f1_mean"] == 0.5 and result["coverage"].complete


def test_missing_duplicate_and_unmatched_answers_are_counted(tmp_path, capsys):
    argv = make_files(tmp_path, [answer(1, "No"), ANSWERS[0], ANSWERS[1], answer(99, "Yes"), ANSWERS[3]])
    out = tmp_path / "r.json"
    eval_pope.main([str(a) for a in argv] + ["--json", str(out)])
    result = json.loads(out.read_text())
    counts = {key: result[key] for key in ("expected", "scored", "missing", "duplicate", "unmatched")}
    assert counts == {"expected": 4, "scored": 3, "missing": 1, "duplicate": 1, "unmatched": 1}
    assert result["f1_adversarial"] == 1.0, "the last answer counts, and nothing shifts"
    warnings = capsys.readouterr().err
    assert "1 of 4 questions have no answer" in warnings and "99" in warnings


def test_label_file_of_another_release_is_refused(tmp_path, capsys):
    argv = make_files(tmp_path, ANSWERS)
    labels = tmp_path / "coco" / "coco_pope_random.json"
    lines = labels.read_text().splitlines(keepends=True)
    labels.write_text("".join(lines + lines[:1]))
    fails_with_one_line(eval_pope.main, argv, capsys, "coco_pope_random.json", "3 labels", "2")
    labels.write_text("".join(lines[::-1]))
    fails_with_one_line(eval_pope.main, argv, capsys, "coco_pope_random.json", "does not line up", "entry 1")


def test_what_identifies_a_sample_is_compared(tmp_path, capsys):
    """Image and the label's text as the start of the question; not how the instruction is put behind it."""
    argv = [str(a) for a in make_files(tmp_path, ANSWERS)]
    eval_pope.main(argv)
    expected = capsys.readouterr()
    questions = Path(argv[argv.index("--question-file") + 1])
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    for change in (
        lambda record: {"text": record["text"].split("\n")[0] + "\\nAnswer yes or no."},
        lambda record: {"text": "<image>\n" + record["text"]},
        lambda record: {"text": record["text"].split("\n")[0] + " Answer."},
        lambda record: {"image": "val2014/" + record["image"]},
    ):
        write_jsonl(questions, [{**record, **change(record)} for record in records])
        eval_pope.main(argv)
        assert capsys.readouterr().out == expected.out
    for change in (
        lambda record: {"text": "So " + record["text"]},
        lambda record: {"text": record["text"].split("?")[0] + "s?"},
        lambda record: {"image": "other.jpg"},
    ):
        write_jsonl(questions, [{**record, **change(record)} for record in records])
        fails_with_one_line(eval_pope.main, argv, capsys, "does not line up", "entry 1")


def test_bad_input(tmp_path, capsys):
    argv = make_files(tmp_path, ANSWERS)
    (tmp_path / "empty").mkdir()
    fails_with_one_line(eval_pope.main, ["--annotation-dir", tmp_path / "empty", *argv[2:]], capsys, "coco_pope_")
    fails_with_one_line(eval_pope.main, ["--annotation-dir", tmp_path / "none", *argv[2:]], capsys, tmp_path / "none")
    write_jsonl(tmp_path / "a.jsonl", [answer(77, "Yes")])
    fails_with_one_line(eval_pope.main, argv, capsys, "no answer belongs")
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "Yes"}\n{"question_id": 2, "te\n{}\n')
    fails_with_one_line(eval_pope.main, argv, capsys, "a.jsonl:2", "malformed JSON")
    write_jsonl(tmp_path / "a.jsonl", [{"question_id": 1}])
    fails_with_one_line(eval_pope.main, argv, capsys, "a.jsonl:1", "'text'")
