"""MME scorer: published digits of two answer sets, reading of answers, pairing, joining, bad input."""

import json
from pathlib import Path

import pytest

from llava.eval import eval_mme
from llava.eval.tasks import mme as mme_task
from llava.eval.tasks.mme import Row
from tests.eval.helpers import SHARED, answer, fails_with_one_line, needs_shared, read_json, write_jsonl

LLAVA_13B = {
    "existence": 185.0, "count": 155.0, "position": 133.33333333333334, "color": 170.0,
    "posters": 160.54421768707482, "celebrity": 152.94117647058823, "scene": 161.25, "landmark": 170.5,
    "artwork": 117.75, "OCR": 125.0, "commonsense_reasoning": 127.85714285714286,
    "numerical_calculation": 42.5, "text_translation": 77.5, "code_reasoning": 47.5,
    "perception": 1531.3187274909965, "cognition": 295.3571428571429,
}  # fmt: skip
LAVIN = {
    "existence": 185.0, "count": 88.33333333333334, "position": 63.333333333333336, "color": 75.0,
    "posters": 79.59183673469389, "celebrity": 47.35294117647059, "scene": 136.75, "landmark": 93.5,
    "artwork": 87.25, "OCR": 107.5, "commonsense_reasoning": 87.14285714285714,
    "numerical_calculation": 65.0, "text_translation": 47.5, "code_reasoning": 50.0,
}  # fmt: skip


@needs_shared
def test_published_answers_give_the_published_digits(tmp_path, capsys):
    out = tmp_path / "mme.json"
    eval_mme.main(
        ["--annotation-dir", f"{SHARED}/MME/MME_Benchmark_release_version", "--json", str(out)]
        + ["--question-file", f"{SHARED}/MME/llava_mme.jsonl"]
        + ["--result-file", f"{SHARED}/MME/answers/llava-v1.5-13b.jsonl"]
    )
    result = json.loads(out.read_text())
    for name, value in LLAVA_13B.items():
        assert result[name] == pytest.approx(value, abs=1e-6), name
    assert (result["scored"], result["missing"], result["unmatched"]) == (2374, 0, 0)
    printed = capsys.readouterr()
    assert "total score: 1531.3187" in printed.out and "\t OCR  score: 125.0" in printed.out
    assert printed.err == ""


@needs_shared
def test_free_text_answers_of_the_official_tool():
    rows = {
        path.stem: mme_task.read_tool_rows(path.read_text(encoding="utf-8").splitlines(), path.name)
        for path in (SHARED / "MME" / "eval_tool" / "LaVIN").glob("*.txt")
    }
    result = mme_task.mme_scores(rows)
    assert result["perception"] == pytest.approx(963.6114445778312, abs=1e-6)
    assert result["cognition"] == pytest.approx(249.64285714285714, abs=1e-6)
    for name, value in LAVIN.items():
        assert result["subtasks"][name]["score"] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("text", "read"),
    [("Yes", "yes"), ("yes.", "yes"), ("No", "no"), ("Snow", "no"), ("None", "no"), (" yes", "yes"),
     ("  yes", "other"), ("Church", "other"), ("", "other"), ("The answer is yes", "other")],
)  # fmt: skip
def test_reading_of_answers(text, read):
    assert mme_task.read_answer(text) == read


def test_subtask_score_by_hand():
    """Image a: both right; image b: one right; image c: one right, one unreadable. 4 of 6, 1 of 3."""
    rows = [
        Row("a", "Yes", "yes"), Row("a", "No", "No."), Row("b", "Yes", "Yes"), Row("b", "No", "Yes"),
        Row("c", "Yes", "Portrait"), Row("c", "No", "no"),
    ]  # fmt: skip
    scores = mme_task.subtask_score(rows)
    assert scores["score"] == pytest.approx(100 * 4 / 6 + 100 / 3)
    assert scores["other"] == 1


