"""Converters: upload files byte for byte, what joins and what does not, damaged answer files."""

import csv
import json
import runpy
import subprocess
import sys

import pytest

from llava.eval.tasks import gqa as gqa_task
from llava.eval.tasks import mmbench as mmbench_task
from llava.eval.tasks.mmbench_data import read_workbook
from llava.eval.tasks.science_prompts import prompt_and_answer
from tests.eval.helpers import ROOT, answer, fails_with_one_line, read_json, read_jsonl, write_json, write_jsonl

QUESTIONS = [
    {"question_id": 10, "image": "b.jpg", "text": "One?"},
    {"question_id": 9, "image": "a.jpg", "text": "Two?"},
    {"question_id": 11, "image": "c.jpg", "text": "Three?"},
]


def script(name):
    return runpy.run_path(str(ROOT / "scripts" / f"convert_{name}.py"))["main"]


def run(name, *argv):
    return script(name)([str(arg) for arg in argv])


@pytest.fixture
def vqa(tmp_path):
    """A VQAv2 folder in upstream's layout with two of three questions answered."""
    folder = tmp_path / "vqa v2"
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", QUESTIONS)
    answers = [answer(9, "A Cafe\u0301, isnt it?"), answer("10", 2), answer("10", "Two."), answer(77, None)]
    write_jsonl(folder / "answers" / "dev" / "run 1" / "merge.jsonl", answers)
    return folder


def test_vqav2_covers_the_whole_split(vqa, capsys):
    run("vqav2_for_submission", "--dir", vqa, "--split", "dev", "--ckpt", "run 1")
    printed = capsys.readouterr()
    assert printed.out == "total results: 2, total split: 3, error_line: 0\n"
    assert "1 answers repeat" in printed.err and "belong to no question" in printed.err and ": 77" in printed.err
    upload = vqa / "answers_upload" / "dev" / "run 1.json"
    assert upload.read_bytes() == (
        b'[{"question_id": 10, "answer": "2"}, {"question_id": 9, "answer": "cafe\\u0301 isn\'t it"}, '
        b'{"question_id": 11, "answer": ""}]'
    )


def test_vqav2_lines_that_are_no_answers_are_counted(vqa, capsys):
    """As upstream: a line torn by a kill costs only itself, and is told."""
    merge = vqa / "answers" / "dev" / "run 1" / "merge.jsonl"
    crlf = merge.read_bytes().replace(b"\n", b"\r\n")
    merge.write_bytes(b"\xef\xbb\xbf" + crlf + b"\r\n[1]\n\xff\xfe\n" + b'{"question_id": 11, "text": "y')
    with pytest.raises(SystemExit) as exit_info:
        run("vqav2_for_submission", "--dir", vqa, "--split", "dev", "--ckpt", "run 1")
    printed = capsys.readouterr()
    assert printed.out == "total results: 2, total split: 3, error_line: 3\n"
    assert exit_info.value.code == 3 and "3 lines of" in printed.err
    assert (vqa / "answers_upload" / "dev" / "run 1.json").is_file()


def test_vqav2_as_published_by_autoprune(vqa, capsys):
    """`--src` and `--dst` below `--dir`; the same bytes as in LLaVA's way."""
    run("vqav2_for_submission", "--dir", vqa, "--split", "dev", "--ckpt", "run 1")
    src, dst = "answers/dev/run 1/merge.jsonl", "answers_upload/llava/AdaPruner/n_64/upload.json"
    run("vqav2_for_submission", "--dir", vqa, "--src", src, "--dst", dst)
    assert (vqa / dst).read_bytes() == (vqa / "answers_upload" / "dev" / "run 1.json").read_bytes()
    capsys.readouterr()
    main = script("vqav2_for_submission")
    fails_with_one_line(main, ["--dir", vqa, "--src", src], capsys, "--dst")
    fails_with_one_line(main, ["--dir", vqa, "--src", src, "--dst", dst, "--result-file", "x"], capsys, "not both")
    fails_with_one_line(main, ["--dir", vqa, "--src", "no.jsonl", "--dst", dst], capsys, vqa / "no.jsonl")


