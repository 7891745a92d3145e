"""Run metadata beside the answers, and merging the parts of a run; on a random checkpoint."""

import json
import os
import subprocess

import pytest

from llava.eval.answering.metadata import checkpoint_fingerprint, file_sha256, git_revision
from llava.eval.common.jsonio import read_json
from llava.eval.merge_answers import main as merge_main
from llava.eval.model_vqa_loader import main
from llava.utils import UserError
from tests.eval.helpers import ROOT, fails_with_one_line, read_jsonl, write_jsonl


@pytest.fixture
def merge(data):
    def run(*parts, flags=(), answers="m.jsonl"):
        paths = [str(data / part) for part in parts]
        merge_main(["--answers-file", str(data / answers), "--question-file", str(data / "q.jsonl"), *flags, *paths])

    return run


@pytest.fixture
def parts(argv):
    """The whole run as `a.jsonl`, and as three parts."""
    main(argv())
    for index in range(3):
        main(argv("--num-chunks", 3, "--chunk-idx", index, answers=f"{index}.jsonl"))
    return ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_metadata_says_what_was_run(argv, data, checkpoint):
    main(argv("--batch-size", 2))
    meta = read_json(data / "a.meta.json", "metadata")
    records = read_jsonl(data / "a.jsonl")
    assert meta["format"] == 1 and meta["complete"] and meta["started"] <= meta["finished"]
    assert meta["model"] == "random llava" and meta["checkpoint"]["path"] == str(checkpoint)
    assert meta["counts"] == {"total": 7, "answered": 7, "skipped": 0, "failed": 0}
    assert meta["arguments"]["batch_size"] == 2 and (meta["device"], meta["dtype"]) == ("cpu", "float32")
    assert meta["mm_patch_merge_type"] == "spatial"  # as pruned runs load; with one crop there is nothing to join
    assert set(meta["versions"]) == {"python", "torch", "transformers", "llava"}
    assert meta["question_file"]["sha256"] == file_sha256(data / "q.jsonl")
    # Everything in the answers' metadata that is not of the sample alone, and nothing else, decides answers.
    assert meta["options"] == {k: v for k, v in records[0]["metadata"].items() if k != "tokens"}
    tokens = [r["metadata"]["tokens"] for r in records if r["metadata"]["tokens"]["visual"]]
    for name in ("visual", "nominal", "processed"):
        assert meta["tokens"][name] == pytest.approx(sum(t[name] for t in tokens) / len(tokens), abs=1e-3)
    flops = [r["metadata"]["tokens"] for r in records]
    ratio = sum(t["flops"] for t in flops) / sum(t["dense_flops"] for t in flops)
    assert meta["flops_ratio"] == pytest.approx(ratio, abs=1e-6) and 0 < ratio < 1
    assert meta["seconds"] > 0 and meta["prefill_ms"] > 0


def test_metadata_of_a_resumed_run_counts_all_of_it(argv, data):
    main(argv("--limit", 3))
    first = read_json(data / "a.meta.json", "metadata")
    assert first["counts"]["total"] == 3 and first["complete"]
    main(argv())
    meta = read_json(data / "a.meta.json", "metadata")
    assert meta["counts"] == {"total": 7, "answered": 7, "skipped": 0, "failed": 0}
    assert meta["timing"]["samples"] == 7 and meta["seconds"] > first["seconds"]
    assert meta["started"] == first["started"]
    main(argv(answers="b.jsonl"))
    whole = read_json(data / "b.meta.json", "metadata")
    assert (meta["tokens"], meta["flops_ratio"]) == (whole["tokens"], whole["flops_ratio"])


def test_question_file_that_changes_between_runs_is_noticed(argv, data, capsys):
    main(argv("--limit", 2))
    before = (data / "a.jsonl").read_bytes()
    with open(data / "q.jsonl", "a") as file:
        file.write(json.dumps({"question_id": 5, "text": "One more?"}) + "\n")
    capsys.readouterr()
    fails_with_one_line(main, argv(), capsys, "a.meta.json", "sha256 of the question file", "--overwrite")
    assert (data / "a.jsonl").read_bytes() == before
    assert main(argv("--overwrite")) == 0 and len(read_jsonl(data / "a.jsonl")) == 8


def test_checkpoint_and_precision_that_change_are_noticed(argv, data, checkpoint, capsys):
    main(argv("--limit", 2))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(argv("--dtype", "bfloat16"))
    assert exit_info.value.code == 2
    assert "dtype 'float32', now 'bfloat16'" in capsys.readouterr().err.splitlines()[-1]
    assert main(argv()) == 0, "the refused run has left the answers as they were"
    copy = data / checkpoint.name
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "config.json").unlink()
    (copy / "config.json").write_bytes((checkpoint / "config.json").read_bytes() + b"\n")
    capsys.readouterr()
    fails_with_one_line(main, argv("--model-path", copy), capsys, "checkpoint fingerprint")


def test_fingerprint_sees_both_ends_of_large_files(tmp_path):
    content = bytearray(3 << 20)
    file = tmp_path / "model.safetensors"
    seen = set()
    for position in (None, 0, len(content) - 1):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 1
        file.write_bytes(changed)
        seen.add(checkpoint_fingerprint(tmp_path))
    (tmp_path / ".cache").write_text("not part of the checkpoint")
    assert len(seen) == 3 and checkpoint_fingerprint(tmp_path) in seen
    assert checkpoint_fingerprint("liuhaotian/llava-v1.5-7b") is None


