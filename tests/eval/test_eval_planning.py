"""Planning by hand: what an answer says, every convention, axes, masks, odd lengths, and the converter."""

import math
import pickle

import numpy as np
import pytest

from llava.eval import eval_planning
from llava.eval.tasks.collision import Grid, Obstacle, center_hits, hits, occupancy, turned_hits
from llava.eval.tasks.planning import load_truth
from llava.eval.tasks.planning_scores import evaluate_planning, read_points
from tests.eval.helpers import answer, fails_with_one_line, read_json, read_jsonl, write_jsonl
from tests.eval.test_convert import script

UP = math.pi / 2
STRAIGHT = [[0.0, 2.0 * k] for k in range(1, 7)]  # 4 m/s
COARSE, FINE = Grid(0.5), Grid(0.1)


def said(points):
    return ", ".join(f"({x:.2f}, {y:.2f})" for x, y in points)


def record(token="t", **more):
    return {"token": token, "ego": STRAIGHT, "agents": [], **more}


def car(*poses, kind="vehicle"):
    """A car at (x, y, heading) per step; the last pose holds on."""
    poses = [*poses, *[poses[-1]] * (6 - len(poses))]
    return {"kind": kind, "length": 4.0, "width": 2.0, "poses": [list(p) if p else None for p in poses]}


def figures(points, convention, *records, text=None):
    records = records or (record(),)
    answers = [answer(r["token"], text or said(points)) for r in records]
    return evaluate_planning({r["token"]: r for r in records}, answers)["conventions"][convention]


def l2(values):
    return [values[f"l2_{end}"] for end in ("1s", "2s", "3s", "avg")]


def collisions(values, kind="collision"):
    return [values[f"{kind}_{end}"] for end in ("1s", "2s", "3s", "avg")]


# -- answers


def test_points_of_an_answer():
    six = np.array([[0, 1], [0, 2], [0, 3], [0, 4], [-0.5, 5], [1, 6.25]])
    for text in (
        "(0,1),(0,2),(0,3),(0,4),(-0.5,5),(1,6.25)",
        "Trajectory: [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (0.0, 4.0), (-0.50, 5.0), (1.0, 6.25)].",
        "[PT, (+0.00, +1.00), (+0.0, +2.0), (+0.0, +3.0), (+0.0, +4.0), (-0.5, +5.0), (+1.0, +6.25)]",
        "0 1,0 2,0 3,0 4,-0.5 5,1 6.25",
        "[0,1] [0,2] [0,3] [0,4] [-.5,5.] [1,6.25]",
    ):
        np.testing.assert_array_equal(read_points(text), six)
    np.testing.assert_array_equal(read_points("0 2,0 4,0 6,0 8,-1 10,2 12.5", unit=0.5), six)


@pytest.mark.parametrize(
    "text",
    ["", "KEEP, STRAIGHT", "(0,1),(0,2)", "(0,1)," * 7, "0 1,0 2,0 3,0 4,0 5", "0 1,0 2,0 3,0 4,0 5,six 6",
     "(0,1),(0,2),(0,3),(0,4),(0,5),(0,1e9)", f"(0,1),(0,2),(0,3),(0,4),(0,5),(0,{'9' * 400})"],
)  # fmt: skip
def test_answers_without_six_points(text):
    assert read_points(text) is None


def test_axes_of_an_answer():
    """OmniDrive writes forward, left; a point two metres to the left has x = -2 here."""
    found = read_points("(5,2),(5,2),(5,2),(5,2),(5,2),(5,-2)", frame="ego")
    assert found[0].tolist() == [-2, 5] and found[5].tolist() == [2, 5]


# -- distances


def test_equal_errors_in_three_conventions():
    """0.2 m more with every step: the same prediction is 0.80 or 0.50 on average."""
    points = [(0.2 * k, y) for k, (_, y) in enumerate(STRAIGHT, 1)]
    assert l2(figures(points, "uniad")) == pytest.approx([0.4, 0.8, 1.2, 0.8])
    assert l2(figures(points, "stp3")) == pytest.approx([0.3, 0.5, 0.7, 0.5])
    assert l2(figures(points, "omnidrive")) == pytest.approx([0.3, 0.5, 0.7, 0.5])


