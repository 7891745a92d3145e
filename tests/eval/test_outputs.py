"""An option that writes never writes over an input, another output, or a file of another kind."""

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import socket
import stat
from pathlib import Path

import pytest

from llava.eval.common import outputs
from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import write_json, write_lines_atomic
from llava.eval.common.outputs import ANSWERS, SCORES, TRACES, JsonLines, JsonList, JsonObject, same_place
from llava.utils import UserError
from tests.eval.helpers import ROOT, fails_with_one_line, write_jsonl

ANSWER = {"question_id": 1, "prompt": "What?", "text": "red", "answer_id": "x", "model_id": "m", "metadata": {}}
QUESTION = {"question_id": 1, "image": "0.png", "text": "What?"}
TRACE = {"question_id": 1, "prompt": "What?", "tokens_out": [1, 2]}
FOREIGN = {
    "notes.txt": b"Remember the milk.\n",
    "annotations.json": b'{"07333408": {"question": "What?", "answer": "pipe"}}',
    "list.json": b'[{"image": "a.png", "text": "?"}]',
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "weights.bin": bytes(range(256)) * 40,
    "questions.jsonl": json.dumps(QUESTION).encode() + b"\n",
    "table.tsv": b"index\tquestion\tA\n1\tWhat?\tred\n",
    "torn.jsonl": b'{"image": "0.png", "te',
}

# Options that name what is read, or no path at all; whoever adds an option to a parser says here that it writes
# nothing, or gives it a kind. (--results-dir of the benchmarks: they replace a file only by a repetition of itself.)
PATHS_THAT_ARE_READ = {
    "draw",
    "take",
    *("truth", "gpt_scores", "qa", "image_root", "scenes_file", "gt_dir", "infos", "view_budget"),
    *("model_path", "model_base", "image_folder", "image_file", "question_file", "annotation_file", "annotation_dir"),
    *("result_file", "result_dir", "base_dir", "data_dir", "src", "dir", "parts", "traces", "result", "question_files"),
    *(
        "files",
        "variants",
        "out_dir",
        "results_dir",
        "folder",
        "child",
        "warmup",
        "lora",
        "root",
        "state",
        "result_path",
        "include_path",
        "script",
    ),
}
# Folders that have to be empty, or not there yet.
EMPTY_FOLDERS = {"llava/model/export_hf.py": {"output"}}
NOT_PATHS = {
    *("target_ratio", "minutes", "kinds", "tokens", "only_for", "flags", "base", "model_args", "tasks"),
    *("device", "dtype", "attn_implementation", "mm_patch_merge_type", "conv_mode", "method", "budget", "positions"),
    *(
        "method_args",
        "query",
        "sep",
        "version",
        "select",
        "ignore",
        "methods",
        "budgets",
        "benchmark",
        "benchmarks",
        "checkpoint",
    ),
    *("text_tokens", "marker", "versus", "table", "lang", "split", "experiment", "ckpt", "command", "prompt_format"),
    *("geometry", "allocator", "name", "visual_tokens", "batch_sizes", "workers", "what", "stage", "merge", "options"),
    *(
        "title",
        "host",
        "ablations",
        "kind",
        "parts_of",
        "batch_size",
        "published",
        "x0",
        "help",
        "category",
        "scores",
        "tags",
        "tag",
    ),
}


