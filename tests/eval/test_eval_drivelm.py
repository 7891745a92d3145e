"""DriveLM by hand: the graph, matching of places, the four figures, language against a reference, converters."""

import pytest

from llava.eval import eval_drivelm
from llava.eval.tasks.drivelm import evaluate_drivelm, language_scores, match_places, places, words
from tests.eval.helpers import answer, fails_with_one_line, read_json, read_jsonl, write_json, write_jsonl
from tests.eval.small_data import CAMERAS
from tests.eval.test_convert import run

CAR, BUS = "<c1,CAM_FRONT,412.5,480.0>", "<c2,CAM_BACK,100.0,200.5>"
IMPORTANT = f"There is a red car {CAR} and a bus {BUS}."
TRUTH = {
    "s1": {
        "key_frames": {
            "k1": {
                "QA": {
                    "perception": [
                        {"Q": "What are the important objects?", "A": IMPORTANT, "tag": [2]},
                        {"Q": f"What is the moving status of object {CAR}?", "A": "A", "tag": [0]},
                    ],
                    "prediction": [
                        {"Q": "Which objects come first?", "A": f"{CAR} then {BUS}", "tag": [3]},
                        {"Q": f"Is {BUS} moving?", "A": "Yes.", "tag": [0]},
                    ],
                    "planning": [{"Q": "What are safe actions?", "A": "Brake.", "tag": [1]}],
                    "behavior": [{"Q": "Predict the behavior.", "A": "B", "tag": [0]}],
                }
            }
        }
    }
}
ANSWERS = [
    answer("s1_k1_0", "A red car <c1,CAM_FRONT,420.0,475.5> is there."),  # 7.5 + 4.5 pixels away; no bus
    answer("s1_k1_1", "A"),
    answer("s1_k1_2", f"{CAR} and <c3,CAM_BACK,900.0,900.0>"),
    answer("s1_k1_3", "Yes."),  # right, but the bus is not in the graph
    answer("s1_k1_4", "Brake."),
    answer("s1_k1_5", "b"),
]


def test_places_by_hand():
    assert places("<c1,CAM_FRONT,412.5,480.0> and 7.25") == [(412.5, 480.0)], "a number left over is no place"
    assert places("<c1,CAM_FRONT,412,480>") == [], "whole numbers are none"
    truth = "1.0,1.0 and 10.0,1.0"
    assert match_places("9.0,1.0", truth) == ([(10.0, 1.0)], pytest.approx(2 / 3))
    # Each place of the truth once, in the order of the answer: the second takes what is left.
    assert match_places("9.0,1.0 8.0,1.0", truth)[0] == [(10.0, 1.0), (1.0, 1.0)]
    assert match_places("9.0,1.0 9.0,1.0 9.0,1.0", truth)[1] == pytest.approx(2 * 2 / 5)
    # The sum over both axes has to be below 16.
    assert match_places("8.0,8.9", "0.0,1.0")[0] and not match_places("8.0,9.0", "0.0,1.0")[0]
    assert match_places("none", truth) == ([], 0.0) == match_places("1.0,1.0", "none")


def test_figures_by_hand():
    result = evaluate_drivelm(TRUTH, ANSWERS)
    assert result["accuracy"] == 50.0, "the moving status right, the behavior wrong, the bus not scored"
    assert result["match_f1"] == pytest.approx(50.0), "one of two found, one of two right"
    assert result["graph_objects"] == 50.0 and result["graph_questions"] == pytest.approx(80.0)
    assert result["local"] == pytest.approx(0.2 * result["language"] + 0.1 * 0.5 + 0.2 * 0.5)
    assert "final" not in result and "gpt" not in result
    # A first answer that finds both objects puts the question about the bus into the graph.
    whole = evaluate_drivelm(TRUTH, [answer("s1_k1_0", IMPORTANT), *ANSWERS[1:]])
    assert whole["accuracy"] == pytest.approx(200 / 3) and whole["graph_questions"] == 100.0
    # Without a first answer nothing that mentions an object is scored.
    assert evaluate_drivelm(TRUTH, ANSWERS[1:])["graph_questions"] == pytest.approx(60.0)


