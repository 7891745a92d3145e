"""The miniature for driving: six consistent views, a rule that needs them all, files in the real formats, training.

What the trained model can do is in `test_drive_checkpoint.py`.
"""

from __future__ import annotations

import json
import math
import zlib
from itertools import product

import numpy as np
import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval import eval_gqa, model_vqa_loader
from llava.eval.tasks.data_check import check_benchmark
from llava.eval.tasks.drivelm import evaluate_drivelm, frames
from llava.eval.tasks.planning import load_truth as load_planning
from llava.eval.tasks.planning_scores import evaluate_planning
from llava.eval.tasks.registry import get_task
from llava.eval.tasks.senna import evaluate_senna, load_truth, meta_action
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.projector import TokenAdapter
from llava.pruning import Dense
from playground.tiny.build.benchmarks import DATA_DRIVE
from playground.tiny.build.driving import STREETS, streets
from playground.tiny.measure import driving as measuring
from playground.tiny.train import driving as stage
from playground.tiny.train import street_batches as batches
from playground.tiny.train import street_model as guided
from playground.tiny.train import streets as pool
from playground.tiny.train import text
from playground.tiny.train.common import train_rng
from playground.tiny.train.export import export, load
from playground.tiny.train.vision import normalize, run_tower
from playground.tiny.world import cameras as cam
from playground.tiny.world import driving as d
from playground.tiny.world.scenes import RGB
from tests.eval.helpers import answer, read_json, read_jsonl, write_json, write_jsonl
from tests.eval.test_convert import run

DEGREES = {"FRONT": 0, "FRONT_LEFT": -55, "FRONT_RIGHT": 55, "BACK_LEFT": -110, "BACK_RIGHT": 110, "BACK": 180}


@pytest.fixture(scope="module")
def found() -> list[d.Street]:
    return streets()


# -- the rule


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"light": "red", "command": "left"}, ("STOP", "STRAIGHT")),
        ({"command": "left", "walker_left": True}, ("STOP", "STRAIGHT")),
        ({"command": "left", "walker_right": True}, ("KEEP", "LEFT_TURN")),
        ({"command": "right", "back_right": True}, ("DECELERATE", "RIGHT_TURN")),
        ({"command": "right", "back_left": True, "lead": "near"}, ("KEEP", "RIGHT_TURN")),
        ({"command": "right", "speed": "fast"}, ("DECELERATE", "RIGHT_TURN")),
        ({"lead": "near"}, ("KEEP", "LEFT_CHANGE")),
        ({"lead": "near", "back_left": True}, ("KEEP", "RIGHT_CHANGE")),
        ({"lead": "near", "front_left": True, "front_right": True}, ("STOP", "STRAIGHT")),
        ({"lead": "near", "front_left": True, "back_right": True, "speed": "fast"}, ("DECELERATE", "STRAIGHT")),
        ({"behind": True}, ("ACCELERATE", "STRAIGHT")),
        ({"behind": True, "lead": "far"}, ("KEEP", "STRAIGHT")),
        ({"light": "green"}, ("KEEP", "STRAIGHT")),
    ],
)
def test_the_rule_by_hand(facts, expected) -> None:
    assert d.rule(d.Facts(**facts)) == expected


def test_every_view_is_needed() -> None:
    """By enumeration of all worlds: what the best guesser who knows the rule can reach."""
    assert sum(share for _, share in d.worlds()) == pytest.approx(1)
    assert d.best_accuracy(d.CAMERAS) == pytest.approx(100)
    assert d.best_accuracy(()) < 40, "the question alone, with its speed, says little"
    assert d.best_accuracy(("FRONT",)) < 62
    for camera in d.CAMERAS:
        assert d.best_accuracy(set(d.CAMERAS) - {camera}) < 95, camera
    actions = {d.rule(facts) for facts, _ in d.worlds()}
    assert len(actions) == 10


def test_what_decides_decides() -> None:
    """With the facts that a plan rests on, and no others, the plan is the same."""
    for facts, _ in d.worlds():
        kept = {name: getattr(facts, name) for name in ("command", "speed", *d.deciding(facts))}
        assert d.rule(d.Facts(**kept)) == d.rule(facts)


