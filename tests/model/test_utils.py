"""User errors, command line wrapper, loggers, and imports that stay light."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from llava.pruning import OptionError
from llava.utils import UserError, build_logger, cli_main, describe_error, disable_torch_init
from tests.conftest import ROOT


def run_main(error):
    @cli_main
    def main():
        """What it does."""
        raise error

    assert main.__name__ == "main" and main.__doc__ == "What it does."
    main()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("questions.jsonl:3: not JSON"), "error: questions.jsonl:3: not JSON\n"),
        (UserError("two\n lines"), "error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "error: a.json: No such file or directory\n"),
        (OptionError("unknown option"), "error: unknown option\n"),
    ],
)
def test_mistakes_of_the_user_are_one_line_and_status_2(capsys, error, line):
    with pytest.raises(SystemExit) as stop:
        run_main(error)
    assert stop.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), KeyError("ours"), OSError("no file name")])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_main(error)


def test_exit_status_of_main():
    with pytest.raises(SystemExit) as stop:
        cli_main(lambda: 3)()
    assert stop.value.code == 3
    assert (
        cli_main(lambda: 0)() == 0 and cli_main(lambda: True)() is True and cli_main(lambda x: {"a": x})(1) == {"a": 1}
    )
    with pytest.raises(SystemExit) as stop:
        run_main(KeyboardInterrupt())
    assert stop.value.code == 130


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError) and describe_error(ValueError()) == "ValueError"


def test_a_reader_that_goes_away_is_no_error():
    code = "from llava.utils import cli_main\n@cli_main\ndef main():\n    for i in range(100000): print(i)\nmain()\n"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_import_is_light():
    code = "import sys, llava, llava.utils, llava.conversation, llava.constants; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def test_disable_torch_init_skips_initialization(monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", torch.nn.Linear.reset_parameters)
    monkeypatch.setattr(torch.nn.LayerNorm, "reset_parameters", torch.nn.LayerNorm.reset_parameters)
    disable_torch_init()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    torch.nn.Linear(8, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_loggers_write_to_a_file_once(tmp_path):
    path = tmp_path / "logs" / "run.log"
    for _ in range(2):
        logger = build_logger("llava.test", str(path))
    logger.info("hello")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    assert path.read_text().count("hello") == 1 and "| INFO | llava.test |" in path.read_text()
    assert logging.getLogger("llava.test") is logger
