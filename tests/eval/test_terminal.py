"""What comes from outside and goes to a terminal, and bytes from a terminal that are no text."""

import io
import os
import subprocess
import sys

import pytest

from llava.eval import model_vqa_loader
from llava.eval.answering.progress import Progress
from llava.eval.run_llava import main as run_llava
from llava.serve.cli import main as cli
from llava.utils import UserError, cli_main, visible
from tests.eval.helpers import ROOT, fails_with_one_line, write_jsonl

CLEAR, TITLE, TURN = "\x1b[2J", "\x1b]0;title\x07", "\u202e"


@pytest.mark.parametrize(
    ("text", "one_line", "shown"),
    [
        (CLEAR, True, "\\x1b[2J"),
        (f"a{TITLE}b", False, "a\\x1b]0;title\\x07b"),
        ("\x9b31m \x7f \r\b", True, "\\x9b31m \\x7f \\r\\x08"),
        (f"pic{TURN}gpj.exe", True, "pic\\u202egpj.exe"),
        ("two\nlines\tand tabs", False, "two\nlines\tand tabs"),
        ("two\nlines\tand\u2028tabs", True, "two\\nlines\\tand\\u2028tabs"),
        ("half \udcff", True, "half \\udcff"),
        ("café 红 👩\u200d🔬 עברית \\x1b", True, "café 红 👩\u200d🔬 עברית \\x1b"),
    ],
)
def test_escapes_become_visible(text, one_line, shown):
    assert visible(text, one_line) == shown
    visible(text, one_line).encode("utf-8")


def test_errors_and_notices_are_shown_not_obeyed(capsys):
    @cli_main
    def main():
        raise UserError(f"{CLEAR}x.jsonl:3: bad id 'a\n{TITLE}'")

    with pytest.raises(SystemExit):
        main()
    with Progress(1, "label") as progress:
        progress.message(f"skipped {CLEAR}\nq.jsonl")
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\x07" not in printed and printed.count("\n") == 2
    assert "error: \\x1b[2Jx.jsonl:3: bad id 'a \\x1b]0;title\\x07'" in printed


def test_names_of_a_question_file_are_shown_not_obeyed(argv, data, preloaded, capsys):
    records = [{"question_id": CLEAR, "image": f"{TITLE}.png", "text": "?"}, {"question_id": 2, "text": "<image>"}]
    write_jsonl(data / "q.jsonl", [*records, {"question_id": 3, "image": f"../{CLEAR}", "text": "?"}])
    with pytest.raises(SystemExit) as exit_info:
        model_vqa_loader.main(argv())
    printed = capsys.readouterr()
    assert exit_info.value.code == 3 and "\x1b" not in printed.err + printed.out
    assert printed.err.count("skipped ") == 3 and "title" in printed.err


def test_names_of_scored_files_are_shown_not_obeyed(tmp_path, capsys):
    from llava.eval import eval_gqa
    from tests.eval.helpers import answer, write_json

    known = {"answer": "yes", "question": "Red?", "types": {"structural": CLEAR, "semantic": TITLE}, "isBalanced": True}
    truth = write_json(tmp_path / "truth.json", {"1": known, f"2{CLEAR}": known})
    answers = write_jsonl(tmp_path / "a.jsonl", [answer("1", "yes", "Red?"), answer(f"3{TITLE}", "no", "Red?")])
    eval_gqa.main(["--annotation-file", str(truth), "--result-file", str(answers)])
    printed = capsys.readouterr()
    assert "\\x1b[2J: 100.00%" in printed.out and "2\\x1b[2J" in printed.err and "3\\x1b]0;title" in printed.err
    assert "\x1b" not in printed.out + printed.err


@pytest.fixture
def says(monkeypatch, loaded, preloaded):
    """The model's next answers, as text."""

    def answer(text):
        def decode(ids, **options):
            return [text] * len(ids)

        monkeypatch.setattr(loaded[0], "batch_decode", decode, raising=False)
        monkeypatch.setattr(loaded[0], "decode", lambda ids, **options: text, raising=False)

    return answer


def flags(checkpoint, *more):
    flags = ("--model-path", checkpoint, "--device", "cpu", "--target-token-num", 4, "--max-new-tokens", 2, *more)
    return [str(flag) for flag in flags]


