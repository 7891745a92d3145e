"""The real lmms-eval, in an environment of its own, runs the model `pruned` on 60 local questions."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from llava.eval import model_vqa_loader
from llava.eval.common.questions import spread
from llava.eval.tasks.registry import get_task
from llava.model import export_hf
from tests.conftest import ROOT
from tests.eval.helpers import TINY_DATA, TINY_MODEL, read_json, read_jsonl, write_jsonl

PYTHON = os.environ.get("LMMS_EVAL_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="LMMS_EVAL_PYTHON is not set: bash tests/integrations/install_lmms_eval.sh makes such a Python"
)

TASK = """
task: miniature
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: ""
process_results: !function utils.results
generation_kwargs: {max_new_tokens: 16, temperature: 0, num_beams: 1, do_sample: false}
metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]
metadata: [{version: 0.0}]
"""
UTILS = """
from PIL import Image
def visual(doc): return [Image.open(IMAGES + "/" + doc["image"]).convert("RGB")]
def text(doc, *args): return doc["text"]
def results(doc, answers): return {"length": len(answers[0])}
"""
# What lmms-eval's command line does not show: likelihoods, and answers of several wrappers with one start of Python.
SCRIPT = """
import json, sys
from PIL import Image
from lmms_eval.api.instance import Instance
from llava.integrations.lmms_eval.model import Pruned, PrunedChat
docs = [json.loads(line) for line in open(sys.argv[1])]
images, models, found = sys.argv[2], json.loads(sys.argv[3]), {}
def visual(doc): return [Image.open(images + "/" + doc["image"]).convert("RGB")]
def said(doc): return [{"role": "user", "content": [
    {"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": doc["text"]}]}]
def ask(model, kind, arguments):
    model.task_dict["t"] = {"test": docs}
    found = [Instance(request_type=kind, arguments=arguments(i, doc), idx=0,
                      metadata={"task": "t", "doc_id": i, "repeats": 1}) for i, doc in enumerate(docs)]
    return [getattr(answer, "text", answer) for answer in getattr(model, kind)(found)]
how = {"max_new_tokens": 16}
for name, arguments in models.items():
    simple = Pruned.create_from_arg_string(arguments, {"device": "cpu"})
    found[name] = ask(simple, "generate_until", lambda i, doc: (doc["text"], dict(how), visual, i, "t", "test"))
    if "llava_hf" in arguments:
        chat = PrunedChat.create_from_arg_string(arguments, {"device": "cpu"})
        assert not chat.is_simple
        found[name + " chat"] = ask(chat, "generate_until", lambda i, doc: ("", said, dict(how), i, "t", "test"))
    else:
        assert PrunedChat.create_from_arg_string(arguments, {"device": "cpu"}).is_simple, "llava has no chat wrapper"
        found["likelihood " + name] = ask(
            simple, "loglikelihood", lambda i, doc: (doc["text"], "Yes", visual, i, "t", "test"))
json.dump(found, open(sys.argv[4], "w"))
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """30 questions of POPE and of GQA, with images relative to the data folder."""
    folder = tmp_path_factory.mktemp("questions")
    records = []
    for name in ("pope", "gqa"):
        task = get_task(name)
        images = task.images_path(TINY_DATA).relative_to(TINY_DATA)
        asked = spread(task.read_questions(task.questions_path(TINY_DATA)), 30)[:30]
        records += [{"image": f"{images}/{q.image}", "text": q.text} for q in asked]
    records = [{"question_id": i, **record} for i, record in enumerate(records)]
    assert len(records) == 60
    return write_jsonl(folder / "q.jsonl", records)


