"""Making the miniature benchmarks on first use: whole or not at all, once, and only with the committed content."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.utils import UserError
from playground.tiny.build import __main__ as command
from playground.tiny.build import ensure as making
from playground.tiny.build import files
from playground.tiny.build.benchmarks import ROOT
from playground.tiny.build.items import Build
from playground.tiny.world.scenes import render, sample_scene
from tests.eval.helpers import fails_with_one_line

SCENES = [sample_scene(np.random.default_rng(seed), 5, 6, held_out=True) for seed in range(4)]
TEXT = "eval/MME/0001.txt"
PICTURES = [f"eval/pictures/{i}" for i in range(4)]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder and checksums of one text and four pictures, in the place of the 1347 files."""
    build = Build({"MME/0001.txt": "Is there a star?\tYes\n"}, {f"pictures/{i}": s for i, s in enumerate(SCENES)})
    makers = files.contents({"eval": build})
    monkeypatch.setattr(making, "makers", lambda: makers)
    checksums = tmp_path / "checksums.txt"
    files.write_checksums(((path, files.checksum(path, make())) for path, make in makers.items()), checksums)
    return tmp_path / "data", checksums


def test_the_committed_checksums_are_those_of_the_generator() -> None:
    wanted, makers = files.read_checksums(), making.makers()
    assert wanted.keys() == makers.keys()
    some = [p for i, p in enumerate(wanted) if i % 8 == 0 or Path(p).suffix in (".txt", ".json", ".jsonl", ".tsv")]
    assert {p: files.checksum(p, makers[p]()) for p in some} == {p: wanted[p] for p in some}


def test_everything_is_there_before_the_tests_run() -> None:
    assert all((ROOT / path).is_file() for path in files.read_checksums())
    assert making.ensure() == 0


def test_pixels_count_and_not_how_they_are_stored(tmp_path) -> None:
    pixels = Image.fromarray(render(SCENES[0]))
    stored = []
    for mode, level in (("RGB", 1), ("RGB", 9), ("P", 6)):
        file = io.BytesIO()
        picture = pixels if mode == "RGB" else pixels.quantize(256)
        picture.save(file, format="PNG", compress_level=level)
        stored.append(file.getvalue())
    assert len(set(stored)) == 3
    assert len({files.checksum("a.png", data) for data in stored}) == 1
    changed = render(SCENES[0]).copy()
    changed[0, 0, 0] ^= 1
    file = io.BytesIO()
    Image.fromarray(changed).save(file, format="PNG")
    assert files.checksum("a.png", file.getvalue()) != files.checksum("a.png", stored[0])
    turned = io.BytesIO()
    Image.fromarray(render(SCENES[0]).reshape(1, -1, 3)).save(turned, format="PNG")
    assert files.checksum("a.png", turned.getvalue()) != files.checksum("a.png", stored[0]), "the shape counts too"


def test_every_cell_of_a_table_counts() -> None:
    rows = [{"index": "1", "question": "?", "image": SCENES[0]}, {"index": "2", "question": "?", "image": "1"}]
    original = files.checksum("t.tsv", files.table(rows).encode())
    file = io.BytesIO()
    Image.fromarray(render(SCENES[0])).save(file, format="PNG", compress_level=0)
    again = files.table([{**rows[0], "image": base64.b64encode(file.getvalue()).decode()}, rows[1]])
    assert files.checksum("t.tsv", again.encode()) == original
    for changed in (
        [{**rows[0], "question": "!"}, rows[1]],
        [{**rows[0], "image": SCENES[1]}, rows[1]],
        [rows[0], {**rows[1], "image": "2"}],
        rows[:1],
    ):
        assert files.checksum("t.tsv", files.table(changed).encode()) != original


def test_only_what_is_missing_is_made(small, capsys) -> None:
    root, checksums = small
    assert making.ensure(root, checksums=checksums) == 5
    assert "5 files" in capsys.readouterr().err
    times = {path: (root / path).stat().st_mtime_ns for path in (TEXT, *PICTURES)}
    (root / PICTURES[2]).unlink()
    answers = root / "eval" / "pictures" / "answers.jsonl"
    answers.write_text("{}\n")
    assert making.ensure(root, checksums=checksums) == 1
    assert making.ensure(root, checksums=checksums) == 0
    kept = [p for p in times if (root / p).stat().st_mtime_ns == times[p]]
    assert kept == [p for p in times if p != PICTURES[2]]
    assert answers.read_text() == "{}\n", "other files in the folder stay"


def test_a_complete_folder_is_not_read_again(small, monkeypatch) -> None:
    root, checksums = small
    making.ensure(root, checksums=checksums)
    monkeypatch.setattr(making, "checksum", lambda *_: pytest.fail("read a file again"))
    assert making.ensure(root, checksums=checksums) == 0