def test_waypoints_are_the_plan() -> None:
    """Read back by Senna's rules of labels, with the miniature's own border between turns and changes of lane."""
    actions = {d.rule(facts) for facts, _ in d.worlds()}
    for speed, plan in product(d.SPEEDS, sorted(actions)):
        points = [(x * d.UNIT, y * d.UNIT) for x, y in d.waypoints(speed, plan)]
        assert meta_action(points, d.CHANGE_DEGREES) == plan, (speed, plan, points)
    left, right = (d.waypoints("slow", ("KEEP", f"{side}_TURN")) for side in ("LEFT", "RIGHT"))
    assert [(-x, y) for x, y in left] == right and right[-1][0] > 0


# -- the cameras


def test_points_are_where_a_pinhole_sees_them() -> None:
    """Against floating point: the column by the bearing, the row by height and depth, to a pixel."""
    for x, y, z, (camera, yaw) in product((-900, -250, 0, 620), (-800, 300, 1500), (0, 180), DEGREES.items()):
        bearing = math.atan2(x, y) - math.radians(yaw)
        depth = math.hypot(x, y) * math.cos(bearing)
        column, row, seen = cam.project(x, y, z, camera)
        assert seen == pytest.approx(depth, abs=2)
        if depth > 150:
            assert column == pytest.approx(96 + 137 * math.tan(bearing), abs=2)
            assert row == pytest.approx(54 + 137 * (150 - z) / depth, abs=2)


def test_each_fact_is_seen_by_its_camera_alone(found) -> None:
    sizes = []
    for street in found:
        for thing in (thing for thing in street.things if thing.fact):
            seen = [c for c in d.CAMERAS if (cam.owners(street, c) == street.things.index(thing)).any()]
            assert seen == [d.SEEN[thing.fact]], (thing, seen)
            sizes.append((cam.shown(street, seen[0]) == street.things.index(thing)).sum())
    assert min(sizes) >= 1 and np.mean(sizes) > 5, "patches of a thing"


def test_what_stands_on_a_border_is_drawn_in_both_views() -> None:
    for first, second in (("FRONT", "FRONT_LEFT"), ("FRONT", "FRONT_RIGHT"), ("BACK", "BACK_LEFT")):
        yaws = sorted((DEGREES[first], DEGREES[second]), key=lambda yaw: abs(yaw))
        middle = math.radians(sum(yaws) / 2 if "BACK" != first else -145)
        thing = d.Thing("car", round(900 * math.sin(middle)), round(900 * math.cos(middle)), 200, 150)
        street = d.Street(d.Facts(), (thing,), 5)
        for camera in (first, second):
            assert (cam.owners(street, camera) == 0).any(), (camera, thing)


def test_pictures_show_what_stands_there(found) -> None:
    """Colors at the place of each thing; and pixels that do not depend on the machine."""
    for street in found[:20]:
        for camera in d.CAMERAS:
            picture, owner = cam.render_view(street, camera).astype(int), cam.owners(street, camera)
            for index in set(owner[owner >= 0].tolist()):
                thing = street.things[index]
                wanted = np.clip(RGB[cam.COLOR[thing.kind]] + thing.shade, 0, 255)
                assert (picture[owner == index] == wanted).all(1).mean() > 0.6
    street = d.sample_street(np.random.default_rng(7), held_out=True)
    assert zlib.crc32(np.stack([cam.render_view(street, c) for c in d.CAMERAS]).tobytes()) == PIXELS


PIXELS = 4190462499


def test_nearer_things_hide_farther_ones() -> None:
    near, far = d.Thing("walker", 0, 600, 90, 180), d.Thing("car", 0, 900, 200, 150)
    for things in ((near, far), (far, near)):
        owner = cam.owners(d.Street(d.Facts(), things, 1), "FRONT")
        assert owner[60, 96] == things.index(near)


# -- the files


def test_no_evaluation_street_can_be_drawn_in_training(found) -> None:
    assert len(found) == STREETS == 150 and all(street.held_out() for street in found)
    assert len({street.things for street in found}) == STREETS
    rng = train_rng("drive")
    for _ in range(200):
        street = d.sample_street(rng, held_out=False)
        assert not street.held_out() and street.things not in {s.things for s in found}
        assert not d.asked_again(street, "left", "fast").held_out(), "whatever is asked about it"


@pytest.mark.parametrize("name", ["senna", "nuscenes_planning", "drivelm"])
def test_the_data_are_complete(name) -> None:
    report = check_benchmark(get_task(name), DATA_DRIVE, all_images=True)
    assert not report.problems and not report.warnings, report


