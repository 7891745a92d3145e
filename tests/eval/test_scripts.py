"""The shell scripts: every benchmark end to end, parts over several devices, failures, their commands, set-up."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.eval.tasks.registry import TASKS, get_task
from tests.eval.conftest import VOCABULARY
from tests.eval.helpers import ROOT, TINY_DATA, read_json, read_jsonl, write_json, write_jsonl
from tests.eval.small_data import write_all
from tests.model.tiny import IMAGE_SIDE, tiny_model, write_original, write_tokenizer

SCRIPTS = sorted(ROOT.glob("scripts/v1_*/eval/*.sh"))
NAMES = [entry.name for entry in TASKS]
# Benchmark -> keys of its JSON result; none where a server or a GPT model grades.
KEYS = {
    "vqav2": ["accuracy"],
    "gqa": ["accuracy", "binary", "open"],
    "vizwiz": ["accuracy"],
    "sqa": ["accuracy", "img_accuracy", "correct", "total"],
    "textvqa": ["accuracy"],
    "pope": ["f1_adversarial", "f1_random", "f1_popular", "f1_mean"],
    "mme": ["perception", "cognition", "existence", "color", "code_reasoning"],
    "mmbench": ["circular", "single_pass", "per_row"],
    "mmbench_cn": ["circular", "single_pass", "per_row"],
    "mmvet": [],
    "seed": ["accuracy", "image", "video"],
    "llavabench": [],
    "senna": ["accuracy", "strict_accuracy", "constant_accuracy"],
    "nuscenes_planning": ["uniad_l2_avg", "stp3_collision_3s", "omnidrive_l2_1s", "unread"],
    "drivelm": ["accuracy", "language", "match_f1", "local"],
}
TILED = [entry for entry in TASKS if (ROOT / "scripts" / "v1_6" / "eval" / f"{entry.name}.sh").is_file()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Paths with blanks, and a working directory that is not the repository."""
    folder = tmp_path_factory.mktemp("some where")
    write_all(folder / "small data")
    return folder


@pytest.fixture
def run(place, checkpoint, python):
    """`run(script, *arguments, **environment)` runs scripts/`script`.sh in an environment that knows the small data."""

    def call(script, *arguments, **environment):
        hidden = ("CUDA_VISIBLE_DEVICES", "METHOD", "CONV_MODE", "LLAVA_VERSION", "PYTHONPATH", "TINY", "METHODS")
        env = {key: value for key, value in os.environ.items() if key not in hidden}
        env |= {
            "PYTHON": str(python),
            "MODEL_DIR": str(checkpoint.parent),
            "CKPT": checkpoint.name,
            "DATA_DIR": str(place / "small data"),
            "OUT_DIR": str(place / "out put"),
            "OMP_NUM_THREADS": "1",
            **{key: str(value) for key, value in environment.items()},
        }
        flags = ("--device", "cpu", "--max-new-tokens", "2") if arguments else ()
        command = ["bash", str(ROOT / "scripts" / f"{script}.sh"), *arguments, *flags]
        return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)

    return call