def test_masked_points():
    """UniAD counts the sample with errors of 0 there; the others leave it out."""
    masked = record("m", mask=[1, 1, 1, 1, 0, 0], ego=[*STRAIGHT[:4], [0, 0], [0, 0]])
    points = [(1.0, y) for _, y in STRAIGHT]
    assert l2(figures(points, "uniad", record(), masked)) == pytest.approx([1.0, 1.0, 0.5, 2.5 / 3])
    assert l2(figures(points, "stp3", record(), masked)) == pytest.approx([1.0, 1.0, 1.0, 1.0])
    assert figures(points, "stp3", record(), masked)["samples"] == 1
    assert figures(points, "uniad", record(), masked)["samples"] == 2
    only = figures(points, "omnidrive", masked)
    assert only["samples"] == 0 and l2(only) == [None] * 4


def test_no_points_is_standing_still():
    result = evaluate_planning({"t": record(), "u": record("u")}, [answer("t", "I stop."), answer("u", said(STRAIGHT))])
    assert result["unread"] == 50.0
    assert l2(result["conventions"]["uniad"]) == pytest.approx([2.0, 4.0, 6.0, 4.0])


# -- collisions


def test_cells_of_the_car_by_hand():
    """4.084 x 1.85 m, its middle half a metre ahead: 8 x 4 cells of half a metre, rows 97 to 104, columns 98 to 101."""
    origin = np.zeros((1, 2))
    touched = set()
    for row in range(90, 112):
        for column in range(90, 112):
            taken = np.zeros((1, 200, 200), bool)
            taken[0, row, column] = True
            if hits(origin, taken, COARSE)[0]:
                touched.add((row, column))
    assert touched == {(row, column) for row in range(97, 105) for column in range(98, 102)}


def test_cells_of_an_obstacle_by_hand():
    """A car of 4 x 2 m at (10, 20) looking forward: x 9..11 is columns 118..122, y 18..22 rows 136..144."""
    (taken,) = occupancy([Obstacle(4, 2, [(10, 20, UP)])], COARSE, 1)
    rows, columns = np.nonzero(taken)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (136, 144, 118, 122)
    assert taken.sum() == 9 * 5
    (across,) = occupancy([Obstacle(4, 2, [(10, 20, 0.0)])], COARSE, 1)
    assert np.nonzero(across)[1].max() == 124 and across.sum() == 9 * 5
    assert not occupancy([Obstacle(4, 2, [None]), Obstacle(4, 2, [(1e6, 0, 0)])], COARSE, 1).any()


@pytest.mark.parametrize("convention", ["uniad", "stp3", "omnidrive"])
@pytest.mark.parametrize("side", [-1, 1])
def test_left_and_right(convention, side):
    """A car beside the road: only who drives to its side hits it."""
    truth = record(agents=[car((side * 5, 12, UP))])
    into = [(side * 5.0, y) for _, y in STRAIGHT]
    away = [(-side * 5.0, y) for _, y in STRAIGHT]
    assert figures(into, convention, truth)["collision_3s"] > 0
    assert figures(away, convention, truth)["collision_3s"] == figures(STRAIGHT, convention, truth)["collision_3s"] == 0


def test_when_a_collision_counts():
    """A car that is there at 1.5 s alone: at no horizon for UniAD, a share for ST-P3, from 2 s on for OmniDrive."""
    truth = record(agents=[car(None, None, (5, 6, UP), None)])
    points = [(5.0, y) for _, y in STRAIGHT]
    assert collisions(figures(points, "uniad", truth)) == [0, 0, 0, 0]
    assert collisions(figures(points, "stp3", truth)) == pytest.approx([0, 25, 100 / 6, (25 + 100 / 6) / 3])
    assert collisions(figures(points, "omnidrive", truth)) == pytest.approx([0, 100, 100, 200 / 3])
    assert collisions(figures(points, "stp3", truth), "center") == pytest.approx([0, 25, 100 / 6, (25 + 100 / 6) / 3])
    # The corner of the box hits, the point itself does not.
    beside = [(3.5, y) for _, y in STRAIGHT]
    assert collisions(figures(beside, "stp3", truth))[1] == 25.0
    assert collisions(figures(beside, "stp3", truth), "center") == [0, 0, 0, 0]


