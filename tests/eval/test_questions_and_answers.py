"""Question files, chunks and the resumable answer file; no model involved."""

import json

import pytest

from llava.eval.answering.answer_file import AnswerFile
from llava.eval.common.questions import chunk, read_questions
from llava.utils import UserError
from tests.eval.helpers import read_jsonl, write_jsonl

RECORDS = [
    {"question_id": "img1", "image": "1.png", "text": "What word?"},
    {"question_id": "img1", "image": "1.png", "text": "What color?"},  # ids are not unique in TextVQA and MME
    {"question_id": 7, "text": "No image?"},
]
METADATA = {"method": "autoprune", "target_tokens": 64}


@pytest.fixture
def questions(tmp_path):
    return read_questions(write_jsonl(tmp_path / "q.jsonl", RECORDS))


def make(path, resume=True, model="m", metadata=METADATA):
    return AnswerFile(path, model, metadata, resume)


def run(path, questions, upto=None, **kwargs):
    """Answers the pending questions, at most `upto` of them, as an interrupted run would."""
    file = make(path, **kwargs)
    pending = file.pending(questions)
    file.open()
    for question in pending[:upto]:
        file.append(question, f"answer to {question.text}", {"nominal": 64.0})
    file.close(questions)
    return pending


def test_questions_keep_ids_lines_and_missing_images(questions):
    assert [q.id for q in questions] == ["img1", "img1", 7]
    assert questions[2].image is None and questions[2].source.endswith("q.jsonl:3")


def test_blank_lines_crlf_and_byte_order_mark_are_accepted(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [json.dumps(record).encode() for record in RECORDS]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n" + lines[1] + b"\r\n")
    assert [q.source.rsplit(":", 1)[1] for q in read_questions(path)] == ["1", "3"]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"question_id": 1, "text": "a"', "malformed JSON"),
        ('["question_id"]', "JSON object"),
        ('{"text": "a"}', "'question_id'"),
        ('{"question_id": 1}', "'text'"),
        ('{"question_id": 1, "text": 5}', "text must be a string"),
        ('{"question_id": [1], "text": "a"}', "question_id must be"),
        ('{"question_id": 1, "text": "a", "image": 3}', "image must be"),
        ("[" * 100000, "malformed JSON"),
        ('{"question_id": ' + "1" * 5000 + ', "text": "a"}', "malformed JSON"),
        ('{"question_id": 1, "text": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_bad_line_is_named(tmp_path, line, part):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match="q.jsonl:2") as error:
        read_questions(path)
    assert part in str(error.value)


def test_empty_file_is_an_error(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(tmp_path / "q.jsonl")


def test_not_utf8_is_named(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b'{"question_id": 1, "text": "caf\xe9"}\n')
    with pytest.raises(UserError, match="q.jsonl:1: not UTF-8"):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(("count", "parts", "sizes"), [(10, 3, [4, 4, 2]), (2, 4, [1, 1, 0, 0]), (5, 1, [5])])
def test_chunks_cover_everything_in_order(count, parts, sizes):
    chunks = [list(chunk(range(count), parts, i)) for i in range(parts)]
    assert [len(c) for c in chunks] == sizes
    assert sum(chunks, []) == list(range(count))


@pytest.mark.parametrize(("parts", "index"), [(0, 0), (2, 2), (2, -1)])
def test_bad_chunks(parts, index):
    with pytest.raises(UserError, match="chunk"):
        chunk([1, 2], parts, index)


def test_answers_have_upstreams_format(tmp_path, questions):
    path = tmp_path / "deep" / "a.jsonl"
    run(path, questions)
    records = read_jsonl(path)
    assert [r["question_id"] for r in records] == ["img1", "img1", 7]
    assert list(records[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert records[0]["prompt"] == "What word?" and records[0]["model_id"] == "m"
    assert records[0]["metadata"] == {**METADATA, "tokens": {"nominal": 64.0}}
    assert len({r["answer_id"] for r in records}) == 3


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resumed_run_ends_with_the_same_bytes(tmp_path, questions, done):
    run(tmp_path / "whole.jsonl", questions)
    run(tmp_path / "a.jsonl", questions, upto=done)
    assert len(run(tmp_path / "a.jsonl", questions)) == 3 - done
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_torn_last_line_is_answered_again(tmp_path, questions, cut):
    path = tmp_path / "a.jsonl"
    run(path, questions)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [q.id for q in run(path, questions)] == [7]
    assert path.read_bytes() == whole


def test_answer_that_came_late_moves_to_its_place(tmp_path, questions):
    """The first question was skipped in the first run (corrupt image) and answered in the second."""
    path = tmp_path / "a.jsonl"
    run(path, questions[1:])
    assert [q.text for q in run(path, questions)] == ["What word?"]
    assert [r["prompt"] for r in read_jsonl(path)] == [r["text"] for r in RECORDS]


def test_answers_of_another_run_are_not_mixed(tmp_path, questions):
    path = tmp_path / "a.jsonl"
    run(path, questions)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"a.jsonl:1: .*target_tokens 64, now 128"):
        make(path, metadata={**METADATA, "target_tokens": 128})
    with pytest.raises(UserError, match="x0"):
        make(path, metadata={**METADATA, "x0": 3.0})
    with pytest.raises(UserError, match="model_id 'm', now 'other'"):
        make(path, model="other")
    assert path.read_bytes() == before
    run(path, questions[:1], resume=False, model="other")
    assert [r["model_id"] for r in read_jsonl(path)] == ["other"]


def test_nothing_changes_before_open(tmp_path, questions):
    path = tmp_path / "a.jsonl"
    make(path)
    assert not path.exists()
    run(path, questions)
    before = path.read_bytes()
    make(path, resume=False)
    assert path.read_bytes() == before


def test_unwritable_answers_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write answers file"):
        make(tmp_path / "file" / "a.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        make(tmp_path)


def test_broken_line_in_the_middle_is_named(tmp_path, questions):
    path = tmp_path / "a.jsonl"
    run(path, questions)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{oops\n" + lines[2])
    with pytest.raises(UserError, match="a.jsonl:2"):
        make(path)


def test_line_separators_inside_answers_survive_sorting(tmp_path, questions):
    path = tmp_path / "a.jsonl"
    file = make(path)
    file.open()
    file.append(questions[1], "one\u2028two\nthree")
    file.close(questions)
    run(path, questions)
    assert [r["text"] for r in read_jsonl_strict(path)][1] == "one\u2028two\nthree"


def read_jsonl_strict(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