def scripts():
    for folder in ("llava", "scripts", "benchmarks", "playground/tiny"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if re.search(r"Parser\(|_parser\b", path.read_text(encoding="utf-8")):
                yield path


def parsers_of(path, monkeypatch):
    """The parsers that a script's `main` builds, caught at `parse_args`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if not names & {"main", "parse_args"}:
        return
    if path.parent.name == "scripts":
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    caught = []

    class Caught(Exception):
        pass

    def catch(self, *args, **kwargs):
        caught.append(self)
        raise Caught

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        patch.setattr(Parser, "parse_args", catch)
        patch.setattr(Parser, "parse_known_args", catch)
        patch.setattr("sys.argv", [str(path)])
        run = module.main if "main" in names else module.parse_args
        with pytest.raises(Caught):
            run()
    yield caught[0]


@pytest.mark.parametrize("path", list(scripts()), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_is_an_output_with_a_kind_or_known_to_write_nothing(path, monkeypatch):
    for parser in parsers_of(path, monkeypatch):
        checked = {action.dest for action in outputs.output_actions(parser)}
        for action in parser._actions:
            takes_text = action.nargs != 0 and action.type in (None, str, Path) and not action.choices
            known = PATHS_THAT_ARE_READ | NOT_PATHS | EMPTY_FOLDERS.get(str(path.relative_to(ROOT)), set())
            if takes_text and action.dest not in checked | known:
                raise AssertionError(
                    f"{path}: does {action.dest} write? give it a kind of common.outputs, or list it here"
                )
        if checked:
            assert isinstance(parser, Parser), f"{path}: argparse's own parser does not check outputs"


KINDS = {
    "scores": (SCORES, b'{"accuracy": 1.0, "expected": 3, "missing": 0}'),
    "answers": (ANSWERS, json.dumps(ANSWER).encode() + b"\n"),
    "traces": (TRACES, json.dumps(TRACE).encode() + b"\n"),
    "upload": (JsonList("an upload", ("question_id", "answer")), b'[{"question_id": 1, "answer": "red"}]'),
    "texts": (JsonObject("answers for MM-Vet", values=str), b'{"v1_0": "red"}'),
    "lines": (JsonLines("an upload", ("question_id", "prediction")), b'{"question_id": 1, "prediction": "A"}\n'),
    "metadata": (outputs.METADATA, b'{"format": 1, "options": {}}'),
    "table": (outputs.TABLE_MARKDOWN, b"| | TextVQA |\n|---|---:|\n"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_takes_its_own_files_and_no_others(tmp_path, name):
    kind, own = KINDS[name]
    kind.check(tmp_path / "new" / "file", "--out")
    (tmp_path / "empty").touch()
    kind.check(tmp_path / "empty", "--out")
    others = {**FOREIGN, **{other: content for other, (_, content) in KINDS.items() if other != name}}
    for other, content in others.items():
        path = tmp_path / other
        path.write_bytes(content)
        if (name, other) in {("lines", "torn.jsonl")}:
            continue
        with pytest.raises(UserError, match=r"not .*, so it is not overwritten"):
            kind.check(path, "--out")
        assert path.read_bytes() == content
    (tmp_path / "own").write_bytes(own)
    kind.check(tmp_path / "own", "--out")


@pytest.mark.parametrize(
    "tail", [b"", b'{"question_id": 7, "pro', b'{"que', b"\0" * 5000, b'{"question_id": 7\0\0\0\0']
)
def test_answers_that_a_kill_left_are_still_answers(tmp_path, tail):
    for whole in (b"", json.dumps(ANSWER).encode() + b"\n"):
        (tmp_path / "a.jsonl").write_bytes(whole + tail)
        ANSWERS.check(tmp_path / "a.jsonl")


def test_no_pipe_no_socket_no_device_no_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)
        server.bind("socket")
        for path in (tmp_path / "pipe", tmp_path / "socket", tmp_path, "/dev/zero", "/dev/full"):
            with pytest.raises(UserError, match="is a (pipe, socket or device|folder), not a file"):
                SCORES.check(path, "--json")
            with pytest.raises(UserError):
                write_json(path, {})
    for path in outputs.STREAMS:
        SCORES.check(path)
        with pytest.raises(UserError, match="needs a file of its own"):
            ANSWERS.check(path)


def test_streams_are_written_not_replaced(capsys):
    before = [os.stat(path).st_ino for path in outputs.STREAMS]
    write_lines_atomic("/dev/stdout", [b"one\n", b"two\n"])
    write_lines_atomic("/dev/null", [b"three\n"])
    assert capsys.readouterr().out == "one\ntwo\n" and before == [os.stat(path).st_ino for path in outputs.STREAMS]


def test_same_place(tmp_path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "a"
    path.write_text("x")
    (tmp_path / "soft").symlink_to(path)
    os.link(path, tmp_path / "hard")
    (tmp_path / "loop").symlink_to(tmp_path / "folder", target_is_directory=True)
    for other in ("soft", "hard", "loop/a", "folder/../folder/a"):
        assert same_place(path, tmp_path / other)
    assert not same_place(path, tmp_path / "b")
    assert same_place(tmp_path / "folder" / "new", tmp_path / "loop" / "new"), "neither is there yet"
    assert same_place(tmp_path / "New", tmp_path / "new") == (tmp_path / "FOLDER").exists()


# --- the tools themselves ---


@pytest.fixture
def inputs(data):
    """Files that commands read, by option, with what they hold."""
    write_jsonl(data / "answers.jsonl", [ANSWER])
    for name, content in FOREIGN.items():
        (data / name).write_bytes(content)
    return data


def disguises(path, folder):
    """Other names of a file."""
    yield path
    yield path.parent / ".." / path.parent.name / path.name
    soft, hard = folder / "soft", folder / "hard"
    for link in (soft, hard):
        link.unlink(missing_ok=True)
    soft.symlink_to(path)
    os.link(path, hard)
    yield soft
    yield hard


def test_answering_tools_destroy_no_input(argv, inputs, checkpoint, capsys):
    from llava.eval import model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science

    copy = inputs / "model"
    shutil.copytree(checkpoint, copy)
    victims = [inputs / "q.jsonl", inputs / "images" / "0.png", copy / "config.json", *copy.glob("*.safetensors")]
    victims += [inputs / name for name in FOREIGN]
    count = 0
    for victim in victims:
        before = victim.read_bytes()
        for path in disguises(victim, inputs):
            for option in ("--answers-file", "--trace-file"):
                for flags in ((), ("--overwrite",)):
                    for tool in (model_vqa_loader, model_vqa, model_vqa_mmbench, model_vqa_science):
                        capsys.readouterr()
                        command = argv("--model-path", copy, option, path, *flags)
                        if option == "--trace-file":
                            command += ["--answers-file", str(inputs / "new.jsonl")]
                        fails_with_one_line(tool.main, command, capsys, option, path)
                        assert victim.read_bytes() == before
                        count += 1
    print(f"{count} commands refused, {len(victims)} files unchanged")
    assert not (inputs / "new.jsonl").exists()


def test_answers_and_traces_need_two_places(argv, data, capsys):
    from llava.eval.model_vqa_loader import main

    for path in ("a.jsonl", "a.meta.json"):
        fails_with_one_line(main, argv("--trace-file", data / path), capsys, "both write", "--trace-file")
    (data / "a.meta.json").write_bytes((data / "q.jsonl").read_bytes())
    command = argv("--question-file", data / "a.meta.json", "--overwrite")
    fails_with_one_line(main, command, capsys, "--answers-file", "--question-file")
    fails_with_one_line(main, argv("--overwrite"), capsys, "a.meta.json", "not the metadata of a run")
    fails_with_one_line(main, argv("--answers-file", ""), capsys, "--answers-file", "names a file")


def test_merging_destroys_no_input(inputs, capsys):
    from llava.eval.merge_answers import main

    for victim, option in (("q.jsonl", "--question-file"), ("answers.jsonl", "PART"), ("notes.txt", "not a file of")):
        before = (inputs / victim).read_bytes()
        for path in disguises(inputs / victim, inputs):
            argv = ["--answers-file", path, "--question-file", inputs / "q.jsonl", inputs / "answers.jsonl"]
            fails_with_one_line(main, argv, capsys, "--answers-file", option)
            assert (inputs / victim).read_bytes() == before


def test_converters_destroy_no_input(inputs, capsys):
    import runpy

    for name, target in (("gqa_for_eval", "--dst"), ("mmvet_for_eval", "--dst"), ("vqav2_for_submission", None)):
        script = runpy.run_path(str(ROOT / "scripts" / f"convert_{name}.py"))
        option = target or "--result-upload-file"
        for victim in ("answers.jsonl", "q.jsonl", "annotations.json", "list.json", "notes.txt"):
            before = (inputs / victim).read_bytes()
            source = "--src" if target else "--result-file"
            for path in disguises(inputs / victim, inputs):
                argv = [source, inputs / "answers.jsonl", option, path]
                argv += [] if target else ["--question-file", inputs / "q.jsonl"]
                fails_with_one_line(script["main"], argv, capsys, option, path)
                assert (inputs / victim).read_bytes() == before


# --- a rewritten file ---


def test_a_rewritten_file_stays_behind_its_link_and_keeps_its_permissions(tmp_path):
    real = tmp_path / "elsewhere" / "real.json"
    real.parent.mkdir()
    real.write_text("{}")
    real.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(Path("elsewhere") / "real.json")
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(real.read_text()) == {"a": 1}
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link.json"]
    (tmp_path / "dangling").symlink_to(tmp_path / "new" / "file")
    write_json(tmp_path / "dangling", [])
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "new" / "file").read_text() == "[]\n"


def test_new_files_follow_the_umask(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        old = os.umask(umask)
        try:
            write_json(tmp_path / f"{umask}.json", {})
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / f"{umask}.json").stat().st_mode) == mode


def test_names_of_temporary_files_cannot_be_foreseen(tmp_path, monkeypatch):
    seen = []
    real_open = os.open

    def spy(path, flags, *rest, **named):
        if str(path).endswith(".tmp"):
            seen.append((str(path), flags))
        return real_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", spy)
    for _ in range(3):
        write_json(tmp_path / "a.json", {})
    assert len({path for path, _ in seen}) == 3
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in seen)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 16)
    (tmp_path / ".a.json.0000000000000000.tmp").symlink_to(victim)
    with pytest.raises(UserError, match="File exists"):
        write_json(tmp_path / "a.json", {"b": 1})
    assert victim.read_text() == "precious" and json.loads((tmp_path / "a.json").read_text()) == {}
