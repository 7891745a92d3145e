"""One run shared by several processes: dealing out, merging, and the death of one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from llava.eval.answering import parallel as sharding
from llava.eval.answering.answerer import Answerer
from llava.eval.answering.parallel import World, crop_counter, deal, question_costs
from llava.eval.common.questions import Question
from llava.eval.model_vqa_loader import main
from llava.mm_utils import get_anyres_image_grid_shape
from llava.utils import UserError
from tests.eval.helpers import ROOT, read_json, read_jsonl, write_jsonl
from tests.eval.processes import Child, needs_fork


@pytest.fixture
def many(data):
    """Twenty-four questions, some without image."""
    write_jsonl(
        data / "q.jsonl",
        [
            {"question_id": i, "text": f"{'word ' * (i % 7)}{i}?"} | ({"image": f"{i // 2 % 4}.png"} if i % 5 else {})
            for i in range(24)
        ],
    )
    return data


def start(command, size, folder):
    """`command` in `size` processes that find each other as under a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Child(
            lambda: main(command),
            folder / f"log{rank}",
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(size)
    ]


def ends(children):
    return [child.wait() for child in children]


@needs_fork
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_give_the_file_of_one(argv, many, preloaded, processes):
    flags = ("--max-new-tokens", 2)
    main(argv(*flags, "--trace-file", many / "t0.jsonl", answers="whole.jsonl"))
    command = argv(*flags, "--trace-file", many / "t.jsonl", "--batch-size", 2)
    children = start(command, processes, many)
    assert ends(children) == [0] * processes, [child.text() for child in children]
    assert (many / "a.jsonl").read_bytes() == (many / "whole.jsonl").read_bytes()
    assert [t["prompt"] for t in read_jsonl(many / "t.jsonl")] == [t["prompt"] for t in read_jsonl(many / "t0.jsonl")]
    assert sorted(path.name for path in many.glob("*.parts")) == [] and not list(many.glob(".*"))
    meta, whole = read_json(many / "a.meta.json"), read_json(many / "whole.meta.json")
    for key in ("counts", "tokens", "flops_ratio", "options", "complete", "question_file"):
        assert meta[key] == whole[key], key
    done = [part["counts"]["answered"] for part in meta["parts"]]
    assert len(done) == processes and sum(done) == 24 and min(done) >= 24 // processes - 3, "everybody had work"
    assert sum("questions are answered" in child.text() for child in children) >= 1
    # A rerun has nothing to do, with any number of processes.
    before = (many / "a.jsonl").read_bytes()
    assert ends(start(command, 2, many)) == [0, 0] and (many / "a.jsonl").read_bytes() == before