def test_vqav2_tells_questions_of_the_split_without_an_answer(vqa, capsys):
    write_jsonl(vqa / "dev.jsonl", QUESTIONS[1:])
    with pytest.raises(SystemExit) as exit_info:
        run("vqav2_for_submission", "--dir", vqa, "--split", "dev", "--ckpt", "run 1")
    assert exit_info.value.code == 3 and "get an empty one: 11" in capsys.readouterr().err


def test_vqav2_with_paths_and_bad_input(vqa, tmp_path, capsys):
    main = script("vqav2_for_submission")
    result = vqa / "answers" / "dev" / "run 1" / "merge.jsonl"
    out = tmp_path / "new" / "u.json"
    main(["--dir", str(vqa), "--result-file", str(result), "--result-upload-file", str(out)])
    assert [entry["answer"] for entry in read_json(out)][0] == "2"
    capsys.readouterr()
    fails_with_one_line(main, ["--dir", vqa], capsys, "--split and --ckpt")
    fails_with_one_line(main, ["--dir", vqa, "--split", "dev", "--ckpt", "run 2"], capsys, "answer file", "run 2")
    argv = ["--dir", vqa, "--result-upload-file", out, "--result-file"]
    fails_with_one_line(main, [*argv, write_jsonl(tmp_path / "e.jsonl", [])], capsys, "holds no answer")
    other = write_jsonl(tmp_path / "o.jsonl", [answer("v1_0", "x")])
    fails_with_one_line(main, [*argv, other], capsys, "no answer belongs")


def test_vizwiz_in_question_order(tmp_path, capsys):
    questions = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    answers = write_jsonl(tmp_path / "a.jsonl", [answer(9, "The dog."), answer(11, "unanswerable"), answer(10, "10%")])
    out = tmp_path / "u.json"
    argv = ["--annotation-file", questions, "--result-file", answers, "--result-upload-file", out]
    run("vizwiz_for_submission", *argv)
    assert capsys.readouterr().out == "total results: 3, total split: 3, error_line: 0\n"
    assert out.read_bytes() == (
        b'[{"image": "b.jpg", "answer": "10%"}, {"image": "a.jpg", "answer": "dog"}, '
        b'{"image": "c.jpg", "answer": "unanswerable"}]'
    )
    out.unlink()
    write_jsonl(answers, [answer(9, "dog")])
    fails_with_one_line(script("vizwiz_for_submission"), argv, capsys, "2 of 3 questions have no answer (10, 11)")
    assert not out.exists()


def test_gqa_predictions_and_their_score(tmp_path, capsys):
    answers = [answer("1", "Yes."), answer(2, "The Man..."), answer("3", " Caf\u00e9"), answer("1", "no")]
    src, dst = write_jsonl(tmp_path / "a.jsonl", answers), tmp_path / "p.json"
    run("gqa_for_eval", "--src", src, "--dst", dst)
    assert dst.read_bytes() == (
        b'[{"questionId": "1", "prediction": "yes"}, {"questionId": 2, "prediction": "the man"}, '
        b'{"questionId": "3", "prediction": " caf\\u00e9"}, {"questionId": "1", "prediction": "no"}]'
    )
    assert "1 answers repeat a question; all are written: 1" in capsys.readouterr().err
    truth = {key: {"answer": text, "types": {"structural": "query"}} for key, text in (("1", "no"), ("2", "man"))}
    annotation = write_json(tmp_path / "q.json", truth)
    from_answers, from_predictions = (gqa_task.score_files(str(annotation), str(file)) for file in (src, dst))
    assert from_answers["accuracy"] == from_predictions["accuracy"] == 50.0


def test_mmvet_names_and_torn_line(tmp_path, capsys):
    src = write_jsonl(tmp_path / "a.jsonl", [answer(0, "A \u201ccat\u201d.\n"), answer("1", "x"), answer("1", "x")])
    run("mmvet_for_eval", "--src", src, "--dst", tmp_path / "r" / "m.json")
    assert (tmp_path / "r" / "m.json").read_bytes() == (b'{\n  "v1_0": "A \\u201ccat\\u201d.\\n",\n  "v1_1": "x"\n}')
    assert "1 answers repeat" in capsys.readouterr().err
    src.write_text(src.read_text()[:-5])
    argv = ["--src", src, "--dst", tmp_path / "n.json"]
    fails_with_one_line(script("mmvet_for_eval"), argv, capsys, "a.jsonl:3", "malformed JSON")
    assert not (tmp_path / "n.json").exists()


