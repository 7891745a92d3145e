"""The report's file and `diff_answers`: what is joined, packed, escaped and refused. The page itself: test_browser."""

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llava.eval import diff_answers, report
from llava.eval.reports.look import pictures, traces
from llava.eval.reports.look.html import script_safe
from llava.eval.tasks.registry import TASKS
from llava.utils import UserError
from tests.eval.helpers import TINY_DATA, fails_with_one_line, read_json, read_jsonl, write_json, write_jsonl
from tests.look.runs import HOSTILE, KEPT, RASTER, data_of, trace, write_run, write_runs


def make(tmp_path, *arguments):
    path = tmp_path / "report.html"
    report.main([str(part) for part in (*arguments, "--output", path)])
    return data_of(path)


def differing(*arguments):
    try:
        diff_answers.main([str(part) for part in arguments])
    except SystemExit as status:
        return status.code
    return 0


def test_runs_side_by_side_with_what_their_metadata_name(tmp_path, capsys):
    dense, pruned = write_runs(tmp_path)
    data = make(tmp_path, pruned, dense)
    assert [run["name"] for run in data["runs"]] == ["dense", "autoprune 5"], "dense comes first"
    assert data["benchmarks"] == ["GQA"] and data["notes"] == []
    assert [q["y"] for q in data["questions"]] == ["red", "circle", "no"]
    assert [[a["t"] for a in q["a"]] for q in data["questions"]] == [
        ["Red.", "red"],
        ["circle", "square"],
        ["yes", "no"],
    ]
    assert [[a["c"] for a in q["a"]] for q in data["questions"]] == [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    assert [q["p"] for q in data["questions"]] == [[0], [1], [0]] and len(data["pictures"]) == 2
    assert (data["pictures"][0]["w"], data["pictures"][0]["h"]) == (80, 40)
    assert data["rasters"] == [RASTER["grid"] and [RASTER]]
    own = data["questions"][1]["a"][1]
    assert own["n"] == [16, 5.0, 9.0] and own["f"] == [40, 100]
    assert own["r"]["mi"] == [0.1, 2.5] and own["r"]["s"] == 0.3 and own["r"]["g"] == 5
    assert own["r"]["t"] == [1.0, 2.0, 3.0, 6.0]
    assert capsys.readouterr().out.startswith("wrote ")


def test_the_summary_is_the_scorers(tmp_path):
    dense, pruned = write_runs(tmp_path)
    first, second = make(tmp_path, dense, pruned)["summary"]
    # Two of three are right in both; the score of GQA is their share.
    assert first["scores"][0]["score"] == pytest.approx(200 / 3) and second["scores"][0]["metric"] == "accuracy"
    assert second["retained"] == pytest.approx(100.0) and second["flops"] == pytest.approx(0.4)
    assert second["prefill_ms"] == pytest.approx(2.0) and second["nominal"] == 5.0


def test_survivors_are_packed_and_can_be_unpacked(tmp_path):
    dense, pruned = write_runs(tmp_path)
    dense_trace, own = (answer["r"] for answer in make(tmp_path, dense, pruned)["questions"][0]["a"])
    assert dense_trace["k"] == 3 and dense_trace["o"] == [16, 3]
    depth = base64.b64decode(own["k"])
    for layer, kept in enumerate(KEPT):
        assert [token for token in range(16) if depth[token] > layer] == [token for token in kept if token >= 0]
    groups = [(first, last, np.frombuffer(base64.b64decode(data), "<u2").tolist()) for first, last, data in own["m"]]
    assert groups == [(1, 1, [2, 3, 6]), (2, 2, [2, 3, 5, 6])]


def test_hostile_texts_stay_texts(tmp_path):
    write_runs(tmp_path)
    hostile = write_run(tmp_path, "hostile", [HOSTILE, "\ud800 half", '"; alert(1); "'])
    (tmp_path / "hostile.meta.json").rename(tmp_path / "other.meta.json")
    hostile = hostile.rename(tmp_path / "other.jsonl")
    path = tmp_path / "report.html"
    report.main([f"<b>{{script}}</b>={hostile}", "--title", "<i>{data}</i> & more", "--output", str(path)])
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    page = path.read_text(encoding="utf-8")
    Tags().feed(page)
    assert [tag for tag, _ in found].count("script") == 2 and not [tag for tag, _ in found if tag in ("img", "b", "i")]
    assert "<title>&lt;i&gt;{data}&lt;/i&gt; &amp; more</title>" in page
    data = data_of(path)
    assert [q["a"][0]["t"] for q in data["questions"]] == [HOSTILE, "\ud800 half", '"; alert(1); "']
    assert data["runs"][0]["name"] == "<b>{script}</b>"
    policy = next(a["content"] for tag, a in found if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page


def test_json_between_script_tags():
    text = script_safe({"a": "</script>\u2028<!--&", "b": [1.5, None]})
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text) == {"a": "</script>\u2028<!--&", "b": [1.5, None]}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kept": KEPT[:2]}, "'kept' has 2 layers"),
        ({"kept": [[0, 99], [0], [0]]}, "names token 99 of 16"),
        ({"kept": [[0, 1], [0], [0, 1]]}, "layer 2 keeps was dropped before"),
        ({"members": [[], [], []]}, "differ in their merged tokens"),
        ({"members": [[], [[99]], [[1]]]}, "'members' names a token that is not there"),
        ({"tokens_out": "many"}, "tokens_out must be a list"),
        ({"rasters": [{**RASTER, "grid": [0, 4]}]}, "grid"),
        ({"visual_tokens": 10**9}, "visual_tokens"),
        ({"slope": 1e30}, "slope"),
        ({"seconds": -1}, "seconds"),
    ],
)
def test_lines_that_are_no_traces_are_named(change, complaint):
    with pytest.raises(UserError, match="t.jsonl:7: not a line of a trace file.*" + complaint.replace("'", ".")):
        traces.read_line({**trace(0, True), **change}, "t.jsonl:7")