def contents(folder):
    """Name -> bytes, without what carries a time: metadata and workbooks."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".xlsx"]
    return {str(path): path.read_bytes() for path in files if not path.name.endswith(".meta.json")}


@pytest.mark.parametrize("entry", TASKS, ids=NAMES)
def test_benchmark_runs_end_to_end(entry, run, place, checkpoint):
    """Answers, scores and uploads appear where upstream has them, below a folder of the checkpoint and method."""
    out = place / "end to end"
    result = run(f"v1_5/eval/{entry.name}", "4", OUT_DIR=out)
    assert result.returncode == 0, result.stderr
    answers = entry.answers_file(out, f"{checkpoint.name}/autoprune/n_4")
    records = read_jsonl(answers)
    assert [record["question_id"] for record in records] == [q.id for q in read_questions(entry, place)]
    assert {record["metadata"]["method"] for record in records} == {"autoprune"}
    assert read_json(answers.with_suffix(".meta.json"))["complete"] is True
    if KEYS[entry.name]:
        scores = read_json(answers.with_suffix(".json"))
        assert set(KEYS[entry.name]) <= set(scores)
        assert scores.get("missing", 0) == 0 and "have no answer" not in result.stderr, result.stderr
    expected = {
        "vqav2": ["answers_upload/llava_vqav2_mscoco_test-dev2015/{run}.json"],
        "gqa": ["answers/llava_gqa_testdev_balanced/{run}/testdev_balanced_predictions.json"],
        "vizwiz": ["answers_upload/{run}.json"],
        "sqa": ["answers/{run}_output.jsonl", "answers/{run}_result.json"],
        "mme": [f"eval_tool/answers/{{run}}/{name}.txt" for name in ("existence", "color", "code_reasoning")],
        "mmbench": ["answers_upload/mmbench_dev_20230712/{run}.xlsx"],
        "mmbench_cn": ["answers_upload/mmbench_dev_cn_20231003/{run}.xlsx"],
        "mmvet": ["results/{run}.json"],
        "seed": ["answers_upload/{run}.jsonl"],
        "drivelm": ["answers_upload/{run}.json"],
    }.get(entry.name, [])
    for name in expected:
        assert (out / entry.folder / name.format(run=f"{checkpoint.name}/autoprune/n_4")).stat().st_size, name
    # A second call answers nothing and changes nothing.
    before = contents(out / entry.folder)
    again = run(f"v1_5/eval/{entry.name}", "4", OUT_DIR=out)
    assert again.returncode == 0 and "already answered" in again.stderr, again.stderr
    assert contents(out / entry.folder) == before


def read_questions(entry, place):
    return entry.read_questions(entry.questions_path(place / "small data"))


@pytest.fixture(scope="module")
def tiled_checkpoint(tmp_path_factory):
    """Folder of a random model of LLaVA-1.6's kind: up to five tiles of 16 visual tokens."""
    folder = tmp_path_factory.mktemp("checkpoints") / "llava-v1.6-vicuna-random"
    sides = [[IMAGE_SIDE * w, IMAGE_SIDE * h] for w, h in ((1, 2), (2, 1), (2, 2))]
    tiles = {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": sides, "image_aspect_ratio": "anyres"}
    model = tiny_model(text={"vocab_size": VOCABULARY}, **tiles)
    write_original(folder, model, vocab_size=VOCABULARY, **tiles)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("entry", TILED, ids=lambda entry: entry.name)
def test_tiled_model_on_miniature_data(entry, run, place, tiled_checkpoint):
    """The scripts of 1.6, on the data that ship with the repository."""
    out = place / "tiled"
    result = run(
        f"v1_6/eval/{entry.name}", "12", "--limit", "2", DATA_DIR=TINY_DATA, OUT_DIR=out,
        MODEL_DIR=tiled_checkpoint.parent, CKPT=tiled_checkpoint.name,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answers = entry.answers_file(out, f"{tiled_checkpoint.name}/autoprune/n_12")
    tokens = [record["metadata"]["tokens"] for record in read_jsonl(answers)]
    assert len(tokens) == 2
    for t in tokens:  # text-only questions of ScienceQA have none
        assert t["visual"] == 0 or (t["visual"] > 16 and t["nominal"] < t["processed"] < t["visual"]), t
    if KEYS[entry.name]:
        assert set(KEYS[entry.name][:1]) <= set(read_json(answers.with_suffix(".json")))


def test_a_signal_reaches_every_part_and_nothing_is_merged(place, tmp_path):
    """The parts get the time to write what they have before the script ends."""
    fake = tmp_path / "fake python"
    fake.write_text(
        "#!/bin/bash\n"
        'case "$*" in *--chunk-idx*) ;; *merge*) touch merged; exit 0;; *) exit 0;; esac\n'
        'all="$*"; index="${all##*--chunk-idx }"; index="${index%% *}"\n'
        "trap 'sleep 0.3; touch \"flushed $index\"; exit 143' TERM\n"
        'touch "started $index"; for i in $(seq 600); do sleep 0.05; done\n'
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "CUDA_VISIBLE_DEVICES": "0,1", "DATA_DIR": str(place)}
    command = ["bash", str(ROOT / "scripts" / "v1_5" / "eval" / "pope.sh"), "4"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started *"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode > 128 and "not merged" in err
    assert {path.name for path in tmp_path.glob("flushed *")} == {"flushed 0", "flushed 1"}
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "/".join(path.parts[-3::2]))
def test_scripts_run_the_tools_on_the_files_of_the_catalog(script, run, place):
    """What a script would run: the right checkpoint, template and flags; paths agree with the catalog's."""
    version, large = script.parts[-3], script.stem.endswith("_13b")
    entry = get_task(script.stem.removesuffix("_13b"))
    result = run(f"{version}/eval/{script.stem}", "64", DRY_RUN="1", CKPT="", CUDA_VISIBLE_DEVICES="0,1,2")
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert commands[0][1:5] == ["-m", "llava.eval.check_data", entry.name, "--data-dir"]
    parts = [command for command in commands if f"llava.eval.{entry.tool}" in command]
    size = "13b" if large else "7b"
    checkpoint = f"llava-v1.5-{size}" if version == "v1_5" else f"llava-v1.6-vicuna-{size}"
    answers = entry.answers_file(place / "out put", f"{checkpoint}/autoprune/n_64")
    folder = answers.parent if entry.merged else answers.with_suffix("")
    files = []
    for command in parts:
        value = dict(zip(command, command[1:], strict=False))
        assert Path(value["--model-path"]).name == checkpoint
        assert Path(value["--question-file"]) == place / "small data" / entry.folder / entry.question_file
        if entry.image_folder is not None:
            assert Path(value["--image-folder"]) == place / "small data" / entry.folder / entry.image_folder
        assert (value["--conv-mode"], value["--temperature"], value["--target-token-num"]) == ("vicuna_v1", "0", "64")
        assert value.get("--visual-token-num") == ("2880" if version == "v1_6" else None)
        assert ("--lang" in command) == (entry.name == "mmbench_cn")
        assert ("--single-pred-prompt" in command) == (entry.tool in ("model_vqa_science", "model_vqa_mmbench"))
        files.append((value["--answers-file"], value["--num-chunks"], value["--chunk-idx"]))
    assert sorted(files) == [(str(folder / f"3_{i}.jsonl"), "3", str(i)) for i in range(3)]
    (merge,) = [command for command in commands if "llava.eval.merge_answers" in command]
    assert merge[merge.index("--answers-file") + 1] == str(answers)
    assert merge[-3:] == [str(folder / f"3_{i}.jsonl") for i in range(3)]


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-v1.6-vicuna-13b", "vicuna_v1"),
    ],
)
def test_template_follows_the_checkpoint(run, name, template):
    assert f"--conv-mode {template} " in run("v1_6/eval/pope", "160", DRY_RUN="1", CKPT=name).stdout
    own = run("v1_6/eval/pope", "160", DRY_RUN="1", CKPT=name, CONV_MODE="v0").stdout
    assert "--conv-mode v0 " in own


