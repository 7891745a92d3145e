"""The tools for ScienceQA, MMBench and open questions: prompts, answer files, resuming, rounds, damage."""

import base64
import csv
import io
import json

import pytest
from PIL import Image

from llava.eval import model_vqa, model_vqa_mmbench, model_vqa_science
from llava.eval.tasks import mmbench as mmbench_task
from llava.eval.tasks import mmbench_rows as mmbench_rows_task
from llava.eval.tasks import science_conversations as science_conversations_task
from llava.eval.tasks import science_qa as science_qa_task
from tests.eval.helpers import fails_with_one_line, read_jsonl, write_json

LETTER = "Answer with the option's letter from the given choices directly."
CONVERSATIONS = [
    {
        "id": "7",
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "Context: N/A\nWhich color?\nA. red\nB. blue\n<image>"},
            {"from": "gpt", "value": "The answer is A."},
        ],
    },
    {"id": 8, "conversations": [{"from": "human", "value": "Which day?\nA. one\nB. two"}]},
]


@pytest.fixture
def prompts(monkeypatch):
    """The full prompts that a run gave to the tokenizer, in order."""
    from llava.eval.answering import adapter as runner

    seen = []
    tokenize = runner.tokenizer_image_token
    monkeypatch.setattr(runner, "tokenizer_image_token", lambda p, *a, **k: (seen.append(p), tokenize(p, *a, **k))[1])
    return seen


def flags(checkpoint, data, questions, *more, answers="a.jsonl"):
    named = ("--model-path", checkpoint, "--question-file", questions, "--answers-file", data / answers)
    return [str(x) for x in (*named, "--target-token-num", 4, "--max-new-tokens", 2, "--device", "cpu", *more)]


def image_text(color="red", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# -- ScienceQA


def test_conversations_become_questions(tmp_path):
    path = write_json(tmp_path / "q.json", CONVERSATIONS)
    first, second = science_conversations_task.read_conversations(str(path))
    assert (first.id, first.image, second.id, second.image) == ("7", "0.png", 8, None)
    assert first.text == "<image>\nContext: N/A\nWhich color?\nA. red\nB. blue"
    assert second.text == "Which day?\nA. one\nB. two"
    asked = science_conversations_task.read_conversations(str(path), single_prediction=True)
    assert [q.text for q in asked] == [f"{q.text}\n{LETTER}" for q in (first, second)]
    assert (
        science_conversations_task.without_placeholder(asked[0])
        == f"Context: N/A\nWhich color?\nA. red\nB. blue\n{LETTER}"
    )


def test_science_run_and_its_score(checkpoint, data, prompts, capsys):
    questions = write_json(data / "llava_test_CQM-A.json", CONVERSATIONS)
    argv = flags(checkpoint, data, questions, "--image-folder", data / "images", "--single-pred-prompt")
    assert model_vqa_science.main(argv) == 0
    assert len(prompts) == 2
    assert f"USER: <image>\nContext: N/A\nWhich color?\nA. red\nB. blue\n{LETTER} ASSISTANT:" in prompts[0]
    assert f"USER: Which day?\nA. one\nB. two\n{LETTER} ASSISTANT:" in prompts[1]
    records = read_jsonl(data / "a.jsonl")
    assert [r["question_id"] for r in records] == ["7", 8]
    assert records[0]["prompt"].startswith("<image>\nContext") and records[1]["prompt"].startswith("Which day?")
    assert list(records[0])[:6] == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert records[0]["metadata"]["tokens"]["visual"] == 16 and records[1]["metadata"]["tokens"]["visual"] == 0
    # The scorer takes the file as it is: one of the two problems has an image.
    problems = {key: {"choices": ["x", "y"], "answer": 0} for key in ("7", "8")}
    result = science_qa_task.evaluate_science_qa(problems, list(problems), records)
    assert (result["total"], result["img_total"], result["coverage"].missing) == (2, 1, [])
    # A complete run is not repeated; one with another prompt is not mixed with it.
    before = (data / "a.jsonl").read_bytes()
    assert model_vqa_science.main(argv) == 0 and len(prompts) == 2
    capsys.readouterr()
    fails_with_one_line(model_vqa_science.main, argv[:-1], capsys, "a.jsonl:1", "single_pred_prompt", "--overwrite")
    assert (data / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([], "JSON list"),
        ({"id": 1}, "JSON list"),
        ([1], "entry 0 needs an 'id'"),
        ([{"id": None}], "entry 0 needs an 'id'"),
        ([{"id": "5"}], "(id 5) needs a list of 'conversations'"),
        ([{"id": "5", "conversations": [{"from": "human"}]}], "(id 5) needs a list of 'conversations'"),
        ([{"id": "5", "image": 3, "conversations": [{"value": "?"}]}], "(id 5): image must be a string"),
        ([{"id": "5", "conversations": [{"value": "\ud800"}]}], "(id 5): holds characters"),
    ],
)
def test_bad_conversations(tmp_path, capsys, content, part):
    path = tmp_path / "q.json"
    path.write_text(json.dumps(content))
    argv = ["--model-path", "m", "--question-file", path, "--answers-file", tmp_path / "a.jsonl"]
    fails_with_one_line(model_vqa_science.main, argv, capsys, "q.json", part)


