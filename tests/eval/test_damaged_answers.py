"""Answer files as they come in practice, through every scorer's command line: other line ends, ids and encodings,
damage, duplicates, gaps, and files of another benchmark.
"""

import json

import pytest

from llava.eval import (
    eval_gqa,
    eval_mmbench,
    eval_mme,
    eval_pope,
    eval_science_qa,
    eval_textvqa,
    eval_vqa,
)
from llava.eval.tasks.registry import get_task
from tests.eval.helpers import fails_with_one_line, read_json, write_jsonl
from tests.eval.small_data import write_all

# Benchmark -> scorer, its flags below the benchmark's folder, the key of its figure, a good answer per question.
SCORERS = {
    "textvqa": (eval_textvqa, {"annotation-file": "TextVQA_0.5.1_val.json"}, "accuracy", ["stop", "Stop.", "go"]),
    "gqa": (
        eval_gqa, {"annotation-file": "data/testdev_balanced_questions.json"}, "accuracy", ["Red", "green.", "black"],
    ),
    "pope": (
        eval_pope, {"annotation-dir": "coco", "question-file": "llava_pope_test.jsonl"}, "f1_mean",
        ["Yes", "No", "Yes", "Yes", "No", "No"],
    ),
    "mme": (
        eval_mme, {"annotation-dir": "MME_Benchmark_release_version", "question-file": "llava_mme.jsonl"},
        "perception", ["Yes", "No", "Yes", "Yes", "No", "other"],
    ),
    "sqa": (eval_science_qa, {"base-dir": "."}, "accuracy", ["A", "B", "B"]),
    "mmbench": (eval_mmbench, {"annotation-file": "mmbench_dev_20230712.tsv"}, "per_row", ["A", "B", "A", "C"]),
    "vqav2": (
        eval_vqa, {"annotation-file": "v2_mscoco_test-dev2015_annotations.json"}, "accuracy", ["red", "no", "Blue."],
    ),
    "vizwiz": (
        eval_vqa, {"annotation-file": "test.json", "question-file": "llava_test.jsonl"}, "accuracy",
        ["wall", "no", "The wall"],
    ),
}  # fmt: skip
COUNTS = ("missing", "duplicate", "unmatched")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("damaged data"))


@pytest.fixture(params=SCORERS)
def scorer(request, data, tmp_path, capsys):
    """`score(bytes)` -> (figure, counts, warnings); `score.records`: good answers, `score.fails(bytes, ...)`."""
    module, flags, figure, texts = SCORERS[request.param]
    entry = get_task(request.param)
    questions = entry.read_questions(entry.questions_path(data))
    argv = [x for key, value in flags.items() for x in (f"--{key}", str(data / entry.folder / value))]
    path = tmp_path / "answers.jsonl"
    argv += ["--result-file", str(path)]

    def score(content):
        path.write_bytes(content)
        capsys.readouterr()
        module.main([*argv, "--json", str(tmp_path / "score.json")])
        result = read_json(tmp_path / "score.json")
        return result[figure], [result[name] for name in COUNTS], capsys.readouterr().err

    def fails(content, *parts):
        path.write_bytes(content)
        capsys.readouterr()
        fails_with_one_line(module.main, argv, capsys, *parts)

    score.records = [
        {"question_id": question.id, "prompt": question.text, "text": text}
        for question, text in zip(questions, texts, strict=True)
    ]
    score.fails, score.name = fails, request.param
    return score


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def test_other_spellings_of_the_same_file_give_the_same_score(scorer):
    whole = scorer(lines(scorer.records))
    assert whole[0] > 0 and whole[1] == [0, 0, 0]
    as_text = [{**record, "question_id": str(record["question_id"])} for record in scorer.records]
    as_number = [
        {**r, "question_id": int(r["question_id"]) if str(r["question_id"]).isdigit() else r["question_id"]}
        for r in scorer.records
    ]
    for content in (
        b"\xef\xbb\xbf" + lines(scorer.records).replace(b"\n", b"\r\n"),
        lines(scorer.records).replace(b"\n", b"\n\n \n"),
        lines(scorer.records)[:-1],  # no line break at the end
        lines(as_text),
        lines(as_number) if scorer.name != "textvqa" else lines(as_text),  # image ids there are not numbers
        lines(reversed(scorer.records)),
    ):
        assert scorer(content)[:2] == whole[:2], content[:80]


def test_torn_last_line_is_left_out_and_told(scorer):
    """The rest is scored as if the last question had not been answered."""
    expected = scorer(lines(scorer.records[:-1]))
    content = lines(scorer.records)
    for cut in (2, len(lines(scorer.records[-1:])) - 1):
        figure, counts, err = scorer(content[:-cut])
        assert (figure, counts) == expected[:2] and counts[0] >= 1
        assert "the last line is cut off and left out" in err and "no answer" in err


