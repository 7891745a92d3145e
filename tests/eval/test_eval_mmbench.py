"""MMBench scorer on a hand-computed table: rotations, rounds, empty options, answer files and workbooks."""

import csv

import pytest

from llava.eval import eval_mmbench
from llava.eval.tasks import mmbench as mmbench_task
from llava.eval.tasks.mmbench_data import write_workbook
from tests.eval.helpers import fails_with_one_line, read_json, write_jsonl

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"]
M = 1_000_000
# Question 1 has three rotations, 2 two, 3 and 4 one; 4 has only two options, 5 no published answer.
ROWS = [
    [1, "Two\nlines?", "", "cat", "dog", "cow", "", "B", "animals", "iVBO", "fine", "dev"],
    [2, "Red?", "A hint", "yes", "no", "", "", "A", "color", "iVBO", "coarse", "dev"],
    [3, "How many?", "", "1", "2", "3", "4", "D", "count", "iVBO", "fine", "dev"],
    [4, "Day?", "", "Day.", "Night", "", "", "A", "color", "iVBO", "coarse", "dev"],
    [5, "Secret?", "", "x", "y", "", "", "", "count", "iVBO", "fine", "test"],
    [1 + M, "Two\nlines?", "", "dog", "cow", "cat", "", "A", "animals", "iVBO", "fine", "dev"],
    [2 + M, "Red?", "A hint", "no", "yes", "", "", "B", "color", "iVBO", "coarse", "dev"],
    [1 + 2 * M, "Two\nlines?", "", "cow", "cat", "dog", "", "C", "animals", "iVBO", "fine", "dev"],
]
# 1: right in all rotations; 2: right, then wrong; 3: right by text; 4: names no option; of 7 scored rows 5 right.
PREDICTIONS = {1: "B", 1 + M: "A. dog", 1 + 2 * M: "(C)", 2: "Yes.", 2 + M: "A", 3: "4", 4: "C", 5: "A"}
OPTIONS = {"A": "cat", "B": "a dog", "C": "A.M."}


def write_tsv(path, rows=ROWS, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    return path


@pytest.fixture
def tsv(tmp_path):
    return write_tsv(tmp_path / "dev set.tsv")


def answers(predictions):
    return [{"question_id": index, "prompt": "", "text": text} for index, text in predictions.items()]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" B\n", "B"),
        ("C.", "C"),
        ("A. dog", "A"),  # the letter wins over the text behind it
        ("(B)", "B"),
        ("(B) cat", "B"),
        ("B) cat", "B"),
        ("B: cat", "B"),
        ("（B）", "B"),
        ("B、猫", "B"),
        ("Cat", "A"),
        ("a dog.", "B"),
        ("A.M.", "C"),  # text, not the letter A
        ("D", None),  # no such option
        ("D. cat", None),
        ("a", None),
        ("A dog", "B"),
        ("A cat", None),
        ("The answer is A.", None),
        ("A or B", None),
        ("", None),
        (".", None),
    ],
)
def test_reading(text, letter):
    assert mmbench_task.read_choice(text, OPTIONS) == letter


def test_text_of_two_options_is_no_choice():
    assert mmbench_task.read_choice("red", {"A": "red", "B": "Red."}) is None


def check(result_file, tsv, tmp_path, capsys):
    flat = tmp_path / "s.json"
    argv = ["--annotation-file", str(tsv), "--result-file", str(result_file), "--json", str(flat)]
    eval_mmbench.main(argv)
    printed = capsys.readouterr()
    assert printed.out.startswith("Circular: 50.00% (4 questions)\nSingle pass: 75.00%\nPer row: 71.43% (7 rows)\n")
    assert "  color: 0.00% (2 questions)" in printed.out
    scores = read_json(flat)
    assert (scores["circular"], scores["single_pass"]) == (50.0, 75.0)
    assert scores["per_row"] == pytest.approx(500 / 7)
    assert (scores["category_animals"], scores["category_color"], scores["l2_fine"]) == (100.0, 0.0, 100.0)
    return scores, printed.err


def test_answer_file_by_hand(tsv, tmp_path, capsys):
    records = answers(PREDICTIONS)
    records[0] |= {"question_id": "1", "round_id": None}  # ids as strings are the same ids
    records += answers({1: "B"}) + answers({99: "A"}) + answers({"v1_0": "A"})
    scores, warnings = check(write_jsonl(tmp_path / "a.jsonl", records), tsv, tmp_path, capsys)
    assert [scores[k] for k in ("expected", "scored", "missing", "duplicate", "unmatched")] == [7, 7, 0, 1, 2]
    assert scores["unread"] == 1 and "1 answers name no option" in warnings
    assert "2 answers belong to no question and are ignored: 99, v1_0" in warnings