@pytest.mark.parametrize("name", ["textvqa", "vqav2", "mmbench", "textvqa_13b"])
def test_a_tag_names_the_run(name, run):
    """As `textvqa.sh 64 TAG` of AutoPrune; flags of the tool may follow."""
    stdout = run(f"v1_5/eval/{name}", "64", "my-tag.1", DRY_RUN="1", CKPT="c").stdout
    plain = run(f"v1_5/eval/{name}", "64", DRY_RUN="1", CKPT="c").stdout
    assert "c/autoprune/n_64_my-tag.1" in stdout and stdout.replace("n_64_my-tag.1", "n_64") == plain
    assert "--target-token-num 64 --device cpu" in stdout
    refused = run(f"v1_5/eval/{name}", "64", "a/b", DRY_RUN="1")
    assert refused.returncode == 2 and "TAG" in refused.stderr


def test_dense_has_no_budget(run, place):
    result = run("v1_6/eval/pope", "dense", DRY_RUN="1")
    assert "--method dense" in result.stdout and "token-num" not in result.stdout
    assert "/dense.jsonl" in result.stdout and "/n_" not in result.stdout


def test_parts_over_devices_and_a_failing_part(run, place, checkpoint, python):
    """A part that fails fails the script and leaves no merged file; the same command then finishes the rest."""
    broken = place / "broken python"
    broken.write_text(f'#!/bin/sh\ncase "$*" in *"--chunk-idx 1"*) exit 7;; esac\nexec "{python}" "$@"\n')
    broken.chmod(0o755)
    for name in ("pope", "gqa"):
        arguments = (f"v1_5/eval/{name}", "4")
        settings = {"CUDA_VISIBLE_DEVICES": "0,1", "METHOD": "uniform", "OUT_DIR": place / "parts"}
        result = run(*arguments, PYTHON=broken, **settings)
        assert result.returncode == 7 and "part 1" in result.stderr and result.stdout == ""
        entry = get_task(name)
        merged = entry.answers_file(place / "parts", f"{checkpoint.name}/uniform/n_4")
        assert not merged.exists() and not list(merged.parent.glob("*tmp*"))
        first = merged.parent / ("n_4/2_0.jsonl" if name == "pope" else "2_0.jsonl")
        assert len(read_jsonl(first)) == {"pope": 3, "gqa": 2}[name]

        result = run(*arguments, **settings)
        assert result.returncode == 0, result.stderr
        ids = [question.id for question in read_questions(entry, place)]
        assert [record["question_id"] for record in read_jsonl(merged)] == ids
        assert read_json(merged.with_suffix(".meta.json"))["counts"]["answered"] == len(ids)
        assert "already answered" in result.stderr