MMBENCH_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category"),
    *("image", "source", "l2-category", "comment", "split"),
)
MMBENCH_ROWS = [
    [7, "Two\nlines?", "", "cat", "=1+1", "", "", "B", "c1", "iVBO", "web", "l1", "", "dev"],
    [1000007, "Two\nlines?", "", "=1+1", "cat", "", "", "A", "c1", "iVBO", "web", "l1", "", "dev"],
    [8, "Which?", "hint", "a", "b", "c", "d", "D", "c2", "iVBO", "web", "l2", "", "dev"],
]


def mmbench(tmp_path, records, columns=MMBENCH_COLUMNS, rows=MMBENCH_ROWS):
    with open(tmp_path / "dev.tsv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    write_jsonl(tmp_path / "answers" / "run.jsonl", records)
    argv = ("--annotation-file", tmp_path / "dev.tsv", "--result-dir", tmp_path / "answers")
    return [*argv, "--upload-dir", tmp_path / "upload", "--experiment", "run"]


def test_mmbench_workbook(tmp_path, capsys):
    pytest.importorskip("openpyxl")
    records = [
        {**answer(7, "B"), "round_id": 0},
        {**answer(7, "A"), "round_id": 1},  # another rotation: not what the workbook is about
        answer("1000007", "=1+1"),
        answer(55, "A"),
    ]
    run("mmbench_for_submission", *mmbench(tmp_path, records))
    warnings = capsys.readouterr().err
    assert "1 rows have no answer; their cells stay empty: 8" in warnings and ": 55" in warnings
    assert "repeat" not in warnings
    rows = read_workbook(tmp_path / "upload" / "run.xlsx")
    assert [list(row) for row in rows] == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    ] * 3
    assert list(rows[0].values()) == [7, "Two\nlines?", "cat", "=1+1", None, None, "B", "B", "dev"]
    assert list(rows[1].values()) == [1000007, "Two\nlines?", "=1+1", "cat", None, None, "=1+1", "A", "dev"]
    assert list(rows[2].values()) == [8, "Which?", "a", "b", "c", "d", None, "D", "dev"]
    scores = mmbench_task.score_files(str(tmp_path / "dev.tsv"), str(tmp_path / "upload" / "run.xlsx"))
    assert (scores["circular"], scores["single_pass"]) == (50.0, 50.0)


def test_mmbench_test_split_has_no_answers(tmp_path):
    pytest.importorskip("openpyxl")
    columns = [name for name in MMBENCH_COLUMNS if name not in ("answer", "comment")]
    rows = [[c for c, n in zip(row, MMBENCH_COLUMNS, strict=True) if n in columns] for row in MMBENCH_ROWS]
    run("mmbench_for_submission", *mmbench(tmp_path, [answer(7, "B")], columns, rows))
    assert list(read_workbook(tmp_path / "upload" / "run.xlsx")[0]) == [
        *("index", "question", "A", "B", "C", "D", "prediction", "split")
    ]


def test_mmbench_bad_input(tmp_path, capsys, monkeypatch):
    argv = mmbench(tmp_path, [answer("v1_0", "B")])
    main = script("mmbench_for_submission")
    fails_with_one_line(main, argv, capsys, "no answer belongs")
    fails_with_one_line(main, [*argv, "--experiment", "other"], capsys, "other.jsonl")
    argv = mmbench(tmp_path, [answer(i, "B") for i in (7, 8, 1000007)])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    fails_with_one_line(main, argv, capsys, "pip install openpyxl")
    assert not (tmp_path / "upload" / "run.xlsx").exists()


SEED = {
    "question_type": {"Instance Counting": 5, "Scene Understanding": 1, "Action Recognition": 10},
    "questions": [
        {"question_id": "101", "question_type_id": 5, "data_type": "image", "answer": "A"},
        {"question_id": "102", "question_type_id": 1, "data_type": "image", "answer": "B"},
        {"question_id": "v_3", "question_type_id": 10, "data_type": "video", "answer": "C"},
    ],
}


