"""Seeded mutations of input files, and the rule that every reader has to keep: a value, or one line of error.

A target is a set of small intact files and a call that reads them. Mutated inputs may be refused (`UserError`,
`SampleError`, exit status 2 or 3) or accepted; anything else, a hang included, is a finding.

    python -m tests.fuzzing --mutations 50000 --seed 7 [TARGET ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.utils import UserError

SECONDS = 20
TOKENS = [b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"\r", b"\0", b",", b":", b"\t", b"null", b"true", b"-1e999",
          b"\xff", b"\\ud800", b"NaN", b"Infinity", b"1" * 400, b"1" * 5000, b"\xef\xbb\xbf", b"[" * 3000,
          b'{"a":' * 200, b'"question_id"', b'"text": 5', b"\x1b[31m", b"x" * 20000, b"<", b"&", b"9" * 11]  # fmt: skip
_DEEP, _DIGITS = "@deep@", "@digits@"  # put in as text behind json.dumps, which cannot write them
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.5, 1e308, 1e-308, 10**18, 10**25, -(10**25), 10**400, float("nan"),
    float("inf"), float("-inf"), "", " ", "3", "-1", "1e5", "x", "yes", "A", "\ud800", "a\udfffb", "\0", "\x1b[2J",
    "nan", "None", "../../x", "/etc/passwd", "y" * 5000, [], {}, [1], ["x"], [None], {"a": 1}, [[]], [{}], "\n",
    _DEEP, _DIGITS,
]  # fmt: skip


# --- mutations -----------------------------------------------------------------------------------------------------


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """A few random cuts, flips, insertions and swaps."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            del data[at : at + draw.randint(1, 40)]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[at:at] = draw.choice(TOKENS)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            other = draw.randrange(len(data) + 1)
            data[at:at] = data[other : other + draw.randint(1, 200)]
        else:
            data[at : at + 4] = bytes(draw.randrange(256) for _ in range(4))
    return bytes(data)


def mutate_lines(content: bytes, draw: random.Random) -> bytes:
    """Whole lines lost, doubled, in another order or encoding, or as one JSON array."""
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    kind = draw.randrange(10)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[draw.randrange(len(lines))])
    elif kind == 2:
        draw.shuffle(lines)
    elif kind == 3:
        lines.insert(at, draw.choice([b"", b" ", b"[]", b"{}", b"null", b"3", b'"x"', b"\0" * 512, b"\xff"]))
    elif kind == 4:
        return content.replace(b"\n", b"\r\n")
    elif kind == 5:
        return b"\xef\xbb\xbf" + content
    elif kind == 6:
        return b"[" + b",".join(line for line in lines if line.strip()) + b"]"
    elif kind == 7:
        return b""
    elif kind == 8:
        return content.decode("utf-8", "replace").encode("utf-16")
    else:
        lines[at] = lines[at].replace(b",", draw.choice(TOKENS), 1)
    return b"\n".join(lines)