def test_where_survivors_differ_first():
    dense, pruned = (traces.read_line(trace(0, kind), "t") for kind in (False, True))
    assert traces.first_difference(dense, pruned) == 0 and traces.first_difference(pruned, pruned) is None
    later = trace(0, True)
    later["kept"] = [KEPT[0], KEPT[1], [0, 5, -1]]
    assert traces.first_difference(pruned, traces.read_line(later, "t")) == 2
    fewer = trace(0, True)
    fewer |= {"kept": [KEPT[0], [0, 1, 5], [0, 1]], "tokens_out": [8, 3, 2], "members": [[], [], []]}
    assert traces.first_difference(pruned, traces.read_line(fewer, "t")) == 1, "the merged token is missing"
    without = traces.read_line({k: v for k, v in trace(0, True).items() if k not in ("kept", "members")}, "t")
    assert traces.first_difference(pruned, without) is None


def test_diff_as_table_json_and_report(tmp_path, capsys):
    dense, pruned = write_runs(tmp_path)
    status = differing(dense, pruned, "--json", tmp_path / "d.json", "--html", tmp_path / "d.html")
    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    assert lines[0] == "| question | id | dense | autoprune 5 |  | MI | slope | first layer |"
    assert lines[2] == "| What color is it? | 1 | Red. | red | changed | 1.500 | 0.400 | 0 |"
    assert lines[3] == "| What shape is it? | 2 | circle | square | became wrong | 2.500 | 0.300 | 0 |"
    assert lines[4] == "| Is it a star? | 3 | yes | no | became right | 3.500 | 0.200 | 0 |"
    assert lines[6] == "3 of 3 answers differ: 1 became wrong, 1 became right"
    result = read_json(tmp_path / "d.json")
    assert result["runs"] == ["dense", "autoprune 5"] and result["only_in"] == {"dense": 0, "autoprune 5": 0}
    assert (result["compared"], result["differ"], result["became_wrong"], result["became_right"]) == (3, 3, 1, 1)
    assert result["differences"][1]["credits"] == [1.0, 0.0] and result["differences"][1]["layer"] == 0
    assert len(data_of(tmp_path / "d.html")["questions"]) == 3


