"""Senna's meta actions by hand: labels from trajectories, both readings, the constant answer, the converter."""

import pytest

from llava.eval import eval_senna
from llava.eval.tasks.senna import evaluate_senna, first_label, meta_action, read_meta_action
from tests.eval.helpers import answer, fails_with_one_line, read_json, read_jsonl, write_json, write_jsonl
from tests.eval.small_data import CAMERAS
from tests.eval.test_convert import script

TRUTH = {"1": ("KEEP", "STRAIGHT"), "2": ("KEEP", "STRAIGHT"), "3": ("STOP", "LEFT_TURN"), "4": ("KEEP", "LEFT_CHANGE")}
ANSWERS = [
    answer("1", "KEEP, STRAIGHT\n"),
    answer("2", "STOP or KEEP, STRAIGHT"),  # two speeds: right for Senna, wrong by its first label
    answer("3", "KEEP, LEFT_TURN"),
    answer("4", "keep going"),  # capital letters count
]


def figures(answers=ANSWERS, truth=TRUTH):
    return evaluate_senna(truth, answers)


def test_sennas_arithmetic_by_hand():
    senna = figures()["senna"]
    assert senna["accuracy"] == 50.0
    # KEEP: hits 1 and 2; 3 names it wrongly; 4 misses it: 2*2 / (2*2 + 1 + 1).
    assert senna["f1_KEEP"] == pytest.approx(100 * 4 / 6)
    # STOP: in 2 it stands beside the true label, and counts as a hit; 3 misses it: 2 / (2 + 0 + 1).
    assert senna["f1_STOP"] == pytest.approx(100 * 2 / 3)
    assert senna["f1_STRAIGHT"] == senna["f1_LEFT_TURN"] == 100.0
    assert senna["f1_ACCELERATE"] == senna["f1_RIGHT_TURN"] == 0.0
    assert not any("CHANGE" in name for name in senna if name.startswith("f1"))
    assert senna["accuracy_KEEP_STRAIGHT"] == 100.0
    assert senna["accuracy_STOP_LEFT_TURN"] == senna["accuracy_KEEP_LEFT_CHANGE"] == 0.0


def test_the_strict_reading_by_hand():
    strict = figures()["strict"]
    assert strict["accuracy"] == 25.0 and strict["unread"] == 25.0
    # Speeds read: KEEP, STOP, KEEP, none; true: KEEP, KEEP, STOP, KEEP.
    assert strict["speed_accuracy"] == 25.0
    # KEEP: 1 hit, 3 occur, 2 named: 2/5; STOP: no hit. Recall 1/3 and 0.
    assert strict["speed_macro_f1"] == pytest.approx(100 * (2 / 5) / 2)
    assert strict["speed_balanced"] == pytest.approx(100 * (1 / 3) / 2)
    # Paths read: STRAIGHT, STRAIGHT, LEFT_TURN, none: three labels occur, two are perfect.
    assert strict["path_macro_f1"] == strict["path_balanced"] == pytest.approx(100 * 2 / 3)


def test_the_constant_answer_stands_beside():
    result = figures()
    assert (result["constant"], result["constant_accuracy"]) == ("KEEP, STRAIGHT", 50.0)
    always = figures([answer(key, "KEEP, STRAIGHT") for key in TRUTH])
    assert always["senna"]["accuracy"] == always["strict"]["accuracy"] == always["constant_accuracy"] == 50.0


def test_labels_are_words_of_their_own_in_the_strict_reading():
    assert first_label("NONSTOP, KEEP", ("STOP", "KEEP")) == "KEEP"
    assert first_label("KEEPING", ("KEEP",)) is None
    assert first_label("LEFT_TURN then STRAIGHT", ("STRAIGHT", "LEFT_TURN")) == "LEFT_TURN"
    assert read_meta_action("KEEP, STRAIGHT\n") == ("KEEP", "STRAIGHT")
    assert read_meta_action("STRAIGHT, KEEP") is None is read_meta_action("KEEP")


def path(x, y, speeds=(4, 4, 4, 4, 4)):
    """Six points that end at (x, y) and advance by the given speeds, in m/s, between them."""
    forward = [y - sum(speeds[k:]) * 0.5 for k in range(6)]
    return [(0.0, value) for value in forward[:-1]] + [(x, y)]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (path(0, 20), ("KEEP", "STRAIGHT")),
        (path(0, 20, (4, 4, 4, 4, 7)), ("ACCELERATE", "STRAIGHT")),
        (path(0, 20, (4, 4, 4, 4, 6.9)), ("KEEP", "STRAIGHT")),
        (path(0, 20, (7, 4, 4, 4, 4)), ("DECELERATE", "STRAIGHT")),
        (path(0, 2, (1.9, 0, 0, 0, 0)), ("STOP", "STRAIGHT")),
        # From standing the first half second does not count: five speeds, not six.
        ([(0, 10 + k * 0.5) for k in range(6)], ("STOP", "STRAIGHT")),
    ],
)
def test_labels_of_trajectories(points, expected):
    assert meta_action(points) == expected


def test_sides_of_trajectories():
    """x is to the right: one path, once to the right, once mirrored."""
    for sign, side in ((1, "RIGHT"), (-1, "LEFT")):
        assert meta_action([(sign * x, y) for x, y in path(5, 20)])[1] == f"{side}_TURN"
        assert meta_action([(sign * x, y) for x, y in path(5, 60, (20,) * 5)])[1] == f"{side}_CHANGE"  # 4.8 degrees
        assert meta_action([(sign * x, y) for x, y in path(4, 5)])[1] == "STRAIGHT"  # not more than 4 m