def test_answers_are_shown_by_run_llava(checkpoint, says, capsys):
    from llava.eval.run_llava import build_parser, eval_model

    says(f"one\n{CLEAR}two")
    argv = flags(checkpoint, "--conv-mode", "vicuna_v1", "--query", "What?")
    assert run_llava(argv) == 0
    assert capsys.readouterr().out == "one\n\\x1b[2Jtwo\n"
    assert eval_model(build_parser().parse_args(argv)) == f"one\n{CLEAR}two", "callers get what the model said"


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_shown_by_the_chat(checkpoint, says, capsys, monkeypatch, beams):
    says(f"{CLEAR}two words ")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n"))
    assert cli(flags(checkpoint, "--conv-mode", "vicuna_v1", "--num-beams", beams, "--debug")) == 0
    printed = capsys.readouterr()
    assert "\\x1b[2Jtwo" in printed.out and "\x1b" not in printed.out + printed.err


def test_answers_in_files_stay_as_they_are(argv, data, says):
    says(f"{CLEAR}two")
    assert model_vqa_loader.main(argv()) == 0
    assert '"text": "\\u001b[2Jtwo"' in (data / "a.jsonl").read_text()


# --- bytes that are no text ---------------------------------------------------------------------------------


BAD = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("flag", "value", "part"),
    [
        ("--answers-file", f"{BAD}.jsonl", "not UTF-8"),
        ("--question-file", f"{BAD}.jsonl", "not UTF-8"),
        ("--image-folder", BAD, "not UTF-8"),
        ("--model-path", BAD, "not UTF-8"),
        ("--trace-file", "a\0b", "null character"),
        ("--answers-file", "", "must not be empty"),
        ("--question-file", " ", "must not be empty"),
        ("--trace-file", "", "must not be empty"),
        ("--model-path", "", "must not be empty"),
        ("--model-base", "", "must not be empty"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_what_can_be_no_name_is_found_before_loading(argv, capsys, monkeypatch, flag, value, part, joined):
    monkeypatch.setattr(
        "llava.eval.answering.loading.load_model", lambda args: pytest.fail("found before the model is loaded")
    )
    given = [f"{flag}={value}"] if joined else [flag, value]
    fails_with_one_line(model_vqa_loader.main, [*argv(), *given], capsys, flag, part)


def test_queries_and_names_of_images(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(
        "llava.eval.answering.loading.load_model", lambda args: pytest.fail("found before the model is loaded")
    )
    base = flags(checkpoint, "--conv-mode", "llava_v0")
    fails_with_one_line(run_llava, [*base, "--query", BAD], capsys, "--query", "not UTF-8")
    fails_with_one_line(run_llava, [*base, "--query", "?", "--image-file", BAD], capsys, "--image-file", "not UTF-8")
    fails_with_one_line(run_llava, [*base, "--query", "?", "--image-file", ""], capsys, "--image-file", "empty")
    fails_with_one_line(run_llava, [*base, "--query", "<image>"], capsys, "1 image placeholder(s)")
    mistral = flags(checkpoint, "--conv-mode", "mistral_instruct", "--query", "")
    monkeypatch.setattr("llava.eval.answering.chat.infer_conv_mode", lambda name: "mistral_instruct")
    fails_with_one_line(run_llava, mistral, capsys, "must not be empty")


def test_a_name_with_the_separator_in_it(checkpoint, data, capsys):
    base = flags(checkpoint, "--conv-mode", "llava_v0", "--query", "?", "--image-file")
    for value in (data / "images" / "no,such.png", f"{data / 'images' / '0.png'},b.png"):
        fails_with_one_line(run_llava, [*base, str(value)], capsys, "does not exist", "split at ','", "--sep")
    (data / "images" / "a,b.png").write_bytes((data / "images" / "0.png").read_bytes())
    assert run_llava([*base, str(data / "images" / "a,b.png"), "--sep", ";"]) == 0


def test_bytes_that_are_no_text_cost_one_question_of_the_chat(checkpoint):
    command = [sys.executable, "-m", "llava.serve.cli", *flags(checkpoint, "--conv-mode", "vicuna_v1")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, input=b"caf\xe9?\nWhat is it?\n", capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    assert b"error: the question holds bytes that are not UTF-8" in done.stderr and b"Traceback" not in done.stderr
    assert done.stdout.count(b"USER: ") == 3 and done.stderr.count(b"[autoprune:") == 1


def test_a_terminal_without_these_characters(capsys):
    script = "from llava.utils import cli_main; cli_main(lambda: print('caf\\xe9 \\u7ea2 \\udcff'))()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, cwd=ROOT)
    assert done.stdout.split() == [b"caf\\xe9", b"\\u7ea2", b"\\udcff"] and done.returncode == 0