@pytest.fixture(scope="module")
def task(questions):
    folder = questions.parent / "task"
    folder.mkdir()
    (folder / "miniature.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    (folder / "utils.py").write_text(f"IMAGES = {str(TINY_DATA)!r}\n{UTILS}")
    return folder


@pytest.fixture(scope="module")
def start(installed, tmp_path_factory):
    """Runs the Python of lmms-eval with the package installed there."""
    home = tmp_path_factory.mktemp("home")

    def run(*command):
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(installed)}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run([PYTHON, *map(str, command)], cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def ours(questions, tmp_path_factory):
    """Answers of our own loader, by method and budget."""
    known = {}

    def answers(method, tokens):
        if method not in known:
            file = tmp_path_factory.mktemp("ours") / "a.jsonl"
            argv = ["--model-path", TINY_MODEL, "--question-file", questions, "--image-folder", TINY_DATA, "--quiet"]
            argv += ["--answers-file", file, "--method", method, "--max-new-tokens", 16, "--device", "cpu"]
            assert not model_vqa_loader.main([str(a) for a in (*argv, "--target-token-num", tokens)])
            known[method] = [record["text"] for record in read_jsonl(file)]
        return known[method]

    return answers


LLAVA = f"base=llava,pretrained={TINY_MODEL},device_map=auto"


@pytest.mark.parametrize(("method", "tokens", "batch"), [("autoprune", 64, 4), ("divprune", 16, 1)])
def test_answers_are_those_of_our_loader(start, task, ours, tmp_path, method, tokens, batch):
    arguments = f"{LLAVA},method={method},target_tokens={tokens}"
    command = ["eval", "--model", "pruned", "--model_args", arguments, "--tasks", "miniature", "--include_path", task]
    start(
        "-m",
        "lmms_eval",
        *command,
        "--device",
        "cpu",
        "--batch_size",
        batch,
        "--output_path",
        tmp_path,
        "--log_samples",
    )
    (samples,) = tmp_path.rglob("*samples*.jsonl")
    found = {record["doc_id"]: record["filtered_resps"] for record in read_jsonl(samples)}
    theirs = [found[i][0] if isinstance(found[i], list) else found[i] for i in range(60)]
    assert [text.strip() for text in theirs] == ours(method, tokens)
    (results,) = tmp_path.rglob("*results*.json")
    told = read_json(results)
    assert told["config"]["model_args"] == arguments
    assert told["throughput"]["avg_pruned_tokens_nominal"] == tokens
    assert told["throughput"]["avg_pruned_visual_tokens"] == 576
    processed = told["throughput"]["avg_pruned_tokens_processed"]
    assert processed > 100 if method == "autoprune" else processed == tokens


def test_wrappers_of_transformers_and_likelihoods(start, questions, ours, tmp_path):
    export_hf.main(["--model-path", str(TINY_MODEL), "--output", str(tmp_path / "hf")])
    hf = f"base=llava_hf,pretrained={tmp_path / 'hf'},device_map=cpu,dtype=float32"
    models = {
        "hf": f"{hf},method=autoprune,target_tokens=64,method_args=x0=14.9;k0=0.4",
        "autoprune": f"{LLAVA},method=autoprune,target_tokens=64",
        "dense": f"{LLAVA},method=dense",
        "plain": f"{LLAVA},method=autoprune,target_tokens=576,method_args=coarse_cut=false",
    }
    few = write_jsonl(tmp_path / "few.jsonl", read_jsonl(questions)[::5])
    start("-c", SCRIPT, few, TINY_DATA, json.dumps(models), tmp_path / "found.json")
    found = read_json(tmp_path / "found.json")
    for name in ("hf", "hf chat", "autoprune"):
        assert [text.strip() for text in found[name]] == ours("autoprune", 64)[::5], name
    pruned, dense = found["likelihood autoprune"], found["likelihood dense"]
    assert len(pruned) == 12 and pruned != dense
    # A budget of all tokens is the dense model, by another way through the engine.
    assert [loss for loss, _ in found["likelihood plain"]] == pytest.approx(
        [loss for loss, _ in dense], rel=1e-3, abs=1e-5
    )


def test_many_settings_with_one_model(start, task, tmp_path):
    printed = start(
        *("-m", "llava.integrations.lmms_eval", "--base", "llava", "--model-args", LLAVA.partition(",")[2]),
        *("--device", "cpu", "--methods", "dense,divprune", "--budgets", "64,0.03", "--tasks", "miniature"),
        *("--include-path", task, "--output", tmp_path / "all.json", "--limit", 4, "--batch-size", 4),
    )
    assert "| divprune | 64 | 64.0 | 64.0 |" in printed and "| dense | - | 576.0 | 576.0 |" in printed
    settings = read_json(tmp_path / "all.json")["settings"]
    assert [(row["method"], row["tokens_nominal"]) for row in settings] == [
        ("dense", 576.0),
        ("divprune", 64.0),
        ("divprune", 17.0),
    ]
    assert settings[2]["options"]["target_ratio"] == 0.03 and "miniature" in settings[0]["results"]
    assert printed.count("Loading weights: 100%") == 1, "the model is loaded once"


def test_mistakes_end_in_one_line(start, installed):
    command = [
        PYTHON,
        "-m",
        "llava.integrations.lmms_eval",
        "--base",
        "llava",
        "--methods",
        "nosuch",
        "--budgets",
        "64",
    ]
    done = subprocess.run(
        [*command, "--tasks", "x"], cwd=ROOT.parent, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(installed)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: unknown pruning method 'nosuch'")