def test_seed_accuracy_and_upload(tmp_path, capsys):
    annotation = write_json(tmp_path / "SEED-Bench.json", SEED)
    answers = write_jsonl(tmp_path / "a.jsonl", [answer(102, "B"), answer("v_3", "C."), answer(101, "A")])
    out, flat = tmp_path / "u.jsonl", tmp_path / "s.json"
    argv = ["--annotation-file", annotation, "--result-file", answers, "--result-upload-file", out, "--json", flat]
    run("seed_for_submission", *argv)
    assert capsys.readouterr().out.splitlines() == [
        "Scene Understanding: 100.00%",
        "Instance Counting: 100.00%",
        "Action Recognition: 0.00%",
        "Total accuracy: 66.67%",
        "image accuracy: 100.00%",
        "video accuracy: 0.00%",
    ]
    assert out.read_bytes() == (
        b'{"question_id": "101", "prediction": "A"}\n{"question_id": "102", "prediction": "B"}\n'
        b'{"question_id": "v_3", "prediction": "C."}\n'
    )
    scores = read_json(flat)
    assert scores["accuracy"] == pytest.approx(200 / 3) and scores["image"] == 100.0 and scores["missing"] == 0


def test_seed_without_all_answers_prints_scores_and_writes_no_upload(tmp_path, capsys):
    annotation = write_json(tmp_path / "SEED-Bench.json", SEED)
    answers = write_jsonl(tmp_path / "a.jsonl", [answer(102, "B")])
    out = tmp_path / "u.jsonl"
    argv = ["--annotation-file", annotation, "--result-file", answers, "--result-upload-file", out]
    with pytest.raises(SystemExit) as exit_info:
        run("seed_for_submission", *argv)
    printed = capsys.readouterr()
    assert exit_info.value.code == 2 and not out.exists()
    assert "Total accuracy: 33.33%" in printed.out and "Instance Counting: 0.00%" in printed.out
    assert "error: 2 of 3 questions have no answer (101, v_3)" in printed.err
    broken = {**SEED, "question_type": {"Scene Understanding": 1}}
    fails_with_one_line(
        script("seed_for_submission"),
        ["--annotation-file", write_json(annotation, broken), *argv[2:]],
        capsys,
        "questions[0]: question_type_id 5",
    )


def test_as_a_process(tmp_path):
    """From another folder, as a shell script calls it."""
    src = write_jsonl(tmp_path / "a.jsonl", [answer(0, "x")])
    command = [sys.executable, ROOT / "scripts" / "convert_mmvet_for_eval.py", "--src", src, "--dst", "o.json"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((tmp_path / "o.json").read_text()) == {"v1_0": "x"}


def test_science_problems_become_conversations(tmp_path, capsys):
    problems = {
        "4": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "Look.", "image": "image.png",
              "lecture": "Long.", "solution": "Because."},
        "9": {"question": "What?", "choices": ["x", "y", "z"], "answer": 0, "hint": "", "image": None},
    }  # fmt: skip
    write_json(tmp_path / "problems.json", problems)
    write_json(tmp_path / "pid_splits.json", {"test": ["9", "4"], "train": []})
    main = script("sqa_to_llava")
    target = tmp_path / "llava_test_CQM-A.json"
    lettered = ["--base-dir", str(tmp_path), "--prompt-format", "CQM-A-lettered", "--output-file", str(target)]
    main(["convert_to_llava", "--split", "test", *lettered])
    assert read_json(target) == [
        {"id": "9", "conversations": [{"from": "human", "value": "What?\nA. x\nB. y\nC. z"},
                                      {"from": "gpt", "value": "The answer is A."}]},
        {"id": "4", "image": "4/image.png",
         "conversations": [{"from": "human", "value": "Context: Look.\nWhich?\nA. a\nB. b\n<image>"},
                           {"from": "gpt", "value": "The answer is B."}]},
    ]  # fmt: skip
    # The answering tool reads it, and it fits the problems.
    from llava.eval.tasks.science_conversations import read_conversations

    assert [q.image for q in read_conversations(str(target))] == [None, "4/image.png"]
    main(["--base-dir", str(tmp_path)])
    second = read_json(tmp_path / "llava_test_QCM-LEPA.json")[1]
    assert (second["image"], [turn["value"] for turn in second["conversations"]]) == ("4/image.png", [
        "Which?\nContext: Look.\nOptions: (A) a (B) b\n<image>",
        "LECTURE: Long.\nSOLUTION: Because.\n###\nANSWER: B.",
    ])  # fmt: skip
    main(["convert_to_jsonl", "--base_dir", str(tmp_path), "--prompt_format", "CQM-A"])
    assert read_jsonl(tmp_path / "scienceqa_test_CQM-A.jsonl")[0] == {
        "id": "9",
        "instruction": "Context: N/A\nQuestion: What?\nOptions: (A) x (B) y (C) z",
        "output": "The answer is A.",
    }  # fmt: skip
    capsys.readouterr()
    for wrong in ("QX-A", "QCM", "QCM-P", "CQM-A-other", "-lettered", ""):
        fails_with_one_line(main, ["--base-dir", tmp_path, "--prompt-format", wrong], capsys, "--prompt-format")