def test_workbook_by_hand(tsv, tmp_path, capsys):
    pytest.importorskip("openpyxl")
    header = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    rows = [[r[0], r[1], *r[3:7], PREDICTIONS[r[0]], r[7], r[-1]] for r in ROWS]
    rows[2][6] = 4.0  # what a spreadsheet makes of the text "4"
    book = tmp_path / "upload.xlsx"
    write_workbook(book, header, rows)
    scores, _ = check(book, tsv, tmp_path, capsys)
    assert scores["missing"] == 0


def test_missing_predictions_are_wrong(tsv, tmp_path, capsys):
    """An empty cell of a workbook and an absent line are the same: wrong, and told."""
    kept = {index: text for index, text in PREDICTIONS.items() if index != 1 + 2 * M}
    result_file = write_jsonl(tmp_path / "a.jsonl", answers(kept))
    result = mmbench_task.score_files(str(tsv), str(result_file))
    assert (result["circular"], result["single_pass"]) == (25.0, 75.0)
    assert result["per_row"] == pytest.approx(400 / 7)
    eval_mmbench.main(["--annotation-file", str(tsv), "--result-file", str(result_file)])
    assert "1 of 7 rows have no answer and count as wrong: 2000001" in capsys.readouterr().err
    pytest.importorskip("openpyxl")
    book = tmp_path / "w.xlsx"
    write_workbook(book, ["index", "prediction"], [[r[0], kept.get(r[0])] for r in ROWS])
    again = mmbench_task.score_files(str(tsv), str(book))
    assert (again["circular"], again["coverage"].missing) == (25.0, ["2000001"])


def test_rounds_are_rotations_of_a_row(tsv):
    """Letters of a round are those shown; `option_char` leads back to the row's."""
    rows = {1: mmbench_task.load_rows(str(tsv))[1]}
    texts, letters = ["cat", "dog", "cow"], ["A", "B", "C"]

    def result(*said):
        records = [
            {
                "question_id": 1,
                "round_id": n,
                "text": text,
                "options": texts[n:] + texts[:n],
                "option_char": letters[n:] + letters[:n],
            }
            for n, text in enumerate(said)
        ]
        scores = mmbench_task.evaluate_mmbench(rows, records)
        return scores["circular"], scores["single_pass"], round(scores["per_row"], 2), len(scores["unread"])

    assert result("B", "A", "C. dog") == (100.0, 100.0, 100.0, 0)
    assert result("B", "B", "dog") == (0.0, 100.0, 66.67, 0)
    assert result("A", "A", "D") == (0.0, 0.0, 33.33, 1)


def test_an_option_none_can_be_right(tmp_path):
    tsv = write_tsv(tmp_path / "t.tsv", [[1, "q", "", "x", "None", "", "", "B", "c", "", "", "dev"]])
    rows = mmbench_task.load_rows(str(tsv))
    assert mmbench_task.evaluate_mmbench(rows, answers({1: "B"}))["circular"] == 100.0


def test_bad_input(tsv, tmp_path, capsys):
    good = write_jsonl(tmp_path / "a.jsonl", answers(PREDICTIONS))

    def fails(*parts, annotation=tsv, result=good):
        argv = ["--annotation-file", annotation, "--result-file", result]
        fails_with_one_line(eval_mmbench.main, argv, capsys, *parts)

    fails("no answer belongs", result=write_jsonl(tmp_path / "other.jsonl", answers({"v1_3": "A"})))
    rounds = [{**record, "round_id": "two"} for record in answers({1: "A"})]
    fails("question 1: round_id", result=write_jsonl(tmp_path / "rounds.jsonl", rounds))
    torn = tmp_path / "torn.jsonl"
    torn.write_text(good.read_text()[:-9] + "\n" + good.read_text())
    fails("torn.jsonl:8", "malformed JSON", result=torn)
    fails("annotation file not found", annotation=tmp_path / "nowhere.tsv")
    fails("no row has an answer", annotation=write_tsv(tmp_path / "test.tsv", [ROWS[4]]))
    fails("index 1 occurs twice", annotation=write_tsv(tmp_path / "twice.tsv", [ROWS[0], ROWS[0]]))
    broken = [[*ROWS[1][:7], "C", *ROWS[1][8:]]]
    fails("t.tsv:2", "answer 'C' is none", annotation=write_tsv(tmp_path / "t.tsv", broken))
    pytest.importorskip("openpyxl")
    book = tmp_path / "w.xlsx"
    write_workbook(book, ["index", "answer"], [[1, "A"]])
    fails("'prediction' is missing", result=book)