@pytest.mark.parametrize("content", [b"", b"no picture", "other", "torn"])
@pytest.mark.parametrize("remembered", [True, False])
def test_an_altered_picture_is_named_and_not_replaced_unasked(small, content, remembered) -> None:
    root, checksums = small
    making.ensure(root, checksums=checksums)
    victim = root / PICTURES[1]
    data = {"other": files.encode(SCENES[0]), "torn": victim.read_bytes()[:-40]}.get(content, content)
    victim.write_bytes(data)
    if not remembered:
        (root / making.MADE).unlink()
    with pytest.raises(UserError, match="was altered") as error:
        making.ensure(root, checksums=checksums)
    assert str(victim) in str(error.value) and "--overwrite" in str(error.value)
    assert victim.read_bytes() == data
    assert making.ensure(root, overwrite=True, checksums=checksums) == 1
    assert files.checksum("x", victim.read_bytes()) == files.checksum("x", files.encode(SCENES[1]))


def test_files_of_an_earlier_version_are_replaced(small) -> None:
    """After an update of the repository nobody altered them; they are ours."""
    root, checksums = small
    making.ensure(root, checksums=checksums)
    older = files.encode(SCENES[3])
    (root / PICTURES[0]).write_bytes(older)
    record = making._recorded(root)
    record[PICTURES[0]] = [files.checksum("x", older), *making._stat(root / PICTURES[0])]
    making._remember(root, record)
    assert making.ensure(root, checksums=checksums) == 1
    assert files.checksum("x", (root / PICTURES[0]).read_bytes()) == files.checksum("x", files.encode(SCENES[0]))


def test_a_machine_that_draws_otherwise_is_told_which_picture(small) -> None:
    root, checksums = small
    lines = checksums.read_text().replace(files.read_checksums(checksums)[PICTURES[1]], "0" * files.DIGITS)
    checksums.write_text(lines)
    with pytest.raises(UserError, match="constraints.txt") as error:
        making.ensure(root, checksums=checksums)
    assert str(root / PICTURES[1]) in str(error.value)
    assert not (root / PICTURES[1]).exists()


def test_a_copied_folder_that_cannot_be_written_is_used(small, monkeypatch) -> None:
    root, checksums = small
    making.ensure(root, checksums=checksums)
    (root / making.MADE).unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(making, "_write", refuse)
    assert making.ensure(root, checksums=checksums) == 0
    (root / TEXT).unlink()
    with pytest.raises(UserError, match="Permission denied.* 1 files .* missing"):
        making.ensure(root, checksums=checksums)


def test_a_file_in_the_place_of_the_folder(small) -> None:
    root, checksums = small
    root.write_text("")
    with pytest.raises(UserError, match="must be able to write there"):
        making.ensure(root, checksums=checksums)


def test_interrupted_between_writing_and_naming(small, monkeypatch) -> None:
    root, checksums = small
    replace, calls = os.replace, []

    def interrupt(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            making.ensure(root, checksums=checksums)
    there = [path for path in (TEXT, *PICTURES) if (root / path).exists()]
    assert len(there) == 2 and not list(root.glob(f"{making.PART}*"))
    assert making.ensure(root, checksums=checksums) == 3


def start(root: Path, *flags: str) -> subprocess.Popen:
    argv = [sys.executable, "-m", "playground.tiny.build", "--root", str(root), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, cwd=ROOT.parents[2], **pipes)


def test_killed_in_the_middle_and_started_twice_at_once(tmp_path) -> None:
    first = start(tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("eval/textvqa/train_images/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (tmp_path / f"{making.PART}12345").write_bytes(b"half a file of a process that was killed")
    assert 0 < sum(path in wanted for wanted in [files.read_checksums()] for path in relative(tmp_path)) < 1347
    pair = [start(tmp_path), start(tmp_path, "--quiet")]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert sum("making the miniature" in err for _, err in outputs) == 1, outputs
    assert relative(tmp_path) - {making.MADE, making.LOCK} == files.read_checksums().keys()
    wanted = files.read_checksums()
    assert {path: files.checksum(path, (tmp_path / path).read_bytes()) for path in wanted} == wanted


def test_the_command_compares_and_writes_nothing(small, monkeypatch, capsys) -> None:
    root, checksums = small
    monkeypatch.setattr(command, "makers", making.makers)
    monkeypatch.setattr(command, "CHECKSUMS", checksums)
    making.ensure(root, checksums=checksums)
    assert command.check(root) == 5
    capsys.readouterr()
    (root / PICTURES[3]).write_bytes(files.encode(SCENES[0]))
    fails_with_one_line(command.main, ["--root", root, "--check"], capsys, root / PICTURES[3])
    checksums.write_text(checksums.read_text() + f"{'0' * files.DIGITS} eval/another.txt\n")
    fails_with_one_line(command.main, ["--root", root, "--check"], capsys, "--record")


def relative(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