def test_malformed_lines_elsewhere_are_named(scorer):
    good = lines(scorer.records)
    scorer.fails(b'{"question_id": 1, "te\n' + good, "answers.jsonl:1", "malformed JSON")
    scorer.fails(b'{"question_id": 1}\n' + good, "answers.jsonl:1", "'text'")
    scorer.fails(good + '{"question_id": 1, "text": "caf\u00e9"}\n'.encode("latin-1"), "not UTF-8", ".jsonl:")
    scorer.fails(good.decode().encode("utf-16"), "not UTF-8")
    scorer.fails(b"[1, 2]\n" if scorer.name not in ("gqa", "vqav2", "vizwiz") else b"3\n", "answers.jsonl")
    scorer.fails(b"", "no answer belongs")


def test_duplicates_and_unknown_ids_are_counted(scorer):
    whole = scorer(lines(scorer.records))
    first = {**scorer.records[0], "text": "something else"}
    strange = {"question_id": "nowhere/9", "prompt": "What?", "text": "x"}
    figure, counts, err = scorer(lines([first, *scorer.records, strange]))
    assert figure == whole[0], "the last answer counts"
    assert counts == [0, 1, 1]
    assert "1 answers repeat a question" in err and "1 answers belong to no question" in err


def test_empty_and_odd_answers_are_answers(scorer):
    """Empty texts, null, numbers, line breaks: scored, never a crash, nothing missing."""
    for text in ("", None, 3, 2.5, "\n", " . ", "...", "Yes\n", "A" * 5000, "\u0000", "\U0001f600"):
        _, counts, _ = scorer(lines({**record, "text": text} for record in scorer.records))
        assert counts == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ["Yes"]}, "text must be a number, a string or null, found a list"),
        ({"text": {}}, "text must be a number, a string or null, found an object"),
        ({"prompt": 5}, "prompt must be a string, found 5"),
        ({"question_id": None}, "question_id must be a number or a string, found null"),
        ({"question_id": [1]}, "question_id must be a number or a string, found a list"),
    ],
)
def test_values_of_another_type_are_named_with_their_line(scorer, change, message):
    records = [*scorer.records[:1], {**scorer.records[1], **change}, *scorer.records[2:]]
    scorer.fails(lines(records), f"answers.jsonl:2: {message}")


def test_numbers_and_nesting_that_json_can_spell_and_nobody_can_use(scorer):
    good = lines(scorer.records)
    for value in (b"9" * 400, b"9" * 5000, b"[" * 3000 + b"]" * 3000, b'{"a":' * 200 + b"1" + b"}" * 200):
        scorer.fails(good + b'{"question_id": 1, "text": ' + value + b"}\n", "answers.jsonl:", "malformed JSON")


def test_half_a_surrogate_pair_is_an_answer(scorer):
    """Also in an id, which is printed: nothing of it ends the program."""
    records = [{**record, "text": "\ud800"} for record in scorer.records]
    records.append({"question_id": "\udfff", "prompt": "\ud800", "text": "x"})
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    _, counts, err = scorer(content)
    assert counts == [0, 0, 1] and "\\udfff" in err


def test_a_prompt_that_is_null_is_none(scorer):
    content = lines({**record, "prompt": None} for record in scorer.records)
    if scorer.name in ("textvqa", "mme"):  # several questions have one id there
        scorer.fails(content, "no answer belongs")
    else:
        assert scorer(content)[1] == [0, 0, 0]


def test_answers_of_another_benchmark_are_refused(scorer, data):
    """Either no id is known, or none of the prompts holds the question of the same id."""
    refused = 0
    for name in SCORERS:
        entry = get_task(name)
        if name == scorer.name:
            continue
        questions = entry.read_questions(entry.questions_path(data))
        records = [{"question_id": q.id, "prompt": q.text, "text": "Yes"} for q in questions]
        # As in the real benchmarks, there are more of them than of ours.
        records += [{"question_id": f"more/{i}", "prompt": "What?", "text": "x"} for i in range(50)]
        scorer.fails(lines(records), "answers.jsonl: no")
        refused += 1
    assert refused == len(SCORERS) - 1


def test_other_prompts_with_the_right_ids_are_scored(data, tmp_path, capsys):
    """A part of the answers, in a prompt of the user's own: a warning, not a refusal."""
    folder = data / "gqa"
    annotation = folder / "data" / "testdev_balanced_questions.json"
    ids = list(read_json(annotation))[:2]
    path = write_jsonl(tmp_path / "a.jsonl", [{"question_id": i, "prompt": "My words", "text": "red"} for i in ids])
    eval_gqa.main(["--annotation-file", str(annotation), "--result-file", str(path)])
    assert "2 of 2 answers have a prompt that does not hold" in capsys.readouterr().err


def test_a_few_strange_prompts_are_told(data, tmp_path, capsys):
    entry = get_task("pope")
    questions = entry.read_questions(entry.questions_path(data))
    records = [{"question_id": q.id, "prompt": q.text, "text": "Yes"} for q in questions]
    records[0]["prompt"] = "Is there a cat?"
    path = write_jsonl(tmp_path / "a.jsonl", records)
    folder = data / "pope"
    argv = ["--annotation-dir", folder / "coco", "--question-file", folder / "llava_pope_test.jsonl"]
    eval_pope.main([str(x) for x in (*argv, "--result-file", path)])
    assert "1 of 6 answers have a prompt that does not hold" in capsys.readouterr().err