def test_diff_keeps_the_order_of_its_arguments(tmp_path, capsys):
    dense, pruned = write_runs(tmp_path)
    assert differing(pruned, dense) == 1
    assert "| circle" not in capsys.readouterr().out.splitlines()[0]
    assert differing(pruned, dense, "--json", tmp_path / "d.json") == 1
    assert read_json(tmp_path / "d.json")["differences"][1]["answers"] == ["square", "circle"]
    assert read_json(tmp_path / "d.json")["differences"][1]["change"] == "became right"


def test_diff_of_the_same_and_of_parts(tmp_path, capsys):
    dense, _ = write_runs(tmp_path)
    assert differing(dense, dense) == 0
    assert capsys.readouterr().out == "0 of 3 answers differ: 0 became wrong, 0 became right\n"
    part = write_jsonl(tmp_path / "part.jsonl", read_jsonl(dense)[:2])
    assert differing(dense, f"part={part}") == 1
    assert "1 question is only in dense" in capsys.readouterr().out
    only = write_jsonl(tmp_path / "only.jsonl", [{**read_jsonl(dense)[0], "prompt": "Else?"}])
    fails_with_one_line(diff_answers.main, [dense, only], capsys, "no question in common")


def test_answers_alone_make_a_report(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question_id": 1, "text": "red"}])
    data = make(tmp_path, path)
    assert data["questions"][0]["a"][0]["r"] is None and data["questions"][0]["p"] == []
    assert data["runs"][0]["name"] == "a" and "no pictures" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_told(tmp_path, capsys):
    dense, _ = write_runs(tmp_path)
    (tmp_path / "data/gqa/data/images/b.png").write_bytes(b"no picture")
    data = make(tmp_path, dense)
    assert [q["p"] for q in data["questions"]] == [[0], [None], [0]]
    assert "1 pictures cannot be read" in data["notes"][0] and "b.png" in capsys.readouterr().err


def test_folders_of_the_comparison_and_a_limit(tmp_path):
    write_runs(tmp_path)
    for method in ("dense", "autoprune"):
        target = tmp_path / "answers" / "gqa" / f"{method}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{method}.jsonl").rename(target)
    data = make(tmp_path, tmp_path / "answers", "--data-dir", tmp_path / "data", "--limit", "2")
    assert data["benchmarks"] == ["GQA"] and len(data["runs"]) == 2 and len(data["questions"]) == 2
    assert data["notes"] == ["2 of 3 questions are shown; the scores are of all of them."]
    assert data["summary"][0]["scores"][0]["answers"] == 3 and data["questions"][0]["y"] == "red"


def test_traces_that_are_named(tmp_path, capsys):
    dense, pruned = write_runs(tmp_path)
    for path in tmp_path.glob("*.meta.json"):
        path.unlink()
    data = make(tmp_path, f"one={pruned}", f"two={dense}", "--traces", f"one={tmp_path / 'autoprune.trace.jsonl'}")
    assert [answer["r"] is None for answer in data["questions"][0]["a"]] == [True, False], "dense comes first"
    assert "no pictures: give --question-file or --data-dir" in capsys.readouterr().err
    fails_with_one_line(report.main, [dense, pruned, "--traces", tmp_path / "dense.trace.jsonl"], capsys, "whose?")
    fails_with_one_line(report.main, [dense, "--traces", "x=y.jsonl"], capsys, "no run has the name 'x'")


