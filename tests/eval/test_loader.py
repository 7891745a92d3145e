"""The question-answering tool on a random checkpoint: output, resume, batches, chunks, damaged samples, bad input."""

import json
import subprocess
import sys

import pytest

from llava.eval.answering.answer_file import AnswerFile
from llava.eval.model_vqa_loader import main
from tests.eval.helpers import ROOT, fails_with_one_line, read_jsonl, write_jsonl


def texts(path):
    return [record["text"] for record in read_jsonl(path)]


def test_answers_traces_and_summary(argv, data, capsys):
    assert main(argv("--trace-file", data / "t.jsonl")) == 0
    records, questions = read_jsonl(data / "a.jsonl"), read_jsonl(data / "q.jsonl")
    assert [r["question_id"] for r in records] == [q["question_id"] for q in questions]
    assert [r["prompt"] for r in records] == [q["text"] for q in questions]
    assert records[0]["model_id"] == "random llava"
    metadata = records[0]["metadata"]
    assert (metadata["method"], metadata["target_tokens"]) == ("autoprune", 4)
    assert metadata["tokens"]["visual"] == 16 and metadata["tokens"]["processed"] > metadata["tokens"]["nominal"]
    assert records[4]["metadata"]["tokens"]["visual"] == 0, "the question without image"
    traces = read_jsonl(data / "t.jsonl")
    assert len(traces) == 7
    assert traces[0]["tokens_in"][0] == 16 and len(traces[0]["tokens_out"]) == 3
    assert set(traces[0]["mutual_information"]) == {"layer0", "layer1"} and "slope" in traces[0]
    printed = capsys.readouterr().err
    assert "answered 7 of 7 questions" in printed and "prefill:" in printed
    assert "nominal" in printed and "of 16" in printed and "% of dense" in printed


def test_batches_give_the_answers_of_single_samples(argv, data):
    main(argv())
    main(argv("--batch-size", 3, answers="b.jsonl"))
    assert texts(data / "b.jsonl") == texts(data / "a.jsonl")
    assert len(set(texts(data / "a.jsonl"))) > 1, "a model that always says the same proves nothing"