@needs_fork
@pytest.mark.parametrize("again", [1, 2, 3])
def test_death_of_one_process_costs_only_its_rest(argv, many, preloaded, monkeypatch, again):
    """Process 1 of 3 is killed after two answers; the others finish theirs, the rerun (`again` processes) the rest."""
    main(argv("--max-new-tokens", 2, answers="whole.jsonl"))
    whole = (many / "whole.jsonl").read_bytes()
    answer, seen = Answerer.answer, []

    def deadly(self, samples, run):
        seen.append(1)
        if os.environ.get("RANK") == "1" and len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(self, samples, run)

    command = argv("--max-new-tokens", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", deadly)
        children = start(command, 3, many)
        assert ends(children) == [0, -signal.SIGKILL, 0]
    assert "run the same command again" in children[0].text() + children[2].text()
    assert not (many / "a.jsonl").exists(), "nothing is merged before all is there"
    kept = [read_jsonl(many / "a.parts" / f"part-{rank}.jsonl") for rank in range(3)]
    assert len(kept[1]) == 2 and len(kept[0]) + len(kept[2]) > 12

    asked = []

    def counting(self, samples, run):
        asked.extend(sample.question.index for sample in samples)
        (many / f"asked-{os.environ.get('RANK', 0)}").write_text(json.dumps(asked))
        return answer(self, samples, run)

    monkeypatch.setattr(Answerer, "answer", counting)
    children = start(command, again, many)
    assert ends(children) == [0] * again, [child.text() for child in children]
    assert (many / "a.jsonl").read_bytes() == whole
    rest = [index for path in many.glob("asked-*") for index in json.loads(path.read_text())]
    assert len(rest) == 24 - sum(map(len, kept)), "what was answered is not asked again"
    assert len(read_json(many / "a.meta.json")["parts"]) == 3 and not (many / "a.parts").exists()


@needs_fork
def test_terminated_processes_keep_their_answers(argv, many, preloaded, monkeypatch):
    """What a launcher does to the others when one process dies."""
    answer = Answerer.answer

    def slow(self, samples, run):
        time.sleep(0.05)
        return answer(self, samples, run)

    main(argv(answers="whole.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", slow)
        children = start(argv(), 2, many)
        parts = [many / "a.parts" / f"part-{rank}.jsonl" for rank in range(2)]
        while not all(part.exists() and part.stat().st_size for part in parts):
            assert all(child.running() for child in children)
            time.sleep(0.01)
        for child in children:
            child.signal(signal.SIGTERM)
        assert ends(children) == [143, 143]
    assert ends(start(argv(), 2, many)) == [0, 0]
    assert (many / "a.jsonl").read_bytes() == (many / "whole.jsonl").read_bytes()


@needs_fork
def test_other_options_are_refused_by_all_processes(argv, many, preloaded):
    assert ends(start(argv("--limit", 4), 2, many)) == [0, 0]
    before = (many / "a.jsonl").read_bytes()
    children = start(argv("--k0", 0.1), 2, many)
    assert ends(children) == [2, 2] and "k0" in children[0].text() and "Traceback" not in children[1].text()
    assert (many / "a.jsonl").read_bytes() == before
    assert ends(start(argv("--k0", 0.1, "--overwrite", "--limit", 4), 2, many)) == [0, 0]
    assert {r["metadata"]["k0"] for r in read_jsonl(many / "a.jsonl")} == {0.1}


@needs_fork
def test_damaged_samples_of_one_process(argv, many, preloaded):
    (many / "images" / "3.png").unlink()
    children = start(argv(), 2, many)
    statuses = ends(children)
    assert 3 in statuses and set(statuses) <= {0, 3}
    missing = sum(q.get("image") == "3.png" for q in read_jsonl(many / "q.jsonl"))
    counts = read_json(many / "a.meta.json")["counts"]
    assert counts == {"total": 24, "answered": 24 - missing, "skipped": missing, "failed": 0}


def test_accelerate_launch(argv, many):
    """The launcher itself, with processes of its own."""
    main(argv("--limit", 6, answers="whole.jsonl"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launcher, *options, "-m", "llava.eval.model_vqa_loader", *argv("--limit", 6)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (many / "a.jsonl").read_bytes() == (many / "whole.jsonl").read_bytes()
    assert len(read_json(many / "a.meta.json")["parts"]) == 2


# --- dealing out, without a model ---


def asked(images, texts=None):
    return [Question(i, f"q:{i}", i, (texts or {}).get(i, "?"), image) for i, image in enumerate(images)]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_parts_are_balanced_complete_and_repeatable(processes):
    draw = np.random.default_rng(0)
    questions = asked([f"{i // 3}.png" for i in range(600)])
    costs = draw.choice([600.0, 1200.0, 2900.0], 200).repeat(3) + draw.integers(5, 200, 600)
    parts = deal(questions, costs, processes)
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    assert all((np.diff(part) > 0).all() for part in parts)
    loads = [costs[part].sum() for part in parts]
    assert max(loads) / min(loads) < 1.05
    again = deal(questions, costs, processes)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))
    owners = {image: {i for i, part in enumerate(parts) if image in set(part // 3)} for image in range(200)}
    assert all(len(owner) == 1 for owner in owners.values()), "questions about an image stay together"


def test_equal_counts_of_unequal_questions_would_be_unbalanced():
    questions = asked([None] * 100)
    costs = np.array([1000.0] * 50 + [10.0] * 50)
    loads = [costs[part].sum() for part in deal(questions, costs, 2)]
    assert max(loads) / min(loads) < 1.1


def test_one_image_with_all_questions_is_still_shared():
    parts = deal(asked(["one.png"] * 100), np.ones(100), 4)
    assert sum(len(part) for part in parts) == 100 and max(len(part) for part in parts) < 30


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_questions_than_processes(count):
    parts = deal(asked([None] * count), np.ones(count), 3)
    assert sorted(len(part) for part in parts) == sorted([1] * count + [0] * (3 - count))


def test_costs_follow_prompts_and_tiles(tmp_path):
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    (tmp_path / "config.json").write_text(
        json.dumps({"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints})
    )
    sizes = {"small.png": (100, 100), "wide.png": (900, 200), "large.png": (700, 700)}
    for name, size in sizes.items():
        Image.new("L", size).save(tmp_path / name)
    questions = asked([*sizes, "missing.png", None, "small.png"], {5: "x" * 400})
    crops = crop_counter(tmp_path)
    costs = question_costs(questions, tmp_path, crops)
    for cost, size in zip(costs[:3], sizes.values(), strict=True):
        grid_w, grid_h = get_anyres_image_grid_shape(size, pinpoints, 336, "effective")
        assert cost == pytest.approx(576 * (1 + grid_w * grid_h), abs=2)
    assert costs[3] == pytest.approx(576, abs=2) and costs[4] < 2 and costs[5] == pytest.approx(costs[0] + 100, abs=1)
    (tmp_path / "config.json").write_text(json.dumps({"image_aspect_ratio": "pad"}))
    plain = question_costs(questions, tmp_path, crop_counter(tmp_path))
    assert plain[0] == plain[1] == plain[2] == plain[3]


def test_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(UserError, match="RANK 8"):
        World.from_environment()
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="accelerate launch"):
        World.from_environment()


def test_folder_that_is_not_shared_is_noticed(tmp_path):
    assert "do not see" not in str(sharding._sees_plan(tmp_path / "a.jsonl", "x"))
    assert "file system they share" in sharding._sees_plan(tmp_path / "a.jsonl", "x")