def test_merged_parts_equal_the_whole_run(parts, merge, data):
    merge(*reversed(parts))  # the order of the arguments does not matter
    assert (data / "m.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()
    meta, whole = (read_json(data / f"{name}.meta.json", "metadata") for name in "ma")
    for key in ("model", "options", "checkpoint", "question_file", "counts", "tokens", "flops_ratio", "complete"):
        assert meta[key] == whole[key], key
    assert [len(read_jsonl(part["path"])) for part in meta["parts"]] == [1, 3, 3]
    assert meta["device_seconds"] == pytest.approx(sum(part["seconds"] for part in meta["parts"]), abs=0.01)


def test_more_parts_than_questions(argv, merge, data):
    main(argv("--limit", 2))
    for index in range(4):
        main(argv("--limit", 2, "--num-chunks", 4, "--chunk-idx", index, answers=f"{index}.jsonl"))
    assert [(data / f"{index}.jsonl").stat().st_size > 0 for index in range(4)] == [True, True, False, False]
    merge(*(f"{index}.jsonl" for index in range(4)))
    assert (data / "m.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()


def refused(merge, data, capsys, parts, *texts, flags=()):
    capsys.readouterr()
    fails_with_one_line(lambda argv: merge(*parts, flags=flags), [], capsys, *texts)
    assert not (data / "m.jsonl").exists() and not (data / "m.meta.json").exists()


def test_missing_parts_are_refused(parts, merge, data, capsys):
    refused(merge, data, capsys, parts[:2], "1 of 7 questions", "q.jsonl:7")
    refused(merge, data, capsys, [*parts, "3.jsonl"], "part not found", "3.jsonl")
    refused(merge, data, capsys, [*parts, parts[0]], "given twice")
    merge(*parts[:2], flags=["--allow-missing"])
    assert len(read_jsonl(data / "m.jsonl")) == 6


def test_unfinished_and_torn_parts_are_refused(parts, merge, data, capsys):
    meta = read_json(data / "1.meta.json", "metadata")
    (data / "1.meta.json").write_text(json.dumps({**meta, "complete": False}))
    refused(merge, data, capsys, parts, "1.jsonl is not finished")
    (data / "1.meta.json").write_text(json.dumps(meta))
    whole = (data / "1.jsonl").read_bytes()
    (data / "1.jsonl").write_bytes(whole[:-5])
    refused(merge, data, capsys, parts, "1.jsonl:3", "torn")


def test_parts_of_different_runs_are_refused(argv, parts, merge, data, capsys):
    main(argv("--num-chunks", 3, "--chunk-idx", 1, "--k0", 0.1, "--overwrite", answers="1.jsonl"))
    refused(merge, data, capsys, parts, "1.jsonl", "k0 0.4, now 0.1")
    for path in data.glob("*.meta.json"):  # the answers themselves say so as well
        path.unlink()
    refused(merge, data, capsys, parts, "1.jsonl", "k0 0.4, now 0.1")


def test_answers_to_other_questions_are_refused(parts, merge, data, capsys):
    questions = read_jsonl(data / "q.jsonl")
    write_jsonl(data / "q.jsonl", questions[1:])
    refused(merge, data, capsys, parts, "q.jsonl is not the question file")
    for path in data.glob("*.meta.json"):
        path.unlink()
    refused(merge, data, capsys, parts, "'img0' is not in the question file")


def test_a_question_answered_twice(parts, merge, data, capsys):
    (data / "again.jsonl").write_bytes((data / "1.jsonl").read_bytes())
    merge(*parts, "again.jsonl")  # the same answers: one copy
    assert (data / "m.jsonl").read_bytes() == (data / "a.jsonl").read_bytes()
    (data / "m.jsonl").unlink()
    (data / "m.meta.json").unlink()
    records = read_jsonl(data / "1.jsonl")
    write_jsonl(data / "again.jsonl", [{**records[0], "text": "something else"}])
    refused(merge, data, capsys, [*parts, "again.jsonl"], "again.jsonl", "answered twice")


def test_parts_with_skipped_samples_merge(argv, merge, data):
    (data / "images" / "1.png").unlink()
    for index in range(2):
        try:
            main(argv("--num-chunks", 2, "--chunk-idx", index, answers=f"{index}.jsonl"))
        except SystemExit as error:
            assert error.code == 3
    merge("0.jsonl", "1.jsonl")
    assert len(read_jsonl(data / "m.jsonl")) == 5
    assert read_json(data / "m.meta.json", "metadata")["counts"] == {
        "total": 7,
        "answered": 5,
        "skipped": 2,
        "failed": 0,
    }


def test_foreign_metadata_is_refused(argv, data, capsys):
    main(argv("--limit", 1))
    (data / "a.meta.json").write_text('{"title": "somebody else\'s file"}')
    capsys.readouterr()
    fails_with_one_line(main, argv(), capsys, "a.meta.json", "not the metadata of a run")


def test_looking_up_the_revision_leaves_the_repository_alone():
    """A run may be killed or out of disk space: it must not be writing the index then."""
    revision = git_revision()
    if revision is None:
        pytest.skip("not a git checkout")
    command = ["git", "rev-parse", "--git-path", "index"]
    index = ROOT / subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    os.utime(ROOT / "LICENSE")  # unchanged, but the index holds another time for it: `git status` would write that down
    before = (index.stat().st_mtime_ns, index.stat().st_ino)
    assert git_revision() == revision
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == before


def test_unreadable_metadata_is_a_user_error(tmp_path):
    from llava.eval.answering.metadata import read_metadata

    (tmp_path / "a.meta.json").write_text("{")
    with pytest.raises(UserError, match="a.meta.json:1"):
        read_metadata(tmp_path / "a.jsonl")