def test_true_answers_are_right_by_every_scorer(found, tmp_path, capsys) -> None:
    said = {f"{i:04d}": street for i, street in enumerate(found)}
    meta = [answer(token, d.meta_question(street).answer) for token, street in said.items()]
    senna = evaluate_senna(load_truth(DATA_DRIVE / "senna" / "senna_truth.json"), meta)
    assert senna["senna"]["accuracy"] == senna["strict"]["accuracy"] == 100 and senna["constant_accuracy"] < 45
    points = [answer(token, d.points_question(street).answer) for token, street in said.items()]
    truth = load_planning(DATA_DRIVE / "nuscenes_planning" / "planning_truth.jsonl")
    some = {token: truth[token] for token in list(truth)[:40]}  # OmniDrive's grid has a million cells
    planned = evaluate_planning(some, [a for a in points if a["question_id"] in some])
    for figures in planned["conventions"].values():
        assert (figures["l2_avg"], figures["collision_avg"], figures["samples"]) == (0, 0, 40)
    assert planned["unread"] == 0
    # Straight on at the old speed runs into what stands there.
    kept = [answer(token, d.said(d.waypoints("fast", ("ACCELERATE", "STRAIGHT")))) for token in said]
    assert evaluate_planning(truth, kept, ("stp3",))["conventions"]["stp3"]["collision_3s"] > 5
    graph = read_json(DATA_DRIVE / "drivelm" / "drivelm_truth.json")
    perfect = evaluate_drivelm(graph, [answer(q.id, q.answer) for frame in frames(graph) for q in frame])
    assert perfect["accuracy"] == perfect["graph_questions"] == perfect["graph_objects"] == 100
    seen = DATA_DRIVE / "perception"
    lines = read_jsonl(seen / "llava_drive_perception.jsonl")
    flat = [asked for street in found for asked in d.perception(street)]
    right = write_jsonl(
        tmp_path / "a.jsonl", [answer(q["question_id"], a.answer) for q, a in zip(lines, flat, strict=True)]
    )
    eval_gqa.main(["--annotation-file", str(seen / "drive_perception.json"), "--result-file", str(right)])
    assert "Accuracy: 100.00%" in capsys.readouterr().out and len(lines) == 4 * STREETS


def test_sennas_own_format_converts_to_the_same_truth(tmp_path) -> None:
    """Its pictures lie in another order than the labels; the converter puts them right."""
    out = ("--questions", tmp_path / "q.jsonl", "--truth", tmp_path / "t.json")
    run("senna_for_eval", "--qa", DATA_DRIVE / "senna" / "senna_plan_qa.json", *out)
    assert read_json(tmp_path / "t.json") == read_json(DATA_DRIVE / "senna" / "senna_truth.json")
    ours = read_jsonl(DATA_DRIVE / "senna" / "llava_senna.jsonl")
    theirs = read_jsonl(tmp_path / "q.jsonl")
    assert [q["images"] for q in theirs] == [q["images"] for q in ours]
    assert all(q["text"].count("<image>") == 6 for q in theirs)


# -- training


def test_packed_sequences_are_what_evaluation_feeds(found) -> None:
    """Ids of a whole prompt of six pictures: head, pictures with what stands between them, tail."""
    asked = d.meta_question(found[0])
    prompt = text.prompt(asked.text, asked.answer).replace("<image>\n", "<image>\n" * 6)
    tail, length = text.tail_ids(asked.text, asked.answer)
    block = [IMAGE_TOKEN_INDEX, *batches.between()] * 6
    whole = [*text.head_ids(), *block[: -len(batches.between())], *tail]
    assert tokenizer_image_token(prompt, text.tokenizer()) == whole and 0 < length < len(tail)
    (number,), batch = batches.draw_batch(np.random.default_rng(0), 1, 50, "meta", full=True)
    street = pool.street_of(number)
    assert batch.ids.shape[1] == len(text.head_ids()) + 6 * 576 + 5 * len(batches.between())
    for k, (command, speed) in enumerate(product(d.COMMANDS, d.SPEEDS)):
        asked = d.meta_question(d.asked_again(street, command, speed))
        prompt = text.prompt(asked.text, asked.answer).replace("<image>\n", "<image>\n" * 6)
        fed = torch.where(batch.visual[0] >= 0, IMAGE_TOKEN_INDEX, batch.ids[0]).tolist()
        fed = [token for i, token in enumerate(fed) if token != IMAGE_TOKEN_INDEX or fed[i - 1] != token]
        ids = tokenizer_image_token(prompt, text.tokenizer())
        assert [*fed, *batch.tails[0, k].tolist()][: len(ids)] == ids
        assert batch.tail_positions[0, k, 0] == batch.ids.shape[1]


