"""GQA scorer on hand-computed cases; no published answer file is at hand."""

import json

import pytest

from llava.eval import eval_gqa
from llava.eval.tasks import gqa as gqa_task
from tests.eval.helpers import answer, fails_with_one_line, write_json, write_jsonl


def question(text, truth, structural, semantic="attr", balanced=True):
    return {
        "question": text,
        "answer": truth,
        "imageId": "1",
        "isBalanced": balanced,
        "types": {"structural": structural, "semantic": semantic, "detailed": "d"},
        "semantic": [],
    }


QUESTIONS = {
    "11": question("Is it red?", "yes", "verify"),
    "12": question("Red or blue?", "blue", "choose"),
    "13": question("What is it?", "cat", "query", "obj"),
    "14": question("Who?", "man", "query", "rel"),
    "15": question("Unbalanced?", "yes", "verify", balanced=False),
}
ANSWERS = [
    answer("11", "Yes."),
    answer(12, "red"),
    answer("13", "Cat"),
    answer("14", "the man"),
    answer("15", "no"),
]


def test_scores_by_hand(tmp_path, capsys):
    annotation = write_json(tmp_path / "testdev_balanced_questions.json", QUESTIONS)
    result_file = write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    out = tmp_path / "r.json"
    eval_gqa.main(["--annotation-file", str(annotation), "--result-file", str(result_file), "--json", str(out)])
    printed = capsys.readouterr().out
    assert "Binary: 50.00%\nOpen: 50.00%\nAccuracy: 50.00%" in printed
    assert "  query: 50.00% (2 questions)" in printed and "  rel: 0.00% (1 questions)" in printed
    result = json.loads(out.read_text())
    assert (result["accuracy"], result["binary"], result["open"], result["samples"]) == (50.0, 50.0, 50.0, 4)
    assert (result["structural_verify"], result["semantic_obj"], result["missing"]) == (100.0, 100.0, 0)


@pytest.mark.parametrize(
    ("text", "prediction"),
    [("Yes.", "yes"), ("No...", "no"), (" Yes", " yes"), ("U.S.", "u.s"), ("a, b", "a, b")],
)
def test_conversion_strips_trailing_periods_and_lowers_and_nothing_else(text, prediction):
    assert gqa_task.to_prediction(text) == prediction


def test_converted_predictions_are_taken_as_they_are(tmp_path):
    annotation = write_json(tmp_path / "q.json", QUESTIONS)
    entries = [{"questionId": "11", "prediction": "Yes."}, {"questionId": "13", "prediction": "cat"}]
    predictions = write_json(tmp_path / "p.json", entries)
    result = gqa_task.score_files(str(annotation), str(predictions))
    assert (result["accuracy"], result["binary"], result["open"]) == (50.0, 0.0, 100.0)
    assert result["coverage"].to_dict()["missing"] == 2


def test_bad_input(tmp_path, capsys):
    annotation = write_json(tmp_path / "q.json", QUESTIONS)
    answers = write_jsonl(tmp_path / "a.jsonl", [answer("99", "yes")])
    main = eval_gqa.main
    fails_with_one_line(main, ["--annotation-file", annotation, "--result-file", answers], capsys, "no answer belongs")
    fails_with_one_line(main, ["--annotation-file", answers, "--result-file", answers], capsys, "a.jsonl: question_id")
    entries = write_json(tmp_path / "p.json", [{"questionId": "11"}])
    fails_with_one_line(
        main, ["--annotation-file", annotation, "--result-file", entries], capsys, "entry 0", "prediction"
    )