def mutate_value(value: Any, draw: random.Random) -> Any:
    """The same JSON value with one place in it changed."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.04:
        return draw.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(list(keys))
    if isinstance(value[key], dict | list) and value[key] and draw.random() < 0.85:
        changed = mutate_value(value[key], draw)
        return {**value, key: changed} if isinstance(value, dict) else [*value[:key], changed, *value[key + 1 :]]
    kind = draw.randrange(8)
    copy = value.copy()
    if kind == 0:
        del copy[key]
    elif kind == 1 and isinstance(copy, dict):
        copy[draw.choice(["", "x", "\ud800", "question_id", key + " "])] = copy.pop(key)
    elif kind == 2 and isinstance(copy, list):
        copy.insert(key, draw.choice([copy[key], *VALUES]))
    elif kind == 3:
        copy[key] = [copy[key]]
    elif kind == 4 and not isinstance(copy[key], dict | list):
        copy[key] = str(copy[key])
    else:
        copy[key] = draw.choice(VALUES)
    return copy


def _dump(value: Any) -> str:
    text = json.dumps(value)
    for mark, replacement in ((_DEEP, "[" * 2000 + "]" * 2000), (_DIGITS, "9" * 5000)):
        text = text.replace(f'"{mark}"', replacement)
    return text


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """One value of a JSON or JSON-lines file becomes another, a key is lost, renamed or doubled."""
    lines = [line for line in content.split(b"\n") if line.strip()]
    try:
        at = draw.randrange(len(lines)) if len(lines) > 1 else 0
        text = _dump(mutate_value(json.loads(lines[at]), draw))
    except ValueError:
        at, lines = 0, [b""]
        text = _dump(mutate_value(json.loads(content), draw))
    if draw.random() < 0.03 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    lines[at] = text.encode("utf-8")
    return b"\n".join(lines) + b"\n"


def mutate_workbook(content: bytes, draw: random.Random) -> bytes:
    """The zip archive itself, or one of the files in it."""
    if draw.random() < 0.3:
        return mutate_bytes(content, draw)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        sheet = next(name for name in names if "sheet1" in name)
        chosen = sheet if draw.random() < 0.5 else draw.choice(names)
        for name in names:
            data = old.read(name)
            new.writestr(name, mutate_bytes(data, draw) if name == chosen else data)
    return target.getvalue()


def mutate(name: str, content: bytes, draw: random.Random) -> bytes:
    """A mutation that fits the kind of file."""
    if name.endswith(".xlsx"):
        return mutate_workbook(content, draw)
    chance = draw.random()
    if name.endswith((".json", ".jsonl")) and chance < 0.65:
        return mutate_json(content, draw)
    return mutate_lines(content, draw) if chance < 0.75 else mutate_bytes(content, draw)


# --- the rule ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_hang(seconds: int = SECONDS):
    """Fails instead of waiting for ever."""

    def late(number, frame):
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class Finding(AssertionError):
    """An input that neither gave a value nor one line of error."""


def refused(call: Callable[[], Any], where: str, errors: tuple[type[BaseException], ...] = (UserError,)) -> str | None:
    """Why the call refuses its input, None if it does not; raises `Finding` for what is neither refusal nor result."""
    try:
        with no_hang():
            call()
        return None
    except errors as error:
        if not str(error) or "\n" in str(error):
            raise Finding(f"{where}: not one line: {str(error)!r}") from error
        return str(error)
    except SystemExit as error:
        if error.code not in (2, 3):
            raise Finding(f"{where}: exit status {error.code}") from error
        return f"exit status {error.code}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Finding(f"{where}: {type(error).__name__}: {str(error)[:300]}") from error


@dataclass
class Figures:
    """What became of mutated inputs, by kind of reader and file."""

    kinds: set[str] = field(default_factory=set)
    refused: int = 0
    accepted: int = 0
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.refused + self.accepted + len(self.findings)} mutated inputs of {len(self.kinds)} kinds: "
            f"{self.refused} refused, {self.accepted} accepted, {len(self.findings)} tracebacks"
        )


@dataclass(frozen=True)
class Target:
    """A reader. build: writes intact files below a folder and gives the names of those to mutate and the call.

    weight: how many mutations it gets relative to the others (slow ones get fewer).
    """

    name: str
    build: Callable[[Path], tuple[Sequence[str], Callable[[], Any]]]
    weight: float = 1.0


def fuzz(target: Target, folder: Path, mutations: int, seed: int, figures: Figures, stop: bool = True) -> None:
    """Mutates the files of a target, one at a time and in turn; raises the first `Finding`, or collects them."""
    names, call = target.build(folder)
    originals = {name: (folder / name).read_bytes() for name in names}
    if reason := refused(call, f"{target.name}: intact files"):
        raise AssertionError(f"{target.name}: the intact files are refused: {reason}")
    for number in range(mutations):
        name = names[number % len(names)]
        where = f"{target.name}, {name}, seed {seed + number}"
        content = mutate(name, originals[name], random.Random(f"{target.name} {name} {seed + number}"))
        (folder / name).write_bytes(content)
        figures.kinds.add(f"{target.name} {name}")
        try:
            if refused(call, where):
                figures.refused += 1
            else:
                figures.accepted += 1
        except Finding as error:
            if stop:
                raise
            trace = traceback.extract_tb(error.__cause__.__traceback__)
            own = next((entry for entry in reversed(trace) if "/llava/" in entry.filename), trace[-1])
            figures.findings.append(f"{error} [{own.filename.split('/llava/')[-1]}:{own.lineno}]")
        finally:
            (folder / name).write_bytes(originals[name])


def main() -> None:
    from tests.eval.fuzz_targets import TARGETS
    from tests.model.fuzz_targets import TARGETS as MODEL_TARGETS

    parser = argparse.ArgumentParser(description="Fuzz every reader.")
    parser.add_argument("targets", nargs="*", help="names of targets; default: all")
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    everything = [*TARGETS, *MODEL_TARGETS]
    chosen = [target for target in everything if not args.targets or target.name in args.targets]
    share = args.mutations / sum(target.weight for target in chosen)
    figures = Figures()
    with contextlib.suppress(ImportError, ValueError):
        import resource  # a value that asks for all memory must fail, not take the machine along

        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    warnings.simplefilter("ignore")
    for target in chosen:
        started, before = time.perf_counter(), len(figures.findings)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            silent = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                fuzz(target, Path(folder), round(share * target.weight), args.seed, figures, stop=False)
        new = figures.findings[before:]
        print(f"{target.name}: {len(new)} findings, {time.perf_counter() - started:.1f} s", flush=True)
        seen: set[str] = set()
        for text in new:
            place = text[text.rfind("[") :]
            if place not in seen:
                seen.add(place)
                print("   ", text.encode("utf-8", "backslashreplace").decode()[:400], flush=True)
    print(figures)
    sys.exit(bool(figures.findings))


if __name__ == "__main__":
    main()
