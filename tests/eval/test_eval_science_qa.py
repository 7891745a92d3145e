"""ScienceQA scorer: every rule of reading an answer, and files, on hand-computed cases."""

import json

import pytest

from llava.eval import eval_science_qa as sqa
from llava.eval.tasks import science_qa as science_qa_task
from tests.eval.helpers import answer, fails_with_one_line, read_json, write_json, write_jsonl

IMAGE_PROMPT = "<image>\nContext: N/A\nWhich one?\nA. x\nB. y"
# id -> (choices, answer, subject); answers below
PROBLEMS = {
    "1": (["x", "y"], 0, "natural science"),
    "2": (["x", "y"], 1, "natural science"),
    "3": (["x", "y"], 1, "social science"),
    "4": (["x", "y", "z"], 2, "language science"),
    "5": (["x", "y"], 0, "natural science"),
    "6": (["x", "y"], 0, "natural science"),
}
ANSWERS = [
    answer("1", "A", IMAGE_PROMPT),  # right, with image
    answer(2, "B. y", "Which?"),  # right; id as number
    answer("3", "C", IMAGE_PROMPT),  # beyond the two choices: failed, with image
    answer("4", "Because. The answer is C.", "Which?"),  # right
    answer("5", "a", "Which?"),  # not a letter that counts
    answer(2, "B. y", "Which?"),  # duplicate
    answer("77", "A", "Which?"),  # no problem of the split
]


@pytest.fixture
def base(tmp_path):
    problems = {
        key: {"question": "Which?", "choices": choices, "answer": index, "image": None, "subject": subject}
        for key, (choices, index, subject) in PROBLEMS.items()
    }
    problems["900"] = {"choices": ["x"], "answer": 0, "split": "train"}
    folder = tmp_path / "science qa"
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": ["900"], "test": list(PROBLEMS)})
    return folder


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", "FAILED"),
        ("B. the second", "B"),
        ("B. ", "B"),
        ("B.", "FAILED"),
        ("B.the second", "FAILED"),
        ("B: the second", "FAILED"),
        ("F. text", "FAILED"),
        (" A", "FAILED"),
        ("a", "FAILED"),
        ("(A)", "FAILED"),
        ("", "FAILED"),
        ("The answer is C.", "C"),
        ("So. The answer is C because", "C"),
        ("The answer is C", "FAILED"),  # one more character is needed
        ("The answer is C\n", "FAILED"),  # and a line break is none
        ("The answer is Z.", "Z"),
        ("The answer is c.", "FAILED"),
        ("The answer is A. The answer is B.", "FAILED"),
        ("The answer is A. The answer is B", "A"),
        ("the answer is A.", "FAILED"),
    ],
)
def test_reading(text, letter):
    assert science_qa_task.read_option(text) == letter


def test_a_letter_beyond_the_choices_is_no_choice():
    assert [science_qa_task.option_index(letter, 3) for letter in "ABCDZ"] == [0, 1, 2, -1, -1]


def test_scores_and_files_by_hand(base, tmp_path, capsys):
    result_file = write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    out, summary, flat = tmp_path / "o.json", tmp_path / "r.json", tmp_path / "s.json"
    sqa.main(
        [str(x) for x in ("--base-dir", base, "--result-file", result_file, "--output-file", out)]
        + [str(x) for x in ("--output-result", summary, "--json", flat)]
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "Total: 6, Correct: 3, Accuracy: 50.00%, IMG-Accuracy: 50.00%"
    assert "  natural science: 50.00% (4 problems)" in printed.out
    assert "1 of 6 problems have no answer and count as wrong: 6" in printed.err
    assert "1 answers repeat" in printed.err and ": 77" in printed.err
    assert "1 answers name no option" in printed.err
    scores = read_json(flat)
    assert (scores["accuracy"], scores["img_accuracy"], scores["correct"], scores["total"]) == (50.0, 50.0, 3, 6)
    assert scores["subject_social_science"] == 0.0 and scores["subject_language_science"] == 100.0
    assert [scores[k] for k in ("expected", "scored", "missing", "duplicate", "unmatched")] == [6, 5, 1, 1, 1]
    result = read_json(summary)
    assert list(result) == ["acc", "correct", "count", "results", "outputs"]
    assert (result["acc"], result["correct"], result["count"]) == (50.0, 3, 6)
    assert result["results"] == {"1": 0, "2": 1, "3": -1, "4": 2, "5": -1, "6": -1}
    assert result["outputs"]["6"] == "FAILED" and result["outputs"]["2"] == "B. y"
    graded = read_json(out)
    assert [entry["question_id"] for entry in graded["correct"]] == ["1", "2", "4"]
    assert graded["incorrect"][0] == {
        "question_id": "3",
        "parsed_ans": "C",
        "ground_truth": "B",
        "question": IMAGE_PROMPT,
        "pred": "C",
        "is_multimodal": True,
    }
    assert graded["incorrect"][2]["question"] == "Unknown" and not graded["incorrect"][2]["is_multimodal"]
    assert out.read_text() == json.dumps(graded, indent=2), "byte for byte as json.dump(indent=2) writes"


def test_image_accuracy_is_over_answered_problems_only(base, tmp_path):
    """The image problem without an answer (3) lowers the accuracy, not the image accuracy."""
    result = science_qa_task.score_files(str(base), str(write_jsonl(tmp_path / "a.jsonl", ANSWERS[:2])))
    assert (result["img_accuracy"], result["img_total"]) == (100.0, 1)
    assert result["accuracy"] == pytest.approx(100 * 2 / 6)


def test_crlf_and_byte_order_mark(base, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(a) for a in ANSWERS).encode())
    assert science_qa_task.score_files(str(base), str(path))["correct"] == 3


def test_other_split_and_options(base, tmp_path, capsys):
    answers = write_jsonl(tmp_path / "a.jsonl", [answer("900", "A")])
    sqa.main(["--base-dir", str(base), "--result-file", str(answers), "--split", "train", "--options", "AB"])
    printed = capsys.readouterr()
    assert "Total: 1, Correct: 1, Accuracy: 100.00%" in printed.out and "no IMG-Accuracy" in printed.err


def test_bad_input(base, tmp_path, capsys):
    answers = write_jsonl(tmp_path / "a.jsonl", ANSWERS)

    def fails(*parts, base_dir=base, result=answers, flags=()):
        argv = ["--base-dir", base_dir, "--result-file", result, *flags]
        fails_with_one_line(sqa.main, argv, capsys, *parts)

    fails("no answer belongs", result=write_jsonl(tmp_path / "other.jsonl", [answer("v1_0", "A")]))
    fails("'dev'", "train, test", flags=["--split", "dev"])
    fails("base folder not found", base_dir=tmp_path / "nowhere")
    fails("problem file not found", base_dir=tmp_path)
    torn = tmp_path / "torn.jsonl"
    torn.write_text(answers.read_text()[:-9] + "\n" + answers.read_text())
    fails("torn.jsonl:7", "malformed JSON", result=torn)
    write_json(base / "problems.json", {"1": {"choices": ["x"], "answer": 1}})
    fails("problems.json: problem 1", "none of its 1 choices")
    write_json(base / "problems.json", {"2": {"choices": ["x"], "answer": 0}})
    fails("problem 1 of split 'test' is missing")