def test_final_score_with_grades_alone():
    grades = {"s1_k1_4": 80, "s1_k1_2": 30}
    result = evaluate_drivelm(TRUTH, ANSWERS, grades)
    assert (result["gpt"], result["match"]) == (80.0, pytest.approx(40.0)) and "local" not in result
    assert result["final"] == pytest.approx(0.4 * 0.8 + 0.2 * result["language"] + 0.2 * 0.4 + 0.2 * 0.5)


# -- language

SAID = ["there is a red car in front of the ego vehicle", "a man walks on the left side", "the light is green",
        "a bus and a bus and a bus"]  # fmt: skip
WANTED = ["there is a red car to the front of the ego vehicle", "a woman walks on the right side of the road",
          "the traffic light is red", "a bus stands behind the ego vehicle"]  # fmt: skip


def test_language_against_the_evaluation_of_captions():
    """Figures of pycocoevalcap 1.2 on these four pairs."""
    expected = {"bleu_1": 0.583448879, "bleu_2": 0.485458812, "bleu_3": 0.403358675, "bleu_4": 0.336115809,
                "rouge_l": 0.589094239, "cider": 2.799870233}  # fmt: skip
    assert language_scores(SAID, WANTED) == pytest.approx(expected, abs=1e-8)


def test_language_by_hand():
    # "a b" for "a c": one of two words; no pair of words; common subsequence 1 of 2.
    scores = language_scores(["a b"], ["a c"])
    assert scores["bleu_1"] == 0.5 and scores["bleu_2"] == scores["bleu_4"] == 0.0
    assert scores["rouge_l"] == pytest.approx(0.5)
    # Half as long: exp(1 - 4/2).
    assert language_scores(["a b"], ["a b c d"])["bleu_1"] == pytest.approx(0.36787944)
    # Of three equal words one is in the reference.
    assert language_scores(["a a a"], ["a b c"])["bleu_1"] == pytest.approx(1 / 3)
    assert language_scores(["a b c d"], ["a b c d"])["cider"] == 0.0, "a corpus of one says nothing about words"
    assert language_scores(["a b c d", "e f g h"], ["a b c d", "e f g h"])["cider"] == pytest.approx(10.0)
    assert set(language_scores([], []).values()) == set(language_scores([""], ["a"]).values()) == {0.0}
    assert words("The car (at 412.5, 480.0) isn't red.") == ["the", "car", "at", "412.5", "480.0", "isn't", "red"]


# -- the tool and the converters


def test_command_line(tmp_path, capsys):
    truth, answers = write_json(tmp_path / "t.json", TRUTH), write_jsonl(tmp_path / "a.jsonl", ANSWERS[:5])
    arguments = ["--truth", truth, "--result-file", answers]
    eval_drivelm.main([str(x) for x in (*arguments, "--json", tmp_path / "r.json")])
    printed = capsys.readouterr()
    assert "accuracy: 100.00%" in printed.out and "no final score" in printed.out and "final:" not in printed.out
    assert "1 of 6 questions have no answer" in printed.err
    assert read_json(tmp_path / "r.json")["missing"] == 1
    grades = write_json(tmp_path / "g.json", {"s1_k1_4": 80})
    fails_with_one_line(
        eval_drivelm.main, [*arguments, "--gpt-scores", grades], capsys, "1 of 1 scored questions", "_2"
    )
    write_json(grades, {"s1_k1_4": 101})
    fails_with_one_line(eval_drivelm.main, [*arguments, "--gpt-scores", grades], capsys, "from 0 to 100")
    write_json(grades, {"s1_k1_4": 80, "s1_k1_2": 30})
    eval_drivelm.main([str(x) for x in (*arguments, "--gpt-scores", grades)])
    assert "final: " in capsys.readouterr().out
    write_json(truth, {"s1": {"key_frames": {"k1": {"QA": {"perception": []}}}}})
    fails_with_one_line(
        eval_drivelm.main, arguments, capsys, "t.json: s1.key_frames.k1.QA: key 'prediction' is missing"
    )


DRIVES = "The ego vehicle is going straight. The ego vehicle is driving slowly."


