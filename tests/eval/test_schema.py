"""Readers of JSON files and the shapes that values must have: what is refused, and what the message names."""

import json

import pytest

from llava import jsonfiles
from llava.eval.common.jsonio import read_records, write_json
from llava.schema import (
    FLAG,
    ID,
    NUMBER,
    SCALAR,
    TEXT,
    WHOLE,
    Fields,
    ListOf,
    MapOf,
    above,
    at_least,
    between,
    check,
    one_of,
    optional,
)
from llava.utils import UserError

NAN, INFINITY = float("nan"), float("inf")
SHAPE = Fields({"id": ID, "grades?": ListOf(NUMBER, least=1, most=2), "by name?": MapOf(Fields({"text": TEXT}))})


@pytest.mark.parametrize(
    ("shape", "good", "bad"),
    [
        (TEXT, ["", "x"], [None, 1, ["x"]]),
        (WHOLE, [0, -3, 2**63 - 1], [True, 1.0, "1", 2**63, None]),
        (NUMBER, [0, -1.5, 1e100], [True, NAN, INFINITY, 1e101, 10**101, "1", None, []]),
        (FLAG, [True, False], [0, 1, "true", None]),
        (ID, ["a", 3, 2.0], [None, True, [], {}]),
        (SCALAR, [None, 1, "x"], [[], {}]),
        (at_least(1), [1, 2], [0, -1, 1.5]),
        (above(0), [0.1], [0, -1, NAN]),
        (between(0, 1), [0, 0.5, 1], [-0.1, 1.1, NAN, "0.5"]),
        (one_of(1, "a"), [1, "a"], [True, 1.0, "b"]),
        (optional(TEXT), [None, "x"], [1]),
    ],
)
def test_kinds(shape, good, bad):
    for value in good:
        assert check(value, shape, "f") is value
    for value in bad:
        with pytest.raises(UserError, match="^f: must be"):
            check(value, shape, "f")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "f:3: must be an object, found an empty list"),
        ({}, "f:3: key 'id' is missing"),
        ({"id": None}, "f:3: id must be a number or a string, found null"),
        ({"id": 1, "grades": []}, "f:3: grades must have 1 or more entries, found 0"),
        ({"id": 1, "grades": [1, "a" * 99]}, f"f:3: grades[1] must be {NUMBER.name}, found '{'a' * 39}..."),
        ({"id": 1, "by name": {"x\n": {"text": 5}}}, "f:3: by name.x\\n.text must be a string, found 5"),
        ({"id": 1, "by name": {"x": {}}}, "f:3: by name.x: key 'text' is missing"),
    ],
)  # fmt: skip
def test_messages_name_the_place_and_what_was_found(value, message):
    with pytest.raises(UserError) as error:
        check(value, SHAPE, "f:3")
    assert str(error.value) == message


def test_lists_name_the_entry():
    with pytest.raises(UserError, match=r"^f: entry 1\.id must be"):
        check([{"id": 1}, {"id": []}], ListOf(SHAPE), "f")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.json:1: malformed JSON"),
        (b"\xff\xfe{\x00}\x00", r"x\.json: not UTF-8 text \(byte 0\)"),
        (b'{"a":\n1,\n}', r"x\.json:3: malformed JSON"),
        (b'{"a": 1}\n{"a": 2}\n', "is it JSON lines"),
        (b"[" * 5000, "nested too deeply"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested too deeply"),
        (b'{"a": ' + b"1" * 301 + b"}", "a number of 301 digits"),
        (b'{"a": -' + b"1" * 5000 + b"}", "a number of 5001 digits"),
        (b"[1]", "must be a JSON object, found a list"),
    ],
)
def test_files_that_are_no_json_object(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        jsonfiles.read_object(tmp_path / "x.json", "a file")


def test_what_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a":' * 50 + b"1" * 300 + b"}" * 50 + b"\r\n")
    value = jsonfiles.read_json(path, "a file")
    for _ in range(50):
        value = value["a"]
    assert value == int("1" * 300)
    path.write_text('{"a": 1, "a": 2}')
    assert jsonfiles.read_json(path, "a file") == {"a": 2}
    with pytest.raises(UserError, match="key 'a' occurs twice"):
        jsonfiles.read_json(path, "a file", unique_keys=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": 1}\n[1]\n', "x.jsonl:2: .* one JSON object per line, found a list"),
        (b"[\n1]", "x.jsonl:1: .*is it one JSON value"),
        (b'{"id": 1}\n\n\xe9\n', "x.jsonl:3: not UTF-8"),
        (b'{"id": 1}\n{"ID": 1}\n', "x.jsonl:2: key 'id' is missing"),
        (b'{"id": 1}\n{"id": {}}\n', "x.jsonl:2: id must be"),
    ],
)
def test_lines(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "x.jsonl", "a file", SHAPE)


@pytest.mark.parametrize("path", ["nowhere", "", ".", "a\0b", "x" * 5000, "\ud800"])
def test_paths_that_are_no_files(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a file") as error:
        jsonfiles.read_text(path, "a file")
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_survives_writing(tmp_path):
    value = json.loads(r'{"a\ud800": "b\udfff", "c": "\ud83d\ude00"}')
    write_json(tmp_path / "x.json", value)
    assert jsonfiles.read_json(tmp_path / "x.json", "a file") == value
    assert "\U0001f600".encode() in (tmp_path / "x.json").read_bytes()
