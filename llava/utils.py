"""Small helpers shared by the command line tools: user-facing errors, text for terminals, loggers."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

USER_ERROR_STATUS = 2
INCOMPLETE_STATUS = 3  # done, but something of the input was left out
INTERRUPTED_STATUS = 130


class UserError(ValueError):
    """A mistake in what the user gave us (path, flag, data file), told in one line.

    The message names the file, line or option and says what to do. Command line tools print it without a
    traceback.
    """


# Marks that turn the order of writing around, and halves of surrogate pairs, which no terminal can show.
_MISLEADING = "\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff"
# The control characters that a terminal obeys: it rings, moves, deletes, changes its settings, answers.
_OBEYED = re.compile(f"[\\x05\\x07\\x08\\x0b-\\x0f\\x18\\x1a\\x1b\\x7f-\\x9f{_MISLEADING}]")
_CONTROL = re.compile(f"[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029{_MISLEADING}]")


def visible(text: str, one_line: bool = True) -> str:
    """`text` for a terminal: what the terminal would obey instead of show becomes an escape like `\\x1b`.

    For everything that comes from outside: names of files, ids, answers of a model. one_line: for names and messages,
    in which no control character has its place; without it line breaks, tabs and what a terminal ignores stay.
    """
    return (_CONTROL if one_line else _OBEYED).sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def is_user_error(error: BaseException) -> bool:
    """True for `UserError` and for errors of packages that know nothing of LLaVA but mark themselves as
    user errors.

    The mark is a class attribute `is_user_error = True`; `llava.pruning` uses it so that it need not import
    this module.
    """
    return isinstance(error, UserError) or getattr(error, "is_user_error", False) is True


def describe_error(error: BaseException) -> str:
    """The error as one line that a terminal shows and does not obey; file errors are put as `path: reason`."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return visible(" ".join(text.split()))


def cli_main(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for `main()` functions: a user's mistake becomes `error: ...` on stderr and exit status 2.

    User mistakes are user errors (see `is_user_error`) and file errors that carry a file name. Everything
    else is a defect of ours and keeps its traceback. Ctrl-C exits with 130. If `main` returns a non-zero
    integer, that is the exit status.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # What the encoding cannot say is escaped, as it is on a fresh interpreter's stderr anyway.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError):
                if stream.errors == "strict":
                    stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            result = main(*args, **kwargs)
        except KeyboardInterrupt as error:
            print(f"error: {visible(str(error)) or 'interrupted'}", file=sys.stderr)
            sys.exit(getattr(error, "exit_status", INTERRUPTED_STATUS))
        except BrokenPipeError:
            # The reader of our output (`| head`) went away: not an error, but Python would complain again
            # at shutdown.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except Exception as error:
            if is_user_error(error) or (isinstance(error, OSError) and error.filename is not None):
                print(f"error: {describe_error(error)}", file=sys.stderr)
                sys.exit(USER_ERROR_STATUS)
            raise
        if isinstance(result, int) and not isinstance(result, bool) and result != 0:
            sys.exit(result)
        return result

    return wrapper


def disable_torch_init() -> None:
    """Skip torch's default initialisation of Linear and LayerNorm weights: a checkpoint overwrites them
    anyway.

    Process-wide, as in LLaVA; call it in scripts that only load models, never where a model is trained from
    scratch.
    """
    import torch

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        setattr(layer, "reset_parameters", lambda self: None)  # noqa: B010


def build_logger(name: str, filename: str | None = None, level: int = logging.INFO) -> logging.Logger:
    """A logger that writes to stderr and, when `filename` is given, to that file. Calling it twice adds no
    second handler.
    """
    logger = logging.getLogger(name)
    logger.setLevel(level)
    formatter = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S")
    wanted: list[logging.Handler] = []
    if not any(type(h) is logging.StreamHandler for h in logger.handlers):
        wanted.append(logging.StreamHandler())
    if filename is not None:
        path = os.path.abspath(filename)
        if not any(getattr(h, "baseFilename", None) == path for h in logger.handlers):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            wanted.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in wanted:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.propagate = False
    return logger


_SHOWN = 40  # characters of a value in a message


def kind_of(value: Any) -> str:
    """A value in a few words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "an empty list" if not value else "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bool):
        return str(value).lower()
    text = ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