def scene():
    """As the public training file has it: no tags, whole sentences."""
    qa = {
        "perception": [
            {"Q": "How many cars?", "A": "One."},
            {"Q": "What are the important objects?", "A": f"A red car and a bus: {CAR}, {BUS}"},
            {"Q": f"What is the moving status of object {CAR}?", "A": "Turn left."},
            {"Q": f"What is the moving status of object {BUS}?", "A": "Stopped."},
        ],
        "prediction": [{"Q": "Which?", "A": f"{CAR} then {BUS}"}, {"Q": "Moving?", "A": "No."}],
        "planning": [{"Q": "In this scenario, what are safe actions to take?", "A": "Brake."},
                     {"Q": "What may lead to a collision with it?", "A": "Turning."}],
        "behavior": [{"Q": "Predict it.", "A": DRIVES}],
    }  # fmt: skip
    infos = {CAR: {"Visual_description": "Red car."}, BUS: {"Visual_description": "Bus. Large."}}
    images = {f"CAM_{camera}": f"../nuscenes/samples/CAM_{camera}/f.jpg" for camera in CAMERAS}
    return {"key_frames": {"k1": {"QA": qa, "key_object_infos": infos, "image_paths": images}}}


def convert(tmp_path, scenes, *flags):
    source = write_json(tmp_path / "train.json", scenes)
    run(
        "drivelm_for_eval", "--src", source, "--questions", tmp_path / "q.jsonl", "--truth", tmp_path / "t.json", *flags
    )
    return read_jsonl(tmp_path / "q.jsonl"), read_json(tmp_path / "t.json")


def test_scenes_become_the_challenges_questions(tmp_path):
    questions, truth = convert(tmp_path, {"s1": scene()})
    qa = truth["s1"]["key_frames"]["k1"]["QA"]
    assert [[entry["tag"] for entry in qa[group]] for group in qa] == [[[2], [0]], [[3], [0]], [[1], [1]], [[0]]]
    moving, behavior = qa["perception"][1], qa["behavior"][0]
    assert f"{moving['A']}. Turn left." in moving["Q"] and moving["Q"].count("Turn left.") == 1
    assert f"{behavior['A']}. {DRIVES}" in behavior["Q"]
    assert "collision" in qa["planning"][0]["Q"] and "safe" in qa["planning"][1]["Q"]
    assert [q["question_id"] for q in questions] == [f"s1_k1_{i}" for i in range(7)]
    assert questions[0]["images"] == [f"samples/CAM_{camera}/f.jpg" for camera in CAMERAS]
    assert convert(tmp_path, {"s1": scene()})[1] == truth, "the options are drawn alike every time"
    # What has tags is taken as it is.
    again, same = convert(tmp_path, {"s1": {"key_frames": {"k1": {**scene()["key_frames"]["k1"], "QA": qa}}}})
    assert (again, same) == (questions, truth)


def test_held_out_scenes(tmp_path, capsys):
    scenes = {f"s{i}": scene() for i in range(60)}
    kept = set(convert(tmp_path, scenes, "--hold-out", "0.25")[1])
    assert 5 <= len(kept) <= 25
    fewer = {name: scenes[name] for name in list(scenes)[30:]}
    assert set(convert(tmp_path, fewer, "--hold-out", "0.25")[1]) == kept & set(fewer), "a scene's part is its own"
    (tmp_path / "list.txt").write_text("s3\ns5\n")
    assert set(convert(tmp_path, scenes, "--scenes-file", tmp_path / "list.txt")[1]) == {"s3", "s5"}
    source = write_json(
        tmp_path / "bad.json", {"s1": {"key_frames": {"k1": {"QA": {}, "image_paths": {"CAM_FRONT": "x"}}}}}
    )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("drivelm_for_eval", "--src", source, "--questions", tmp_path / "b.jsonl", "--truth", tmp_path / "b.json")
    assert "scene s1, frame k1: no picture of CAM_FRONT_LEFT" in capsys.readouterr().err


def test_the_list_for_the_server(tmp_path, capsys):
    truth, answers = write_json(tmp_path / "t.json", TRUTH), write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    run("drivelm_for_submission", "--truth", truth, "--src", answers, "--dst", tmp_path / "output.json")
    entries = read_json(tmp_path / "output.json")
    assert len(entries) == 6 and entries[3] == {
        "id": "s1_k1_3", "question": f"Is {BUS} moving?", "gt_answer": "Yes.", "answer": "Yes.",
    }  # fmt: skip
    write_jsonl(answers, ANSWERS[:2])
    with pytest.raises(SystemExit):
        run("drivelm_for_submission", "--truth", truth, "--src", answers, "--dst", tmp_path / "o.json")
    assert "4 of 6 questions have no answer" in capsys.readouterr().err and not (tmp_path / "o.json").exists()