def test_who_can_be_hit():
    truth = record(agents=[car((5, 12, UP), kind="pedestrian")])
    points = [(5.0, y) for _, y in STRAIGHT]
    assert [figures(points, name, truth)["collision_3s"] for name in ("uniad", "omnidrive")] == [0, 0]
    assert figures(points, "stp3", truth)["collision_3s"] > 0


def test_where_the_true_trajectory_collides_nothing_counts():
    truth = record(agents=[car(None, None, None, None, None, (0, 12, UP))])
    assert collisions(figures(STRAIGHT, "uniad", truth)) == [0, 0, 0, 0], "the denominator stays"
    other = record("o", agents=[car((5, 12, UP))])
    points = [(5.0, y) for _, y in STRAIGHT]
    assert collisions(figures(points, "uniad", truth, other))[2] == 50.0


def test_a_turning_car_is_turned_in_one_convention():
    """Two metres to the right in the last step: the box lies across and reaches where the unturned one does not."""
    points = np.array([[0, 0]] * 5 + [[2.0, 0.0]])
    taken = {grid: occupancy([Obstacle(0.4, 0.4, [None] * 5 + [(5.2, 0.0, 0.0)])], grid, 6) for grid in (COARSE, FINE)}
    assert not hits(points, taken[COARSE], COARSE).any()
    # Seen from the rear axle the middle of the box is 1.486 m ahead: x from 1.44 to 5.53.
    assert turned_hits(points, taken[FINE], FINE).tolist() == [False] * 5 + [True]
    slow = points / 2.5  # 0.8 m: less than a metre does not turn it
    assert not turned_hits(slow, taken[FINE], FINE).any()
    mirrored = points * (-1, 1)
    assert not turned_hits(mirrored, taken[FINE], FINE).any()


def test_outside_the_grid():
    taken = np.zeros((2, 200, 200), bool)
    taken[:, 0, 0] = True
    points = np.array([[-500.0, -500.0], [0.0, 0.0]])
    assert hits(points, taken, COARSE).tolist() == [True, False], (
        "cells beyond the border are the border's, as published"
    )
    assert not center_hits(points, taken, COARSE).any()


def test_cells_instead_of_agents():
    """Truth from a grid: the coarse conventions have collisions, OmniDrive's finer one has none to say."""
    truth = {"token": "t", "ego": STRAIGHT, "occupied": [[]] * 5 + [[[124, 110]]]}
    points = [(5.0, y) for _, y in STRAIGHT]
    assert figures(points, "uniad", truth)["collision_3s"] == 100.0
    assert figures([(-5.0, y) for _, y in STRAIGHT], "uniad", truth)["collision_3s"] == 0.0
    assert collisions(figures(points, "omnidrive", truth)) == [None] * 4
    bare = {"token": "t", "ego": STRAIGHT}
    assert collisions(figures(points, "uniad", bare)) == [None] * 4 and l2(figures(points, "uniad", bare))[0] == 5.0


# -- the tool


def test_command_line(tmp_path, capsys):
    truth = write_jsonl(tmp_path / "t.jsonl", [record(), record("u", unit=0.5)])
    halves = ",".join(f"0 {2 * y:.0f}" for _, y in STRAIGHT)
    answers = write_jsonl(tmp_path / "a.jsonl", [answer("t", said([(1, y) for _, y in STRAIGHT])), answer("u", halves)])
    arguments = ["--truth", truth, "--result-file", answers]
    eval_planning.main([str(x) for x in (*arguments, "--json", tmp_path / "r.json")])
    printed = capsys.readouterr().out
    assert "UniAD convention, 2 samples" in printed and "ST-P3 and VAD convention, 2 samples" in printed
    assert "OmniDrive" not in printed and "standing still: 0.00%" in printed
    flat = read_json(tmp_path / "r.json")
    assert (flat["uniad_l2_avg"], flat["stp3_l2_1s"], flat["uniad_collision_avg"]) == (0.5, 0.5, 0.0)
    assert "omnidrive_l2_1s" not in flat and flat["expected"] == 2
    for bad, part in (
        ({"token": "t"}, "t.jsonl:1: key 'ego' is missing"),
        (record(ego=STRAIGHT[:5]), "t.jsonl:1: ego must have 6"),
        (record(mask=[1, 1]), "mask must have 6"),
        (record(agents=[{**car((0, 0, 0)), "poses": [None]}]), "agents[0].poses must have 6"),
        (record(frame="world"), "frame"),
    ):
        write_jsonl(truth, [bad])
        fails_with_one_line(eval_planning.main, arguments, capsys, part)
    write_jsonl(truth, [record(), record()])
    fails_with_one_line(eval_planning.main, arguments, capsys, "token t occurs twice")