def make_files(folder, answers):
    release = folder / "release"
    for path in (release / "color", release / "artwork" / "questions_answers_YN"):
        path.mkdir(parents=True, exist_ok=True)
    # Two blanks before "Please", as in some questions of the release.
    (release / "color" / "1.txt").write_text(
        "Is it red?  Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    )
    (release / "artwork" / "questions_answers_YN" / "7.txt").write_text(
        "Is it art? Please answer yes or no.\tYes\nIs it glass? Please answer yes or no.\tNo\n"
    )
    instruction = "\nAnswer the question using a single word or phrase."
    questions = [
        {"question_id": identity, "image": identity, "text": text + instruction, "category": "any"}
        for identity, text in (
            ("color/1.jpg", "Is it red?"), ("color/1.jpg", "Is it blue?"),
            ("artwork/images/7.jpg", "Is it art?"), ("artwork/images/7.jpg", "Is it glass?"),
        )
    ]  # fmt: skip
    write_jsonl(folder / "q.jsonl", questions)
    write_jsonl(folder / "a.jsonl", answers)
    argv = [
        "--annotation-dir",
        release,
        "--question-file",
        folder / "q.jsonl",
        "--result-file",
        folder / "a.jsonl",
    ]
    return argv, questions


def test_questions_join_across_instructions_and_folders(tmp_path):
    _, questions = make_files(tmp_path, [])
    answers = [
        answer(q["question_id"], text, q["text"]) for q, text in zip(questions, "Yes No Yes Yes".split(), strict=True)
    ]
    argv, _ = make_files(tmp_path, answers)
    result = mme_task.score_files(*map(str, argv[1::2]))
    assert result["subtasks"]["color"]["score"] == 200.0
    assert result["subtasks"]["artwork"]["score"] == 50.0
    assert (result["perception"], result["cognition"]) == (250.0, 0) and result["coverage"].complete


def test_half_answered_image_counts_in_accuracy_only(tmp_path, capsys):
    _, questions = make_files(tmp_path, [])
    argv, _ = make_files(tmp_path, [answer(q["question_id"], "Yes", q["text"]) for q in questions[:3]])
    result = mme_task.score_files(*map(str, argv[1::2]))
    assert result["subtasks"]["artwork"]["score"] == 100.0
    result["coverage"].report()
    assert "1 of 4 questions have no answer" in capsys.readouterr().err


def test_bad_input(tmp_path, capsys):
    argv, questions = make_files(tmp_path, [answer("color/2.jpg", "Yes", "Is it red?")])
    fails_with_one_line(eval_mme.main, argv, capsys, "no answer belongs")
    write_jsonl(tmp_path / "q.jsonl", [*questions, {"question_id": "color/9.jpg", "text": "Is it odd?"}])
    fails_with_one_line(eval_mme.main, argv, capsys, "color/9.jpg", "no ground truth")
    (tmp_path / "release" / "color" / "1.txt").write_text("Is it red?\tMaybe\n")
    fails_with_one_line(eval_mme.main, argv, capsys, "1.txt:1")
    with pytest.raises(ValueError, match="consecutive"):
        mme_task.read_tool_rows(["a.jpg\tq\tYes\tyes", "b.jpg\tq\tNo\tno"])


def test_input_files_of_the_official_tool(tmp_path, capsys):
    """Lines as the tool wants them, the question as in the release; the tool's own reading gives the same scores."""
    _, questions = make_files(tmp_path, [])
    texts = ("Yes, it\nis.", "Yes", "yes\tindeed", "No")
    given = [answer(q["question_id"], text, q["text"]) for q, text in zip(questions, texts, strict=True)]
    argv, _ = make_files(tmp_path, given)
    folder = tmp_path / "tool dir"
    eval_mme.main([*map(str, argv), "--tool-dir", str(folder), "--json", str(tmp_path / "s.json")])
    assert (folder / "color.txt").read_text() == (
        "1.txt\tIs it red?  Please answer yes or no.\tYes\tYes, it is.\n"
        "1.txt\tIs it blue? Please answer yes or no.\tNo\tYes\n"
    )
    scores = read_json(tmp_path / "s.json")
    rows = {p.stem: mme_task.read_tool_rows(p.read_text().splitlines()) for p in folder.iterdir()}
    again = mme_task.mme_scores(rows)
    assert again["subtasks"]["color"]["score"] == scores["color"] == 50.0
    assert again["subtasks"]["artwork"]["score"] == scores["artwork"] == 200.0
    # An image with one answer would shift the pairs of the tool.
    capsys.readouterr()
    argv, _ = make_files(tmp_path, given[1:])
    eval_mme.main([*map(str, argv), "--tool-dir", str(tmp_path / "half")])
    assert "1 images without two answers" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["artwork.txt"]


@needs_shared
@pytest.mark.parametrize("text", [" \n Yes", "\n\n\n\nNo", "\tno", "   yes", "  \r\nYes", "", "ye\ns", "Yes\tit is"])
def test_the_official_tool_reads_an_answer_as_the_score_does(text):
    """It splits a line at its tabs and takes the first four characters of the last cell, without stripping."""
    key = [("color", "a", "One?"), ("color", "a", "Two?")]
    release = {key[0]: ("One?", "Yes"), key[1]: ("Two?", "No")}
    questions = [{"question_id": "color/a.png", "text": name} for _, _, name in key]
    answers = [{**question, "prompt": question["text"], "text": text} for question in questions]
    content, left_out = mme_task.tool_files(release, questions, answers)
    lines = content["color"].splitlines(keepends=True)
    assert left_out == 0 and len(lines) == 2
    for line in lines:
        _, _, _, prediction = line.split("\t")
        assert mme_task.read_answer(prediction) == mme_task.read_answer(text)


def test_a_question_is_found_by_its_own_text_at_the_start():
    """Whatever instruction follows, and however its line break is written; other questions stay unknown."""
    lookup = mme_task.Lookup([("color", "a", "Is it red?"), ("color", "a", "Is it"), ("color", "b", "Is it blue?")])
    instruction = "Answer the question using a single word or phrase."
    for rest in (f"\\n{instruction}", " Please answer yes or no.\\n", "\nYes or no?", ""):
        assert lookup.find("color/a.png", "Is it red?" + rest) == ("color", "a", "Is it red?")
    assert lookup.find("color/b.png", "Is it red?") is None
    assert lookup.find("color/b.png", "Well, is it blue?") is None
    assert lookup.find("color/a.png", "Is itself?") is None


def test_official_input_of_published_answers(tmp_path):
    """Questions and truth line by line as in the official template; scores as from the answer file."""
    folder = SHARED / "MME"
    release, questions = str(folder / "MME_Benchmark_release_version"), str(folder / "llava_mme.jsonl")
    mme_task.write_tool_files(str(tmp_path), release, questions, str(folder / "answers" / "llava-v1.5-13b.jsonl"))
    rows = {}
    for path in sorted(tmp_path.iterdir()):
        lines = path.read_text(encoding="utf-8").splitlines()
        rows[path.stem] = mme_task.read_tool_rows(lines)
        template = (folder / "eval_tool" / "Your_Results" / path.name).read_text(encoding="utf-8").splitlines()
        cut = {(Path(a).stem, b, c) for a, b, c in (line.split("\t")[:3] for line in lines)}
        assert cut == {(Path(a).stem, b, c) for a, b, c in (line.split("\t")[:3] for line in template if line)}
    scores = mme_task.mme_scores(rows)
    assert scores["perception"] == pytest.approx(1531.3187274909965, abs=1e-6)
    assert scores["cognition"] == pytest.approx(295.3571428571429, abs=1e-6)
