"""The shell scripts: whole benchmarks on the miniature data, parts over several devices, failures, set-up."""

import os
import subprocess
import sys

import pytest

from tests.eval.helpers import ROOT, TINY_DATA, read_json, read_jsonl

BENCHMARKS = ("textvqa", "pope", "gqa", "mme")


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint):
    """Paths with blanks, and a working directory that is not the repository."""
    folder = tmp_path_factory.mktemp("some where")
    (folder / "mini data").symlink_to(TINY_DATA)
    return folder


def run_script(script, *arguments, place, checkpoint, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "METHOD", "PYTHONPATH")}
    env = {
        **clean,
        "PYTHON": sys.executable,
        "MODEL_DIR": str(checkpoint.parent),
        "CKPT": checkpoint.name,
        "DATA_DIR": str(place / "mini data"),
        "OUT_DIR": str(place / "out put"),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    flags = ("--device", "cpu", "--max-new-tokens", "2", "--batch-size", "4")
    command = ["bash", str(ROOT / "scripts" / "v1_5" / "eval" / f"{script}.sh"), *arguments]
    command += flags if len(arguments) > 1 else ()
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "folder", "tokens", "key", "lines"),
    [
        ("textvqa", "textvqa", "4", "accuracy", "Samples: 8\nAccuracy:"),
        ("pope", "pope", "dense", "f1_adversarial", "Category: adversarial, # samples: 8"),
        ("gqa", "gqa", "4", "open", "Accuracy: "),
        ("mme", "MME", "4", "perception", "=========== Perception ==========="),
    ],
)
def test_benchmark_runs_end_to_end(script, folder, tokens, key, lines, place, checkpoint):
    result = run_script(script, tokens, "--limit", "8", place=place, checkpoint=checkpoint)
    assert result.returncode == 0, result.stderr
    assert lines in result.stdout
    answers = place / "out put" / folder / "answers"
    if script == "gqa":  # which upstream answers in parts
        answers /= "llava_gqa_testdev_balanced"
    name = f"{checkpoint.name}/" + ("dense" if tokens == "dense" else "autoprune/n_4")
    name += "/merge" if script == "gqa" else ""
    assert len(read_jsonl(answers / f"{name}.jsonl")) == 8
    scores = read_json(answers / f"{name}.json")
    assert key in scores and scores["scored"] == 8 and scores["missing"] == scores["expected"] - 8
    assert "questions have no answer" in result.stderr, "a limited run says that it is one"


def test_parts_over_devices_and_a_failing_part(place, checkpoint):
    """A part that fails fails the script and leaves no merged file; the same command then finishes the rest."""
    broken = place / "broken python"
    broken.write_text(f'#!/bin/sh\ncase "$*" in *"--chunk-idx 1"*) exit 7;; esac\nexec "{sys.executable}" "$@"\n')
    broken.chmod(0o755)
    arguments = ("pope", "4", "--limit", "5")
    settings = {"CUDA_VISIBLE_DEVICES": "0,1", "METHOD": "uniform", "place": place, "checkpoint": checkpoint}
    result = run_script(*arguments, PYTHON=str(broken), **settings)
    assert result.returncode == 7 and "part 1" in result.stderr
    folder = place / "out put" / "pope" / "answers" / checkpoint.name / "uniform"
    assert not (folder / "n_4.jsonl").exists() and not list(folder.glob("*.tmp*"))
    assert len(read_jsonl(folder / "n_4" / "2_0.jsonl")) == 3

    result = run_script(*arguments, **settings)
    assert result.returncode == 0, result.stderr
    assert [r["question_id"] for r in read_jsonl(folder / "n_4.jsonl")] == [1, 2, 3, 4, 5]
    assert "already answered" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("many",), ("",), ("-5",), ("6.4",)])
def test_wrong_budget_is_refused_by_the_script(arguments, place, checkpoint):
    result = run_script("pope", *arguments, place=place, checkpoint=checkpoint)
    assert result.returncode == 2 and "TOKENS" in result.stderr and len(result.stderr.splitlines()) == 1


def test_python_without_torch_is_explained(place, checkpoint):
    result = run_script("pope", "4", place=place, checkpoint=checkpoint, PYTHON="/bin/false")
    assert result.returncode == 2 and "/bin/false has no torch" in result.stderr


def test_missing_checkpoint_stops_the_script(place, checkpoint):
    result = run_script("gqa", "4", "--limit", "2", place=place, checkpoint=checkpoint, CKPT="nowhere")
    assert result.returncode == 2 and result.stdout == ""
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ") and "nowhere" in line]


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/**/*.sh")), ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def set_up(tmp_path, python):
    """`autoprune_setup` from another folder with AUTOPRUNE_PYTHON."""
    script = f'set -euo pipefail; source "{ROOT}/scripts/setup_env.sh"; autoprune_setup; echo "$PYTHON"'
    env = {**os.environ, "AUTOPRUNE_PYTHON": str(python), "VIRTUAL_ENV": "/nowhere"}
    return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)


def fake_python(tmp_path, version_ok):
    path = tmp_path / "python of mine"
    status = 0 if version_ok else 1
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *version_info*) exit {status};; -V) echo "Python 3.8.1"; exit 0;; esac\nexit 1\n'
    )
    path.chmod(0o755)
    return path


def test_own_python_skips_the_environment(tmp_path):
    result = set_up(tmp_path, sys.executable)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == sys.executable and "no virtual environment" in result.stderr


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda folder: folder / "nowhere", "not an executable"),
        (lambda folder: fake_python(folder, version_ok=False), "Python >= 3.10 is needed"),
        (lambda folder: fake_python(folder, version_ok=True), "lacks packages"),
    ],
)
def test_unusable_python_is_explained(tmp_path, make, part):
    result = set_up(tmp_path, make(tmp_path))
    assert result.returncode != 0 and result.stdout == ""
    assert part in result.stderr and len(result.stderr.splitlines()) == 1