# -- the converter


def pickled(path, value):
    path.write_bytes(pickle.dumps(value))
    return path


def test_folder_of_gpt_driver(tmp_path, capsys):
    """The present in front is dropped, and the grid is turned over: a taken cell at its left end lies on the right."""
    future = np.array([[[0, 0, 0], *([x, y, 0] for x, y in STRAIGHT)]])
    grid = np.zeros((1, 7, 200, 200))
    grid[0, 6, 124, 199 - 110] = 1
    pickled(tmp_path / "gt_traj.pkl", {"a": future, "b": future[:, 1:]})
    pickled(tmp_path / "gt_traj_mask.pkl", {"a": np.ones((1, 7, 2)), "b": np.array([[[1, 1]] * 5 + [[0, 0]]])})
    pickled(tmp_path / "planing_gt_segmentation_val", {"a": grid, "b": grid[:, 1:]})
    script("nuscenes_planning")(["--gt-dir", str(tmp_path), "--out", str(tmp_path / "t.jsonl")])
    assert "runs the code in it" in capsys.readouterr().err
    first, second = read_jsonl(tmp_path / "t.jsonl")
    assert first["ego"] == second["ego"] == STRAIGHT and first["occupied"][5] == [[124, 110]]
    assert first["mask"] == [1] * 6 and second["mask"] == [1, 1, 1, 1, 1, 0]
    assert (
        figures([(5.0, y) for _, y in STRAIGHT], "uniad", load_truth(tmp_path / "t.jsonl")["a"])["collision_3s"] == 100
    )


def frame(**more):
    """A car three metres to the right and twelve ahead that drives forward, and a cone."""
    box = [3.0, 12.0, 0.0, 1.9, 4.5, 1.6, -math.pi]  # boxes count their angle from -y, clockwise: -pi looks forward
    return {
        "token": "5f00", "gt_ego_fut_trajs": np.array([[0.0, 2.0]] * 6), "gt_ego_fut_masks": np.ones(6),
        "gt_ego_fut_cmd": np.array([0, 0, 1.0]), "gt_ego_lcf_feat": np.array([0, 0, 0, 0, 0, 0, 0, 4.2, 0]),
        "gt_boxes": np.array([box, box]), "gt_names": np.array(["car", "traffic_cone"]),
        "gt_agent_fut_trajs": np.array([[[0.0, 1.0]] * 6] * 2).reshape(2, 12),
        "gt_agent_fut_masks": np.array([[1, 1, 1, 1, 1, 0]] * 2), "gt_agent_fut_yaw": np.zeros((2, 6)), **more,
    }  # fmt: skip


def test_frames_of_vad(tmp_path, capsys):
    main = script("nuscenes_planning")
    infos = pickled(tmp_path / "infos.pkl", {"infos": [frame()], "metadata": {}})
    main(["--infos", str(infos), "--out", str(tmp_path / "t.jsonl")])
    (found,) = read_jsonl(tmp_path / "t.jsonl")
    assert (found["ego"], found["command"], found["speed"]) == (STRAIGHT, "straight", 4.2)
    (agent,) = found["agents"]
    assert (agent["kind"], agent["length"], agent["width"]) == ("vehicle", 4.5, 1.9)
    assert agent["poses"][0] == [3.0, 13.0, round(UP, 3)] and agent["poses"][4][1] == 17.0 and agent["poses"][5] is None
    capsys.readouterr()
    for value, part in (({"infos": []}, "holds no 'infos'"), ([{"token": "x"}], "frame 0: is no frame of VAD")):
        with pytest.raises(SystemExit):
            main(["--infos", str(pickled(tmp_path / "bad.pkl", value)), "--out", str(tmp_path / "o.jsonl")])
        assert part in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "bad.pkl").write_bytes(b"no pickle")
    with pytest.raises(SystemExit):
        main(["--infos", str(tmp_path / "bad.pkl"), "--out", str(tmp_path / "o.jsonl")])
    assert "cannot be read as a pickle" in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()
