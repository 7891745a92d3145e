"""The miniature VQAv2, VizWiz, ScienceQA, MMBench, SEED-Bench, MM-Vet and LLaVA-Bench: read by the real loaders, and
scored right by the real scorers when the answers are right, wrong when they are not."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from llava.eval.common.questions import read_questions
from llava.eval.tasks import mmbench as mmbench_task
from llava.eval.tasks import mmvet as mmvet_task
from llava.eval.tasks import science_qa as science_qa_task
from llava.eval.tasks import seed as seed_task
from llava.eval.tasks import vqa as vqa_task
from llava.eval.tasks.mmbench_data import ROTATION
from llava.eval.tasks.mmbench_rows import read_rows
from llava.eval.tasks.science_conversations import read_conversations
from llava.eval.tasks.upload import load_questions as load_records
from playground.tiny.build import benchmarks as mb
from playground.tiny.build.items import Build, Item
from playground.tiny.measure.grade_mmvet import grade, grade_all
from playground.tiny.measure.grade_mmvet import main as grade_main
from playground.tiny.world import chinese, formats
from playground.tiny.world.questions import LETTER, SHORT, Question
from playground.tiny.world.scenes import COLORS, SHAPES, Scene

DATA = mb.DATA
LINES = {
    "vqav2": "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
    "vizwiz": "vizwiz/llava_test.jsonl",
    "seed_bench": "seed_bench/llava-seed-bench.jsonl",
    "mm-vet": "mm-vet/llava-mm-vet.jsonl",
    "llava-bench": "llava-bench-in-the-wild/questions.jsonl",
}
FOLDERS = {
    "vqav2": "vqav2/test2015",
    "vizwiz": "vizwiz/test",
    "seed_bench": "seed_bench",
    "mm-vet": "mm-vet/images",
    "llava-bench": "llava-bench-in-the-wild/images",
}
TABLES = {
    "mmbench": ("mmbench/mmbench_dev_20230712.tsv", "en"),
    "mmbench_cn": ("mmbench_cn/mmbench_dev_cn_20231003.tsv", "cn"),
}


@pytest.fixture(scope="module")
def build() -> Build:
    return mb.build_all(tuple(name for name in mb.BUILDERS if name not in mb.ARENA))


def items(build: Build, name: str) -> list[Item]:
    return [item for item in build.items if item.benchmark == name]


def answers(build: Build, name: str) -> list[dict]:
    """The right answers as an answer file holds them."""
    key = "id" if name == "scienceqa" else "question_id"
    return [
        {"question_id": i.line[key], "prompt": i.line.get("text", ""), "text": i.question.answer}
        for i in items(build, name)
    ]


@pytest.mark.parametrize("name", tuple(LINES))
def test_line_files_are_read_by_the_loader_and_have_their_pictures(build: Build, name: str) -> None:
    questions = read_questions(DATA / LINES[name])
    assert [q.text for q in questions] == [i.question.text for i in items(build, name)]
    assert len({q.id for q in questions}) == len(questions)
    assert all((DATA / FOLDERS[name] / q.image).is_file() for q in questions)
    assert len(questions) >= (30 if name == "llava-bench" else 100)


def test_prompts_end_as_llava_asks(build: Build) -> None:
    for name, last in (("vqav2", SHORT), ("vizwiz", SHORT), ("seed_bench", LETTER)):
        assert {i.question.text.split("\n")[-1] for i in items(build, name)} == {last}
    assert {i.question.text.split("\n")[1] for i in items(build, "vizwiz")} == {formats.UNANSWERABLE}
    assert all("\n" not in i.question.text for i in items(build, "mm-vet") + items(build, "llava-bench"))


def test_vqav2_truth_joins_and_the_whole_split_holds_more(build: Build) -> None:
    truth = json.loads((DATA / "vqav2/v2_mscoco_test-dev2015_annotations.json").read_text())["annotations"]
    by_id = {entry["question_id"]: entry for entry in truth}
    dev = items(build, "vqav2")
    assert set(by_id) == {i.line["question_id"] for i in dev}
    for item in dev:
        entry = by_id[item.line["question_id"]]
        said = Counter(a["answer"] for a in entry["answers"])
        assert len(entry["answers"]) == 10 and [a["answer_id"] for a in entry["answers"]] == list(range(1, 11))
        assert said.most_common(1)[0][0] == entry["multiple_choice_answer"] == item.question.answer.lower()
        assert said[entry["multiple_choice_answer"]] >= 8
    assert {e["answer_type"] for e in truth} == {"yes/no", "number", "other"}
    whole = load_records(str(DATA / "vqav2/llava_vqav2_mscoco_test2015.jsonl"))
    upload = vqa_task.vqav2_upload(whole, {str(a["question_id"]): a["text"] for a in answers(build, "vqav2")})
    assert len(upload) == len(whole) > len(dev)
    assert sum(entry["answer"] == "" for entry in upload) == len(whole) - len(dev)


def test_vizwiz_is_partly_unanswerable_and_truthful(build: Build) -> None:
    truth = json.loads((DATA / "vizwiz/test.json").read_text())
    own = items(build, "vizwiz")
    assert [e["image"] for e in truth] == [i.line["image"] for i in own]
    assert 0.3 < sum(not e["answerable"] for e in truth) / len(truth) < 0.5
    for entry, item in zip(truth, own, strict=True):
        asked, things = item.question, item.scene.things
        assert entry["answerable"] == (asked.answer != "Unanswerable")
        if asked.answer == "Unanswerable" and asked.question.startswith("What color"):
            assert not any(SHAPES[t.shape] == asked.question.rstrip("?").split()[-1] for t in things)
        elif asked.answer == "Unanswerable" and asked.question.startswith("What shape"):
            assert not any(COLORS[t.color] == asked.question.split()[4] for t in things)
        elif asked.answer == "Unanswerable":
            assert all(things[i].word < 0 for i in asked.asked)
    questions = [{"question_id": i.line["question_id"], "image": i.line["image"]} for i in own]
    texts = {str(a["question_id"]): a["text"] for a in answers(build, "vizwiz")}
    assert len(vqa_task.vizwiz_upload(questions, texts)) == len(own)


def test_scienceqa_scores_right_answers_as_right(build: Build) -> None:
    questions = read_conversations(str(DATA / "scienceqa/llava_test_CQM-A.json"), True)
    own = items(build, "scienceqa")
    assert [q.text.removeprefix("<image>\n") for q in questions] == [i.question.text for i in own]
    with_image = [q for q in questions if q.image]
    assert 0.3 < len(with_image) / len(questions) < 0.8
    assert all((DATA / "scienceqa/images/test" / q.image).is_file() for q in with_image)
    problems, ids = science_qa_task.load_problems(str(DATA / "scienceqa"))
    said = [
        {"question_id": q.id, "prompt": q.text, "text": i.question.answer} for q, i in zip(questions, own, strict=True)
    ]
    result = science_qa_task.evaluate_science_qa(problems, ids, said)
    assert result["accuracy"] == result["img_accuracy"] == 100 and result["total"] == len(own)
    assert result["img_total"] == len(with_image) and len(result["subjects"]) == 3
    guessed = science_qa_task.evaluate_science_qa(problems, ids, [{**a, "text": "A"} for a in said])
    assert 15 < guessed["accuracy"] < 55, "the right letters are spread"
    assert all(
        p["hint"] == "" or f"Context: {p['hint']}\n" in q.text
        for p, q in zip(problems.values(), questions, strict=True)
    )
    assert any(p["hint"] for p in problems.values())


@pytest.mark.parametrize("name", tuple(TABLES))
def test_mmbench_tables(build: Build, name: str) -> None:
    path, lang = TABLES[name]
    rows, images = read_rows(str(DATA / path))
    questions = [question for row in rows for question in row]
    own = items(build, name)
    by_id = {i.line["question_id"]: i for i in own}
    assert {q.id: q.text for q in questions} == {key: i.question.body for key, i in by_id.items()}
    # A rotated row names the row that holds its picture.
    assert all(images[str(key)] == images[str(key % ROTATION)] for key in by_id)
    table = mmbench_task.load_rows(str(DATA / path))
    result = mmbench_task.evaluate_mmbench(table, answers(build, name))
    assert result["circular"] == result["single_pass"] == result["per_row"] == 100
    assert result["questions"] == (80 if name == "mmbench" else 60)
    counts = Counter(key % ROTATION for key in table)
    assert {len([c for c in "ABCD" if table[key][c]]) for key in counts} == {2, 3, 4}
    assert all(counts[key] == len([c for c in "ABCD" if table[key][c]]) for key in counts)
    for key, row in table.items():  # a rotation asks the same about the same options
        first = table[key % ROTATION]
        assert row["question"] == first["question"] and row[row["answer"]] == first[first["answer"]]
        assert sorted(row[c] for c in "ABCD") == sorted(first[c] for c in "ABCD")
    single = mmbench_task.evaluate_mmbench(table, [{**a, "text": "A"} for a in answers(build, name)])
    assert single["circular"] == 0 and 20 < single["per_row"] < 50
    assert any(row["hint"] for row in table.values()) and not all(row["hint"] for row in table.values())
    assert all(ord(row["question"][0]) > 255 for row in table.values()) == (lang == "cn")


def test_chinese_questions_say_what_the_scene_shows(build: Build) -> None:
    for item in items(build, "mmbench_cn"):
        asked, things = item.question, item.scene.things
        if asked.question.endswith("是什么颜色？"):
            (thing,) = (
                t for t in things if chinese.SHAPE[SHAPES[t.shape]] == asked.question.removesuffix("是什么颜色？")
            )
            assert asked.options["ABCD".index(asked.answer)] == chinese.COLOR[COLORS[thing.color]]
        if asked.question.startswith("图中有几个"):
            name = asked.question.removeprefix("图中有几个").removesuffix("？")
            number = sum(
                name in (chinese.SHAPE[SHAPES[t.shape]], chinese.COLOR[COLORS[t.color]] + "物体") for t in things
            )
            assert asked.options["ABCD".index(asked.answer)] == str(number)


def test_seed_bench_scores_right_answers_as_right(build: Build) -> None:
    questions, names = seed_task.load_seed(str(DATA / "seed_bench/SEED-Bench.json"))
    texts = {str(a["question_id"]): a["text"] for a in answers(build, "seed_bench")}
    result = seed_task.seed_accuracy(questions, texts, names)
    assert result["Total"] == result["image"] == (160, 160)
    assert all(right == number > 0 for right, number in result.values())
    lines = {i.line["question_id"]: i.line["text"].split("\n") for i in items(build, "seed_bench")}
    for entry in questions:
        shown = lines[entry["question_id"]]
        assert shown[0] == entry["question"]
        assert shown[1:5] == [f"{c}. {entry['choice_' + c.lower()]}" for c in "ABCD"]
    spread = Counter(entry["answer"] for entry in questions)
    assert set(spread) == set("ABCD") and max(spread.values()) < 80


def test_mmvet_reference_answers_get_full_grades(build: Build, tmp_path, capsys) -> None:
    capabilities = mmvet_task.load_capabilities(str(DATA / "mm-vet/mm-vet.json"))
    assert {c for names in capabilities.values() for c in names} == set(mmvet_task.CAPABILITIES)
    said = {f"v1_{a['question_id']}": a["text"] for a in answers(build, "mm-vet")}
    (tmp_path / "run.json").write_text(json.dumps(said))
    grade_main(["--annotation-file", str(DATA / "mm-vet/mm-vet.json"), "--result-file", str(tmp_path / "run.json")])
    assert "not by GPT-4" in capsys.readouterr().out
    grades = tmp_path / "run_rule-grade-1runs.json"
    result = mmvet_task.score_files(str(grades), str(DATA / "mm-vet/mm-vet.json"))
    assert result["total"] == 100 and result["coverage"].scored == len(capabilities)
    mute = grade_all(json.loads((DATA / "mm-vet/mm-vet.json").read_text()), dict.fromkeys(said, "I do not know."))
    assert {entry["score"][0] for entry in mute.values()} == {0}


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("The star is red.", "red", 1.0),
        ("It is reddish.", "red", 0.0),
        ("There are two.", "two<OR>2", 1.0),
        ("2", "two<OR>2", 1.0),
        ("A red star and a blue circle.", "red star<AND>blue circle<AND>green cross<AND>pink star", 0.5),
        ("A star, red.", "red star", 0.0),
        ("", "red", 0.0),
    ],
)
def test_grading_rule(answer: str, truth: str, score: float) -> None:
    assert grade(answer, truth) == score


@pytest.mark.parametrize("broken", ["[]", "{}", '{"v1_9999": "red"}'])
def test_grader_refuses_what_it_cannot_grade(broken: str, tmp_path, capsys) -> None:
    (tmp_path / "run.json").write_text(broken)
    with pytest.raises(SystemExit) as error:
        grade_main(["--annotation-file", str(DATA / "mm-vet/mm-vet.json"), "--result-file", str(tmp_path / "run.json")])
    assert error.value.code == 2 and "run.json" in capsys.readouterr().err


def test_llava_bench_files_belong_together() -> None:
    folder = DATA / "llava-bench-in-the-wild"
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    context = [json.loads(line) for line in (folder / "context.jsonl").read_text().splitlines()]
    reference = [json.loads(line) for line in (folder / "answers_gpt4.jsonl").read_text().splitlines()]
    assert {line["category"] for line in lines} == {"conv", "detail", "complex"}
    assert [r["question_id"] for r in reference] == [line["question_id"] for line in lines]
    assert {c["image"] for c in context} == {line["image"] for line in lines}


def test_questions_without_a_picture_are_split_by_their_text(build: Build) -> None:
    import numpy as np

    texts = {i.question.text for i in items(build, "scienceqa") if i.scene is None}
    bodies = {
        i.question.body.removeprefix(i.question.lead + "\n") for i in items(build, "scienceqa") if i.scene is None
    }
    assert len(texts) >= 50
    rng = np.random.default_rng(8)
    drawn = [formats.text_only(rng) for _ in range(2000)]
    assert not bodies & {question.body for question in drawn}
    assert not any(map(formats.held_out_text, drawn))


def test_lettered_questions_point_at_their_answer(build: Build) -> None:
    for item in build.items:
        asked: Question = item.question
        if asked.options:
            shown = asked.options["ABCD".index(asked.answer)]
            translated = {**chinese.MEANING, **chinese.ANSWERS, **{n: w for w, n in chinese.NUMBER.items()}}
            assert asked.target == (translated.get(shown, shown) if item.benchmark == "mmbench_cn" else shown)
            assert len(set(asked.options)) == len(asked.options)


def test_evaluation_scenes_are_held_out(build: Build) -> None:
    shown = [*build.images.values(), *(c for rows in build.tables.values() for r in rows for c in r.values())]
    scenes = [cell for cell in shown if isinstance(cell, Scene)]
    assert len(scenes) > 300 and all(scene.held_out() for scene in scenes)