def test_mistakes_are_one_line(tmp_path, capsys):
    dense, pruned = write_runs(tmp_path)
    fails_with_one_line(report.main, [tmp_path / "none.jsonl"], capsys, "none.jsonl")
    fails_with_one_line(report.main, [f"a={dense}", f"a={pruned}"], capsys, "run 'a' has answers to GQA already")
    fails_with_one_line(report.main, [dense, "--limit", "-1"], capsys, "--limit")
    fails_with_one_line(report.main, [dense, "--output", dense], capsys, "--output")
    notes = tmp_path / "notes.html"
    notes.write_text("<!doctype html><p>My notes")
    fails_with_one_line(report.main, [dense, "--output", notes], capsys, "not a report of this tool")
    fails_with_one_line(report.main, [tmp_path / "data"], capsys, "holds no answer file")
    broken = read_jsonl(dense)
    broken[0]["metadata"]["tokens"] = {"visual": "many"}
    fails_with_one_line(report.main, [write_jsonl(tmp_path / "t.jsonl", broken)], capsys, "no token counts")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_what_is_right_is_told_where_it_is_known(task):
    """Answering with the words that the report shows as the truth gets full credit, wherever both are known."""
    if not task.questions_path(TINY_DATA).is_file():
        pytest.skip(f"no miniature {task.title}")
    questions = task.ask(TINY_DATA).questions[:40]
    tell, grade = task.truths(TINY_DATA), task.grader(TINY_DATA)
    if tell is None:
        assert task.name == "llavabench"
        return
    told = [tell({"question_id": q.id, "prompt": q.text, **q.fields}) for q in questions]
    assert all(told)
    if grade is not None:
        for question, text in zip(questions, told, strict=True):
            first = text.split(", ")[0].split(" (")[0]  # of several people's answers the most frequent
            answer = {"question_id": question.id, "prompt": question.text, "text": first, **question.fields}
            assert grade(answer) >= 0.3
    assert tell({"question_id": "0815", "prompt": "Unknown?"}) is None


def test_pictures_shrink_until_they_fit(monkeypatch):
    monkeypatch.setattr(pictures, "SIDES", (400, 200, 50))
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    wide = pictures.Pictures(10**9)
    assert [wide.add(name, lambda: Image.fromarray(noise)) for name in "aba"] == [0, 1, 0]
    whole = sum(len(picture["d"]) for picture in wide.as_json())
    small = pictures.Pictures(whole // 6)
    for name in "ab":
        small.add(name, lambda: Image.fromarray(noise))
    assert sum(len(picture["d"]) for picture in small.as_json()) <= whole // 6
    assert [(p["w"], p["h"]) for p in small.as_json()] == [(400, 300)] * 2, "sizes are those of the originals"


def test_a_thousand_questions_stay_below_20_megabytes(tmp_path):
    """Photographs of noise, which no format makes small, and traces of LLaVA-1.6: 2880 tokens, 32 layers, two runs."""
    generator = np.random.default_rng(0)
    data = tmp_path / "images"
    data.mkdir()
    for number in range(12):
        noise = generator.integers(0, 255, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(data / f"{number}.jpg", quality=80)
    looked = []
    for _ in range(4):
        depth = np.sort(generator.integers(0, 33, 2880))[::-1].astype(np.uint8)
        groups = tuple(
            traces.Group(tuple(sorted(generator.choice(2880, 30, replace=False).tolist())), layer, layer + 1)
            for layer in range(1, 31)
        )
        counts = tuple(int((depth > layer).sum()) for layer in range(32))
        looked.append(traces.Looked(2880, counts, 160, generator.permutation(depth), groups, (0.1, 2.0), 0.3))
    packed = [len(script_safe(traces.packed(trace, 0))) for trace in looked]
    assert 1000 * 2 * max(packed) < 16_000_000
    collected = pictures.Pictures(12 * 2**20)
    for number in range(12):
        collected.add(number, lambda number=number: Image.open(data / f"{number}.jpg").convert("RGB"))
    assert sum(len(p["d"]) for p in collected.as_json()) < 12 * 2**20


def test_the_report_overwrites_its_own_kind_only(tmp_path):
    dense, _ = write_runs(tmp_path)
    make(tmp_path, dense)
    make(tmp_path, dense)  # again, over itself
    write_json(tmp_path / "report.html", {"a": 1})
    with pytest.raises(SystemExit):
        make(tmp_path, dense)