BARE = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "lecture": "", "solution": ""}
LONG = {**BARE, "answer": 1, "hint": "Look.", "lecture": "Le\nson.", "solution": "So."}


@pytest.mark.parametrize(
    "name, prompt",
    [
        ("CQM", "Context: Look.\nQuestion: Which?\nOptions: (A) a (B) b"),
        ("QCM", "Which?\nContext: Look.\nOptions: (A) a (B) b"),
        ("QCML", "Which?\nContext: Look.\nOptions: (A) a (B) b\nBECAUSE: Le\nson."),
        ("QCME", "Which?\nContext: Look.\nOptions: (A) a (B) b\nBECAUSE: So."),
        ("QCMLE", "Which?\nContext: Look.\nOptions: (A) a (B) b\nBECAUSE: Le\nson. So."),
        ("QCLM", "Which?\nContext: Look.\nBECAUSE: Le\nson.\nOptions: (A) a (B) b"),
        ("QCEM", "Which?\nContext: Look.\nBECAUSE: So.\nOptions: (A) a (B) b"),
        ("QCLEM", "Which?\nContext: Look.\nBECAUSE: Le\nson. So.\nOptions: (A) a (B) b"),
    ],
)
def test_science_prompts(name, prompt):
    assert prompt_and_answer(LONG, f"{name}-A") == (prompt, "The answer is B.")


@pytest.mark.parametrize(
    "name, full, bare",
    [
        ("A", "The answer is B.", "The answer is A."),
        ("AL", "The answer is B. BECAUSE: So.", "The answer is A."),  # the published script has AL and AE exchanged
        ("AE", "The answer is B. BECAUSE: Le\nson.", "The answer is A."),
        ("ALE", "The answer is B. BECAUSE: Le\nson. So.", "The answer is A."),
        ("AEL", "The answer is B. BECAUSE: So. Le\nson.", "The answer is A."),
        ("LA", "Le\nson. The answer is B.", "The answer is A."),
        ("EA", "So. The answer is B.", "The answer is A."),
        ("LEA", "Le\nson. So. The answer is B.", " The answer is A."),
        ("ELA", "So. Le\nson. The answer is B.", " The answer is A."),
        ("LEPA", "LECTURE: Le\nson.\nSOLUTION: So.\n###\nANSWER: B.", "###\nANSWER: A."),
    ],
)
def test_science_answers(name, full, bare):
    assert prompt_and_answer(LONG, f"QCM-{name}")[1] == full
    # Three blanks in a row become two, as there: only pairs are made one, and once.
    assert prompt_and_answer(BARE, f"QCM-{name}") == ("Which?\nContext: N/A\nOptions: (A) a (B) b", bare)


def test_science_prompt_without_a_reason_and_with_odd_text():
    assert prompt_and_answer(BARE, "QCMLE-A")[0] == "Which?\nContext: N/A\nOptions: (A) a (B) b"
    assert prompt_and_answer(BARE, "QCLM-A")[0] == "Which?\nContext: N/A\nBECAUSE: \nOptions: (A) a (B) b"
    odd = {**BARE, "question": "Is  Question: one?", "lecture": "one\\ntwo"}
    assert prompt_and_answer(odd, "QCML-LA") == (
        "Is one?\nContext: N/A\nOptions: (A) a (B) b\nBECAUSE: one\ntwo", "one\ntwo The answer is A.",
    )  # fmt: skip