# -- MMBench

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")
ROWS = [
    [3, "Two\nlines?", "", "cat", "dog", "cow", "", "B", "c", image_text()],
    [1000003, "Which?", "Look.", "x", "y", "", "", "A", "c", "3"],  # its image is that of row 3
    [4, "None?", "nan", "x", "nan", "z", "w", "A", "c", image_text("blue", (20, 50))],
]


def write_tsv(path, rows=ROWS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([COLUMNS, *rows])
    return path


def test_rows_become_prompts():
    rows = [dict(zip(COLUMNS, map(str, row), strict=True)) for row in ROWS]
    assert mmbench_rows_task.row_prompts(rows[0]) == [
        ("Two\nlines?\nA. cat\nB. dog\nC. cow", ["cat", "dog", "cow"], ["A", "B", "C"])
    ]
    assert mmbench_rows_task.row_prompts(rows[1])[0][0] == "Look.\nWhich?\nA. x\nB. y"
    assert mmbench_rows_task.row_prompts(rows[2]) == [("None?\nA. x", ["x"], ["A"])], "options end at an empty cell"


def test_rounds_rotate_the_options():
    rounds = mmbench_rows_task.row_prompts(dict(zip(COLUMNS, map(str, ROWS[0]), strict=True)), all_rounds=True)
    assert [prompt.split("\n", 2)[2] for prompt, _, _ in rounds] == [
        "A. cat\nB. dog\nC. cow",
        "A. dog\nB. cow\nC. cat",
        "A. cow\nB. cat\nC. dog",
    ]
    assert [letters for _, _, letters in rounds] == [["A", "B", "C"], ["B", "C", "A"], ["C", "A", "B"]]
    assert rounds[2][1] == ["cow", "cat", "dog"]


def test_mmbench_run(checkpoint, data, prompts, capsys):
    questions = write_tsv(data / "dev.tsv")
    argv = flags(checkpoint, data, questions, "--single-pred-prompt", "--lang", "cn", "--batch-size", 2)
    assert model_vqa_mmbench.main(argv) == 0
    assert "USER: <image>\nLook.\nWhich?\nA. x\nB. y\n请直接回答选项字母。 ASSISTANT:" in prompts[1]
    records = read_jsonl(data / "a.jsonl")
    assert [r["question_id"] for r in records] == [3, 1000003, 4]
    assert records[1]["prompt"] == "Look.\nWhich?\nA. x\nB. y", "without the instruction, as upstream"
    assert set(records[0]) == {
        *("question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id", "model_id", "metadata")
    }
    assert (records[0]["round_id"], records[0]["options"], records[0]["option_char"]) == (
        0,
        ["cat", "dog", "cow"],
        ["A", "B", "C"],
    )
    assert [r["metadata"]["tokens"]["visual"] for r in records] == [16] * 3
    assert records[0]["metadata"]["lang"] == "cn"
    result = mmbench_task.score_files(str(questions), str(data / "a.jsonl"))
    assert (result["rows"], result["questions"], result["coverage"].complete) == (3, 2, True)
    capsys.readouterr()
    fails_with_one_line(model_vqa_mmbench.main, [*argv, "--lang", "en"], capsys, "a.jsonl:1", "lang")


def test_all_rounds_in_chunks_and_resumed(checkpoint, data, prompts):
    """Chunks are cut between rows, never between the rounds of one; a torn file is completed."""
    questions = write_tsv(data / "dev.tsv")
    argv = flags(checkpoint, data, questions, "--all-rounds")
    assert model_vqa_mmbench.main(argv) == 0
    whole = (data / "a.jsonl").read_bytes()
    assert [(r["question_id"], r["round_id"]) for r in read_jsonl(data / "a.jsonl")] == [
        *((3, 0), (3, 1), (3, 2), (1000003, 0), (1000003, 1), (4, 0))
    ]
    assert "\nA. dog\nB. cow\nC. cat ASSISTANT:" in prompts[1]
    for index in (0, 1):
        part = flags(checkpoint, data, questions, "--all-rounds", answers=f"{index}.jsonl")
        assert model_vqa_mmbench.main([*part, "--num-chunks", "2", "--chunk-idx", str(index)]) == 0
    assert (data / "0.jsonl").read_bytes() + (data / "1.jsonl").read_bytes() == whole
    (data / "a.jsonl").write_bytes(whole[:-200])
    del prompts[:]
    assert model_vqa_mmbench.main(argv) == 0
    assert (data / "a.jsonl").read_bytes() == whole and 1 <= len(prompts) < 6


def test_damaged_images_cost_only_themselves(checkpoint, data, capsys):
    rows = [[*ROWS[0][:-1], "iVBORw0KGgo="], [*ROWS[1][:-1], ""], ROWS[2]]
    with pytest.raises(SystemExit) as exit_info:
        model_vqa_mmbench.main(flags(checkpoint, data, write_tsv(data / "dev.tsv", rows)))
    assert exit_info.value.code == 3
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == [4]
    printed = capsys.readouterr().err
    assert "dev.tsv:3: image of row 3 cannot be read" in printed and "image of row 1000003" in printed


def test_bad_tsv(tmp_path, capsys):
    def fails(rows, *parts):
        argv = ["--model-path", "m", "--question-file", write_tsv(tmp_path / "t.tsv", rows)]
        argv += ["--answers-file", tmp_path / "a.jsonl"]
        fails_with_one_line(model_vqa_mmbench.main, argv, capsys, "t.tsv", *parts)

    fails([], "holds no question")
    fails([ROWS[0], ROWS[0]], "index 3 occurs twice")
    fails([["x", *ROWS[0][1:]]], "t.tsv:3", "index 'x'")
    argv = ["--model-path", "m", "--question-file", tmp_path / "t.tsv", "--lang", "fr"]
    fails_with_one_line(model_vqa_mmbench.main, argv, capsys, "--lang", "fr")
    argv = ["--model-path", "m", "--question-file", tmp_path / "t.tsv", "--limit", "0"]
    fails_with_one_line(model_vqa_mmbench.main, argv, capsys, "--limit")
    fails_with_one_line(model_vqa_science.main, argv, capsys, "--limit")


# -- open questions


def test_open_questions_may_get_long_answers(checkpoint, data):
    assert model_vqa.build_parser().parse_args(["--model-path", "m"]).max_new_tokens == 1024
    argv = flags(checkpoint, data, data / "q.jsonl", "--image-folder", data / "images", "--limit", 2)
    assert model_vqa.main(argv) == 0
    assert [r["prompt"] for r in read_jsonl(data / "a.jsonl")] == ["What color?", "Is it a star?"]


@pytest.mark.parametrize("tool", [model_vqa, model_vqa_science, model_vqa_mmbench])
def test_help_names_the_tool(tool, capsys):
    with pytest.raises(SystemExit) as exit_info:
        tool.main(["--help"])
    printed = capsys.readouterr().out
    assert exit_info.value.code == 0 and tool.__name__ in printed and "--target-token-num" in printed
    assert "(default: 1024)" in printed