def test_command_line(tmp_path, capsys):
    entries = [{"question_id": key, "speed": speed, "path": way} for key, (speed, way) in TRUTH.items()]
    truth = write_json(tmp_path / "t.json", entries)
    answers = write_jsonl(tmp_path / "a.jsonl", [*ANSWERS[:3], answer("9", "KEEP")])
    out = tmp_path / "r.json"
    eval_senna.main(["--truth", str(truth), "--result-file", str(answers), "--json", str(out)])
    printed = capsys.readouterr()
    assert (
        "Senna's reading:\n  accuracy: 66.67%" in printed.out and "strict reading:\n  accuracy: 33.33%" in printed.out
    )
    assert "always KEEP, STRAIGHT: 66.67% in both" in printed.out
    assert "1 of 4 questions have no answer" in printed.err and "1 answers belong to no question" in printed.err
    flat = read_json(out)
    assert (flat["accuracy"], flat["constant"], flat["missing"]) == (pytest.approx(200 / 3), "KEEP, STRAIGHT", 1)
    arguments = ["--truth", truth, "--result-file", answers]
    write_json(truth, [*entries, entries[0]])
    fails_with_one_line(eval_senna.main, arguments, capsys, "t.json: entry 4", "occurs twice")
    write_json(truth, [{**entries[0], "path": "AROUND"}])
    fails_with_one_line(eval_senna.main, arguments, capsys, "t.json: entry 0", "path")
    write_json(truth, [{**entries[0], "question_id": "77"}])
    fails_with_one_line(eval_senna.main, arguments, capsys, "no answer belongs to a question of t.json")


# -- the converter

STORED = ("FRONT", "FRONT_RIGHT", "FRONT_LEFT", "BACK", "BACK_LEFT", "BACK_RIGHT")  # not the order of the labels
LABELS = ("FRONT", "FRONT LEFT", "FRONT RIGHT", "BACK LEFT", "BACK RIGHT", "BACK")


def entry(token="5f00", said="KEEP, STRAIGHT\n", question="... SPEED plan ... PATH plan ...", **more):
    text = "".join(f"<{label} VIEW>:\n<image>\n" for label in LABELS) + question
    images = [f"/data/nuscenes/samples/CAM_{name}/p.jpg" for name in STORED]
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": said}]
    trajectory = str([n for k in range(1, 7) for n in (0.0, 2.0 * k)])
    return {"token": token, "image": images[0], "images": images, "ego_fut_trajs": trajectory, "conversations": turns,
            **more}  # fmt: skip


@pytest.fixture
def convert(tmp_path):
    main = script("senna_for_eval")

    def call(entries, *flags):
        qa = write_json(tmp_path / "qa.json", entries)
        out = ["--questions", tmp_path / "q.jsonl", "--truth", tmp_path / "t.json"]
        main([str(x) for x in ("--qa", qa, "--image-root", "/data/nuscenes", *out, *flags)])
        return read_jsonl(tmp_path / "q.jsonl"), read_json(tmp_path / "t.json")

    return call


def cameras(question):
    return [name.split("/")[1].removeprefix("CAM_") for name in question["images"]]


def test_every_label_gets_its_own_camera(convert, capsys):
    light = entry(question="What is the light?")
    questions, truth = convert([light, entry(), entry("5f01", "STOP, LEFT_TURN")])
    assert [q["question_id"] for q in questions] == ["5f00", "5f01"]
    assert cameras(questions[0]) == [label.replace(" ", "_") for label in LABELS] and set(LABELS) != set(CAMERAS)
    assert questions[0]["images"][0] == "samples/CAM_FRONT/p.jpg" and questions[0]["text"].count("<image>") == 6
    assert truth[1] == {"question_id": "5f01", "speed": "STOP", "path": "LEFT_TURN"}
    printed = capsys.readouterr()
    assert "2 questions of 3 entries" in printed.out and "1 of 2 labels are not those" in printed.err
    published, _ = convert([entry()], "--order", "published")
    assert tuple(cameras(published[0])) == STORED, "five of six labels name another camera"


def test_data_of_one_picture(convert):
    """Until December 2024 the data had one place and six paths."""
    turns = [{"from": "human", "value": "<image>\nSPEED plan"}, {"from": "gpt", "value": "KEEP, STRAIGHT"}]
    questions, _ = convert([entry(conversations=turns)])
    assert questions[0]["images"] == ["samples/CAM_FRONT/p.jpg"]


def test_bad_entries_are_named(tmp_path, capsys):
    main = script("senna_for_eval")
    flags = ["--questions", tmp_path / "q.jsonl", "--truth", tmp_path / "t.json"]
    for bad, part in (
        (entry(said="KEEP"), "is no meta action"),
        (entry(images=entry()["images"][:5]), "6 places of images in the question, but 5 images"),
        (entry(images=["samples/CAM_FRONT/p.jpg"] * 6), "6 images lie in a folder CAM_FRONT"),
        (entry(ego_fut_trajs="[1, 2]"), "twelve numbers"),
        ({"token": "x"}, "conversations"),
    ):
        qa = write_json(tmp_path / "bad.json", [entry(), bad])
        fails_with_one_line(main, ["--qa", qa, *flags], capsys, "bad.json: entry 1", part)
        assert not (tmp_path / "q.jsonl").exists()
    qa = write_json(tmp_path / "bad.json", [entry(question="What?")])
    fails_with_one_line(main, ["--qa", qa, *flags], capsys, "none of 1 entries asks")