def test_chunks_give_the_answers_of_the_whole(argv, data):
    main(argv())
    for index in range(3):
        main(argv("--num-chunks", 3, "--chunk-idx", index, answers=f"{index}.jsonl"))
    parts = [(data / f"{index}.jsonl").read_bytes() for index in range(3)]
    assert b"".join(parts) == (data / "a.jsonl").read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        ("autoprune",),
        ("random",),
        ("divprune+random", "--method-args", "divprune.target_tokens=12"),
        ("0:random:0.5;1:random:0.5",),
    ],
    ids=lambda method: method[0],
)
def test_interrupted_run_continues_and_ends_the_same(argv, data, monkeypatch, method):
    main(argv("--method", *method))
    done = []
    append = AnswerFile.append

    def killed(self, *args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        append(self, *args)

    flags = argv("--method", *method, answers="b.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "append", killed)
        with pytest.raises(SystemExit) as exit_info:
            main(flags)
    assert exit_info.value.code == 130 and len(texts(data / "b.jsonl")) == 3
    assert main(flags) == 0
    assert (data / "b.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()


def test_complete_run_loads_no_model(argv, data, monkeypatch):
    main(argv())
    monkeypatch.setattr("llava.eval.answering.loading.load_model", None)
    assert main(argv()) == 0


def test_resume_refuses_other_options_and_no_resume_starts_over(argv, data, capsys):
    main(argv("--limit", 2))
    capsys.readouterr()
    fails_with_one_line(main, argv("--k0", 0.1), capsys, "a.jsonl:1", "k0", "--overwrite")
    assert main(argv("--k0", 0.1, "--no-resume", "--limit", 1)) == 0
    assert [r["metadata"]["k0"] for r in read_jsonl(data / "a.jsonl")] == [0.1]
    assert main(argv("--k0", 0.2, "--overwrite", "--limit", 1)) == 0
    assert [r["metadata"]["k0"] for r in read_jsonl(data / "a.jsonl")] == [0.2]


def test_dense_and_limit(argv, data, capsys):
    assert main(argv("--method", "dense", "--limit", 2)) == 0
    records = read_jsonl(data / "a.jsonl")
    assert len(records) == 2 and records[0]["metadata"]["tokens"]["nominal"] == 16
    assert "FLOPs 100.0% of dense" in capsys.readouterr().err


def test_sampling_is_repeatable_and_beams_run(argv, data):
    for name in ("a", "b"):
        main(argv("--temperature", 0.9, "--top_p", 0.9, "--seed", 3, "--limit", 3, answers=f"{name}.jsonl"))
    assert texts(data / "a.jsonl") == texts(data / "b.jsonl")
    assert main(argv("--num_beams", 2, "--limit", 3, "--batch-size", 2, answers="c.jsonl")) == 0
    assert len(texts(data / "c.jsonl")) == 3


@pytest.fixture
def damaged(data):
    """The second image truncated, the third missing: questions 3, 4 and 6, 7 of the file."""
    image = data / "images" / "1.png"
    image.write_bytes(image.read_bytes()[:60])
    (data / "images" / "2.png").unlink()
    return data


@pytest.mark.parametrize("batch_size", [1, 3])
def test_damaged_samples_cost_only_themselves(argv, damaged, capsys, batch_size):
    with pytest.raises(SystemExit) as exit_info:
        main(argv("--batch-size", batch_size))
    assert exit_info.value.code == 3
    assert [r["question_id"] for r in read_jsonl(damaged / "a.jsonl")] == ["img0", "img0", 99]
    printed = capsys.readouterr().err
    for line, image in ((3, "1.png"), (4, "1.png"), (6, "2.png"), (7, "2.png")):
        assert any(f"q.jsonl:{line}:" in text and image in text for text in printed.splitlines()), line
    assert "4 samples were skipped" in printed and "Traceback" not in printed


def test_damaged_sample_is_fatal_when_strict_and_keeps_what_is_done(argv, damaged, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv("--strict"))
    assert exit_info.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "q.jsonl:3" in errors[0] and "1.png" in errors[0]
    assert len(texts(damaged / "a.jsonl")) == 2


def test_repaired_image_is_answered_in_its_place(argv, data):
    main(argv())
    image = data / "images" / "1.png"
    good = image.read_bytes()
    image.write_bytes(b"not an image")
    with pytest.raises(SystemExit):
        main(argv(answers="b.jsonl"))
    image.write_bytes(good)
    assert main(argv(answers="b.jsonl")) == 0
    assert (data / "b.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["../q.jsonl", "/etc/hostname", "images", ".", "a" * 300, "nul\0.png"])
def test_image_paths_that_lead_nowhere_are_skipped(argv, data, capsys, name):
    write_jsonl(data / "q.jsonl", [{"question_id": 1, "image": name, "text": "?"}])
    with pytest.raises(SystemExit) as exit_info:
        main(argv())
    assert exit_info.value.code == 3
    assert "q.jsonl:1" in capsys.readouterr().err


BAD_INPUT = [
    (["--model-path", "{data}/nowhere"], ["nowhere"]),
    (["--question-file", "{data}/nowhere.jsonl"], ["question file", "nowhere.jsonl"]),
    (["--question-file", "{data}"], ["question file", "{data}"]),
    (["--image-folder", "{data}/nowhere"], ["image folder", "nowhere"]),
    (["--answers-file", "{data}/q.jsonl/a.jsonl"], ["answers file", "a.jsonl"]),
    (["--trace-file", "{data}/q.jsonl/t.jsonl"], ["trace file", "t.jsonl"]),
    (["--target-token-num", "0"], ["--target-token-num", "0"]),
    (["--target-token-num", "-3"], ["--target-token-num", "-3"]),
    (["--target-token-num", "17"], ["--target-token-num", "17", "16"]),
    (["--target-token-num", "many"], ["--target-token-num", "many"]),
    (["--visual-token-num", "0"], ["--visual-token-num", "0"]),
    (["--method", "nosuch"], ["nosuch", "autoprune"]),
    (["--method-args", "nosuch=3"], ["nosuch", "gamma"]),
    (["--conv-mode", "nosuch"], ["--conv-mode", "nosuch", "vicuna_v1"]),
    (["--nosuch"], ["--nosuch"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--limit", "0"], ["--limit"]),
    (["--num-chunks", "2", "--chunk-idx", "2"], ["--chunk-idx"]),
    (["--temperature", "-1"], ["--temperature"]),
    (["--device", "toaster"], ["toaster"]),
    (["--attn-implementation", "nosuch"], ["nosuch"]),
]


@pytest.mark.parametrize(("flags", "parts"), BAD_INPUT, ids=[" ".join(flags) for flags, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_status_2(argv, data, capsys, flags, parts):
    flags, parts = ([text.format(data=data) for text in group] for group in (flags, parts))
    fails_with_one_line(main, argv(*flags), capsys, *parts)
    assert not (data / "a.jsonl").exists() or not (data / "a.jsonl").read_text()


def test_bad_input_loses_no_answers(argv, data, capsys):
    main(argv())
    before = (data / "a.jsonl").read_bytes()
    (data / "q.jsonl").write_text((data / "q.jsonl").read_text() + "{oops\n")
    capsys.readouterr()
    fails_with_one_line(main, argv("--no-resume"), capsys, "q.jsonl:8", "malformed JSON")
    assert (data / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["config", "weights"])
def test_damaged_checkpoint(argv, data, checkpoint, capsys, damage):
    folder = data / "damaged"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "vision_tower").symlink_to(checkpoint / "vision_tower")
    broken = folder / ("config.json" if damage == "config" else "model.safetensors")
    broken.write_bytes(broken.read_bytes()[:100])
    fails_with_one_line(main, argv("--model-path", folder), capsys, broken.name)


def test_as_a_process(argv, data):
    """No traceback, nothing on stdout, the right exit status: what a shell script sees."""
    command = [sys.executable, "-m", "llava.eval.model_vqa_loader"]
    result = subprocess.run([*command, *argv("--method", "nosuch")], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    result = subprocess.run([*command, *argv("--limit", "2")], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len([json.loads(line) for line in (data / "a.jsonl").read_text().splitlines()]) == 2