def test_more_devices_than_questions(run, place, checkpoint):
    result = run("v1_5/eval/mmvet", "dense", CUDA_VISIBLE_DEVICES="0,1,2,3", OUT_DIR=place / "many")
    assert result.returncode == 0, result.stderr
    answers = get_task("mmvet").answers_file(place / "many", f"{checkpoint.name}/dense")
    assert [record["question_id"] for record in read_jsonl(answers)] == [0, 1]


def test_grades_and_reviews_left_by_graders_are_added_up(run, place, checkpoint):
    out = place / "graded"
    write_json(out / "mm-vet" / "results" / checkpoint.name / "dense_gpt-4-grade-1runs.json",
               {"v1_0": {"score": [0.5]}, "v1_1": {"score": [1.0]}})  # fmt: skip
    assert run("v1_5/eval/mmvet", "dense", OUT_DIR=out).returncode == 0
    scores = read_json(get_task("mmvet").answers_file(out, f"{checkpoint.name}/dense").with_suffix(".json"))
    assert (scores["total"], scores["rec"], scores["ocr"]) == (75.0, 75.0, 100.0)
    reviews = [{"tuple": [8, 6], "category": "llava_bench_detail"}, {"tuple": [10, 3], "category": "llava_bench_conv"}]
    write_jsonl(out / "llava-bench-in-the-wild" / "reviews" / checkpoint.name / "dense.jsonl", reviews)
    result = run("v1_5/eval/llavabench", "dense", OUT_DIR=out)
    assert "all 50.0 90.0 45.0" in result.stdout and "llava_bench_detail 75.0 80.0 60.0" in result.stdout


def test_limited_run_writes_no_upload_that_a_server_refuses(run, place, checkpoint):
    for name in ("vizwiz", "seed"):
        result = run(f"v1_5/eval/{name}", "4", "--limit", "2", OUT_DIR=place / "limited")
        assert result.returncode == 0, result.stderr
        assert "have no answer" in result.stderr
        folder = place / "limited" / get_task(name).folder
        assert not (folder / "answers_upload").exists()
        answers = get_task(name).answers_file(folder.parent, f"{checkpoint.name}/autoprune/n_4")
        assert "accuracy" in read_json(answers.with_suffix(".json"))


def test_skipped_sample_is_scored_around_and_told(run, place, checkpoint, tmp_path):
    shutil.copytree(place / "small data" / "vizwiz", tmp_path / "vizwiz")
    (tmp_path / "vizwiz" / "test" / "VizWiz_test_1.jpg").write_bytes(b"no image")
    result = run("v1_5/eval/vizwiz", "4", DATA_DIR=tmp_path, OUT_DIR=tmp_path)
    assert result.returncode == 3 and "VizWiz_test_1.jpg" in result.stderr and "no upload" in result.stderr
    assert read_json(tmp_path / "vizwiz" / "answers" / checkpoint.name / "autoprune" / "n_4.json")["scored"] == 2


def test_data_are_checked_before_anything_runs(run, place, tmp_path):
    result = run("v1_5/eval/gqa", "4", DATA_DIR=tmp_path, OUT_DIR=tmp_path / "out")
    assert result.returncode == 2 and result.stdout == "" and not (tmp_path / "out").exists()
    assert result.stderr.startswith("error: gqa: ") and len(result.stderr.splitlines()) == 1


def test_a_share_as_budget(run):
    """Of each prompt's visual tokens: for models whose pictures have different numbers of them."""
    stdout = run("v1_6/eval/gqa", "0.11", DRY_RUN="1", CKPT="c", METHOD="fastv").stdout
    assert "--visual-token-num 2880 --target-ratio 0.11" in stdout and "token-num 0.11" not in stdout
    assert "c/fastv/r_0.11/merge.jsonl" in stdout
    assert "--target-ratio 1.0 " in run("v1_5/eval/pope", "1.0", DRY_RUN="1").stdout


@pytest.mark.parametrize(
    "arguments",
    [(), ("many",), ("",), ("-5",), ("6.4",), ("0.0",), ("0.10",), (".5",), ("1.5",), ("0.1.2",), ("-0.5",)],
)
def test_wrong_budget_is_refused_by_the_script(arguments, run):
    result = run("v1_5/eval/pope", *arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "TOKENS" in result.stderr or "a share of the tokens is written 0.11" in result.stderr


def test_python_without_torch_is_explained(run):
    result = run("v1_5/eval/pope", "4", PYTHON="/bin/false")
    assert result.returncode == 2 and "/bin/false has no torch" in result.stderr


def test_missing_checkpoint_stops_the_script(run, place):
    result = run("v1_5/eval/gqa", "4", CKPT="nowhere", OUT_DIR=place / "nothing")
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