@pytest.mark.parametrize("kind", ["meta", "points", "sight"])
def test_what_a_row_holds_and_what_it_stands_for(kind) -> None:
    """Things whole or in part, never none of one; a view's background counts as all of it, or as what is there."""
    numbers, batch = batches.draw_batch(np.random.default_rng(1), 12, 50, kind)
    weights = []
    for b, number in enumerate(numbers):
        street, own = pool.street_of(number), batch.visual[b] >= 0
        table = pool.things_at(street)[batch.visual[b][own].numpy()]
        assert set(table[table >= 0]) == set(pool.things_at(street)[pool.things_at(street) >= 0])
        view = batch.views[b][own].numpy()
        assert (view == batch.visual[b][own].numpy() // 576).all()
        weights.append(batch.bias[b][own].exp().sum().round().item())
        for place, fact in enumerate(batches.FACTS):
            there = getattr(street.facts, fact) not in (False, "none")
            marked = batch.marks[b, place].nonzero()[:, 0]
            if there:
                assert {d.CAMERAS[v] for v in batch.views[b][marked].tolist()} == {d.SEEN[fact]}
            else:
                assert marked.tolist() == [0], "BOS"
    assert 6 * 576 in weights and min(weights) < 600
    assert set(batch.kinds) == ({kind} if kind != "sight" else {"light", "lane", "car", "walker"})


def test_deciding_places_are_in_front_of_pace_and_path() -> None:
    _, batch = batches.draw_batch(np.random.default_rng(2), 2, 50, "meta")
    words = text.tokenizer().convert_ids_to_tokens(batch.tails.flatten().tolist())
    paces, paths = ([words[r + 1] for r in batch.rows[start::2].tolist()] for start in (0, 1))
    assert set(paces) <= {"\u2581", "\u2581A", "\u2581D"} and set(paths) <= {"S", "<0x4C>", "R"}


def test_a_training_pass_computes_what_the_decoder_does() -> None:
    """Loss of each question over all 3,456 visual tokens against transformers' decoder on its own sequence; and with
    few tokens and padding, where nothing stands for others."""
    model, rng = load(), np.random.default_rng(3)
    for full in (True, False):
        _, batch = batches.draw_batch(rng, 1 if full else 3, 50, "meta", full)
        batch.bias = torch.where(batch.bias == -torch.inf, batch.bias, 0.0)
        features = torch.from_numpy(rng.normal(size=(int((batch.visual >= 0).sum()), 96)) * 10).float()
        with torch.no_grad():
            visual = model.projector(features)
            forward = guided.Forward(model.decoder, guided.Heads(), batch)
            forward(visual)
            embed, expected = model.decoder.model.embed_tokens, []
            b = len(batch.ids) - 1
            front = embed(batch.ids[b])
            own = batch.visual[b] >= 0
            front[own] = visual[len(visual) - int(own.sum()) :]
            real = batch.bias[b] == 0
            for k in (0, 4):
                positions = torch.cat([batch.positions[b][real], batch.tail_positions[b, k]])
                hidden = model.decoder.model(
                    inputs_embeds=torch.cat([front[real], embed(batch.tails[b, k])])[None], position_ids=positions[None]
                ).last_hidden_state[0, real.sum() :]
                question = b * batch.tails.shape[1] + k
                at = batch.where[batch.owner == question] - question * batch.tails.shape[2]
                logits = model.decoder.lm_head(hidden[at])
                expected.append((question, logits))
        for question, logits in expected:
            torch.testing.assert_close(forward.logits[batch.owner == question], logits, atol=2e-3, rtol=1e-3)


def test_features_of_the_pool_are_the_towers(tmp_path) -> None:
    """And a pool is added to, not made again."""
    tower = load().tower
    made = pool.make_pool(tower, tmp_path, 1, quiet=True)
    first = made.copy()
    again = pool.make_pool(tower, tmp_path, 2, quiet=True)
    assert np.array_equal(again[0], first[0]) and again.shape == (2, 3456, 96)
    with torch.no_grad():
        seen, _, _ = run_tower(tower, normalize(cam.squares(pool.street_of(1))[2:3]))
    np.testing.assert_allclose(again[1, 2 * 576 : 3 * 576], seen[0].numpy(), rtol=2e-3, atol=2e-2)


def test_a_few_steps_and_the_checkpoints_they_leave(tmp_path, monkeypatch) -> None:
    """Both stages run, and what they leave loads: six views of 576 tokens, and Senna's layout with 128 a view."""
    monkeypatch.setattr("playground.tiny.train.common.RUNS", tmp_path)
    plan = stage.Plan(steps=3, batch=1, full_share=0.4)
    losses = stage.train_drive(load(), tmp_path, plan, 2)
    state = torch.load(tmp_path / "drive.pt")
    assert len(losses) == state["step"] == 3 and np.isfinite(losses).all()
    tower = {f"tower.{name}": value for name, value in load().tower.state_dict().items()}
    assert all(torch.equal(state["model"][name], value) for name, value in tower.items()), "the tower is as it was"
    old = load().decoder.state_dict()
    assert any(not torch.equal(state["model"][f"decoder.{name}"], value) for name, value in old.items())
    model = load()
    losses = stage.train_drive(model, tmp_path, stage.Plan(steps=1, batch=1), 2, adapt=True)
    adapter = torch.load(tmp_path / "drive-adapter.pt")["adapter"]
    assert np.isfinite(losses).all() and set(adapter) == set(TokenAdapter((576, 128, 128, 128)).state_dict())
    export(model, tmp_path / "tiny-senna", adapter=adapter)
    config = json.loads((tmp_path / "tiny-senna" / "config.json").read_text())
    assert config["architectures"] == ["SennaLlavaLlamaForCausalLM"]
    loaded = load_pretrained_model(str(tmp_path / "tiny-senna"), None, "tiny-senna", device="cpu")[1]
    assert loaded.config.mm_image_adapter == [576, 128, 128, 128]
    flags = ["--model-path", tmp_path / "tiny-senna", "--question-file", DATA_DRIVE / "senna" / "llava_senna.jsonl"]
    flags += ["--image-folder", DATA_DRIVE / "nuscenes", "--answers-file", tmp_path / "a.jsonl", "--limit", 1]
    flags += ["--target-token-num", 77, "--view-budget", "equal", "--max-new-tokens", 1, "--device", "cpu"]
    assert model_vqa_loader.main([*map(str, flags), "--trace-file", str(tmp_path / "t.jsonl")]) == 0
    (trace,) = read_jsonl(tmp_path / "t.jsonl")
    assert trace["views"] == [128] * 6 and trace["visual_tokens"] == 768


def test_a_model_too_short_for_six_views_skips_by_name(tmp_path, capsys) -> None:
    """The tiny LLaVA-1.5 takes 2048 tokens, six views are 3456: nothing is cut."""
    flags = ["--model-path", text.CHECKPOINT, "--question-file", DATA_DRIVE / "senna" / "llava_senna.jsonl"]
    flags += ["--image-folder", DATA_DRIVE / "nuscenes", "--answers-file", tmp_path / "a.jsonl", "--limit", 1]
    with pytest.raises(SystemExit) as exit_info:
        model_vqa_loader.main([*map(str, flags), "--device", "cpu", "--target-token-num", "346"])
    assert exit_info.value.code == 3
    printed = capsys.readouterr().err
    assert "llava_senna.jsonl:1: 6 images and the question are" in printed and "takes 2048" in printed


# -- measuring


def test_what_measuring_shows_and_keeps(found) -> None:
    """Views without things, and the tokens of things first."""
    street = next(s for s in found if s.facts.lead == "near" and s.facts.behind and s.facts.back_left)
    front = measuring.emptied(street, ("FRONT",))
    assert all((cam.owners(front, c) < 0).all() for c in d.CAMERAS if c != "FRONT")
    assert (cam.owners(front, "FRONT") >= 0).any() and not measuring.emptied(street, ()).things
    kept = measuring.things_first(street)
    on = {576 * v + int(p) for v, c in enumerate(d.CAMERAS) for p in np.flatnonzero(cam.shown(street, c) >= 0)}
    assert on <= set(kept) and len(kept) == 345 and len(on) < 200


def test_measuring_runs(found, tmp_path) -> None:
    """On a checkpoint that has learned nothing of it; what it answers is no figure of anything."""
    export(load(), tmp_path / "drive")
    config = read_json(tmp_path / "drive" / "config.json")
    write_json(tmp_path / "drive" / "config.json", {**config, "tokenizer_model_max_length": 4096})
    result = dict(measuring.measure(tmp_path / "drive", found[:1], ("oracle",), tokens=2, quiet=True))
    assert result["oracle"]["questions"] == 1 and result["oracle"]["best"] == pytest.approx(100)
    assert measuring.VIEWS.keys() == measuring.GOALS.keys() and isinstance(measuring.method_of("all", found[0]), Dense)
