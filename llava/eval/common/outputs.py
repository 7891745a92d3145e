"""What an option may write over: never an input of the same command, never a file of another kind.

An option that writes has a `Kind` (or an `OutputFolder`) as its argparse `type`; `Parser.parse_args` then checks it
before anything is read or computed. Everything else that a command line names and that exists counts as an input.

Pipes, sockets, devices and folders are refused. `/dev/stdout`, `/dev/stderr` and `/dev/null` are taken where a file is
written in one go; answers, traces, pictures and workbooks need a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.common.paths import meta_path, parts_folder
from llava.utils import UserError

STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/null")
_HEAD = 1 << 16
_LINES = 100  # lines of a JSON-lines file that are looked at


def check_path(text: str) -> str:
    """`text` if it can be a path; for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("names no file")
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path cannot hold a NUL character")
    return text


@dataclass(frozen=True)
class Kind:
    """A kind of file that an option writes.

    name: with its article, for messages; what: the short name of the file; streams: whether `STREAMS` are taken.
    """

    name: str
    what: str = field(default="file", kw_only=True)
    streams: bool = field(default=True, kw_only=True)

    def __call__(self, text: str) -> str:
        return check_path(text)

    def holds(self, path: Path) -> bool:
        """Whether the content of a file that is not empty is of this kind."""
        raise NotImplementedError

    def beside(self, path: Path) -> Mapping[Path, Kind | None]:
        """Further paths that are written with `path`; None for a folder."""
        return {}

    def check(
        self, path: str | os.PathLike[str], option: str = "", reading: Iterable[str | os.PathLike[str]] = ()
    ) -> None:
        """Raises `UserError`, beginning with `option`, unless `path` is new, empty or of this kind, and none of those
        that the command is `reading`.
        """
        where = f"{option} {path}".strip()
        for source in reading:
            if same_place(path, source):
                raise UserError(f"{where}: is {source}, which is read, and would be overwritten; give another path")
        if os.fspath(path) in STREAMS:
            if not self.streams:
                raise UserError(f"{where}: {self.name} needs a file of its own, not a stream")
            return
        try:
            status = os.stat(path)
        except FileNotFoundError:
            _require_place(Path(path), f"{self.what} {path}")
            return
        except OSError as error:
            raise UserError(f"cannot write {self.what} {path}: {error.strerror or error}") from None
        require_plain(status, where)
        if not status.st_size:
            return
        try:
            fits = self.holds(Path(path))
        except (OSError, MemoryError) as error:
            raise UserError(f"{where}: cannot be read to see what it holds ({error})") from None
        if not fits:
            raise UserError(
                f"{where}: not {self.name}, so it is not overwritten; give another path, or remove the file"
            )


def require_plain(status: os.stat_result, where: str) -> None:
    """Raises `UserError`, beginning with `where`, for folders, pipes, sockets and devices."""
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{where}: is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{where}: is a pipe, socket or device, not a file")


def _require_place(path: Path, where: str) -> None:
    """The folder of a file that is not there yet: there, or one that can be made."""
    # A link that leads nowhere is written behind the link.
    folder = Path(os.path.realpath(path)).parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {where}: {folder} is not a folder")


def _json(path: Path) -> Any:
    """The value of a JSON file, or None. What does not begin like one, a checkpoint say, is not read."""
    with open(path, "rb") as file:
        if not file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
            return None
        file.seek(0)
        data = file.read()
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class JsonObject(Kind):
    """A JSON object with all `keys`, or an empty one. of: keys of each of its values, which are then objects."""

    keys: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    values: type | tuple[type, ...] = object

    def holds(self, path: Path) -> bool:
        value = _json(path)
        if not isinstance(value, dict):
            return False
        parts = list(value.values())
        if self.of and not all(isinstance(part, dict) and set(self.of) <= set(part) for part in parts):
            return False
        return not value or (set(self.keys) <= set(value) and all(isinstance(part, self.values) for part in parts))


@dataclass(frozen=True)
class JsonList(Kind):
    """A JSON list of objects that have all `keys`, and no others if `only`."""

    keys: tuple[str, ...] = ()
    only: bool = True

    def holds(self, path: Path) -> bool:
        value = _json(path)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            return False
        wanted = set(self.keys)
        return all(wanted == set(entry) if self.only else wanted <= set(entry) for entry in value)


@dataclass(frozen=True)
class JsonLines(Kind):
    """One JSON object per line with all `keys` and none of `without`.

    One such line among the first hundred is enough, so that a damaged file can be started over; a file that was torn
    in its first line has to begin like one.
    """

    keys: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def holds(self, path: Path) -> bool:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            file.seek(0)
            whole = False
            for _, raw in zip(range(_LINES), file, strict=False):
                if raw.endswith(b"\n") and raw.strip(b"\0 \t\r\n"):
                    whole = True
                    if self._fits(raw):
                        return True
        if whole:
            return False
        text = head.replace(b"\0", b"").strip()
        start = f'{{"{self.keys[0]}": '.encode()
        return start.startswith(text) or text.startswith(start)

    def _fits(self, raw: bytes) -> bool:
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            return False
        return isinstance(record, dict) and set(self.keys) <= set(record) and not set(self.without) & set(record)


@dataclass(frozen=True)
class Answers(JsonLines):
    """The answers of a run, with its metadata and, while several processes write it, the folder of their parts."""

    def beside(self, path: Path) -> Mapping[Path, Kind | None]:
        return {meta_path(path): METADATA, parts_folder(path): None}


@dataclass(frozen=True)
class Traces(JsonLines):
    """The traces of a run; several processes write parts."""

    def beside(self, path: Path) -> Mapping[Path, Kind | None]:
        return {parts_folder(path): None}


@dataclass(frozen=True)
class Text(Kind):
    """Text whose beginning matches a regular expression."""

    pattern: str = ""

    def holds(self, path: Path) -> bool:
        with open(path, "rb") as file:
            return re.match(self.pattern, file.read(_HEAD).decode("utf-8-sig", "replace")) is not None


@dataclass(frozen=True)
class Document(Kind):
    """A document that is read, changed between markers and written again: the tool refuses one without the markers."""

    def holds(self, path: Path) -> bool:
        return True


@dataclass(frozen=True)
class Picture(Kind):
    """A picture with the mark of what drew it in its first or last bytes; no photograph has it."""

    mark: bytes = b"matplotlib"

    def holds(self, path: Path) -> bool:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            file.seek(max(os.path.getsize(path) - _HEAD, 0))
            return self.mark in (head + file.read()).lower()


@dataclass(frozen=True)
class Workbook(Kind):
    """An Excel workbook that openpyxl has written, as ours are."""

    def holds(self, path: Path) -> bool:
        try:
            with zipfile.ZipFile(path) as archive, archive.open("docProps/core.xml") as file:
                return b"openpyxl" in file.read(_HEAD)
        except (zipfile.BadZipFile, KeyError, RuntimeError, NotImplementedError):
            return False


METADATA = JsonObject("the metadata of a run", ("format", "options"))
ANSWERS = Answers(
    "a file of answers", ("question_id", "prompt", "text"), ("tokens_out",), what="answers file", streams=False
)
TRACES = Traces(
    "a file of traces", ("question_id", "prompt", "tokens_out"), ("text",), what="trace file", streams=False
)
SCORES = JsonObject("a file of scores", ("expected", "missing"))
DOCUMENT = Document("a document")
PICTURE = Picture("a picture drawn by this tool", streams=False)
WORKBOOK = Workbook("a workbook written by this tool", streams=False)
TABLE_MARKDOWN = Text("a table in Markdown", r"\s*\|")


@dataclass(frozen=True, eq=False)
class OutputFolder:
    """A folder that an option writes into.

    files: name pattern -> kind; `{flag}` in a pattern stands for the value of that flag.
    """

    files: Mapping[str, Kind]

    def __call__(self, text: str) -> str:
        return check_path(text)

    def found(self, folder: str, args: argparse.Namespace) -> Iterator[tuple[Path, Kind]]:
        """The files that would be written, if their names are known, and those that are there."""
        for pattern, kind in self.files.items():
            name = pattern.format(**vars(args))
            if "*" not in name:
                yield Path(folder) / name, kind
            else:
                yield from ((path, kind) for path in sorted(Path(folder).glob(name)))

    def check(self, folder: str, option: str) -> None:
        """Raises `UserError` if the path is there and no folder."""
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise UserError(f"{option} {folder}: is not a folder")
        if not os.path.exists(folder):
            _require_place(Path(folder), f"{option} {folder}")


@dataclass(frozen=True)
class Below:
    """The type of an option whose file lies below the folder that another flag names."""

    flag: str
    kind: Kind

    def __call__(self, text: str) -> str:
        return check_path(text)


# --- the check -------------------------------------------------------------------------------------------------


def same_place(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file or folder, through links of either kind, `..`, or a file system that takes
    small and capital letters for the same; the file need not exist.
    """
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    first, second = (os.path.realpath(path) for path in (one, other))
    if first == second:
        return True
    if os.path.lexists(first) or os.path.lexists(second) or first.casefold() != second.casefold():
        return False
    return _ignores_case(Path(first).parent)


def _ignores_case(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    for part in (folder, *folder.parents):
        if (swapped := part.name.swapcase()) != part.name:
            with contextlib.suppress(OSError):
                return os.path.samefile(part, part.with_name(swapped))
            return False
    return False


def output_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of a parser that write."""
    return (action for action in parser._actions if isinstance(action.type, Kind | OutputFolder | Below))


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _inputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(option, path) of everything else that the command line names and that exists."""
    for action in parser._actions:
        if isinstance(action.type, Kind | Below):
            continue
        value = getattr(args, action.dest, None)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str | os.PathLike) and os.fspath(item):
                text = os.fspath(item)
                for path in {text, text.partition("=")[2], *text.split(",")} - {""}:  # NAME=PATH, lists
                    with contextlib.suppress(ValueError):  # a NUL character
                        if os.path.exists(path):
                            yield _name(action), path


def _outputs(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> Iterator[tuple[str, Path, Kind | None, argparse.Action]]:
    """(option, path, kind or None for a folder, action) of all that the command writes."""
    for action in output_actions(parser):
        value, option = getattr(args, action.dest, None), _name(action)
        if value is None:
            continue
        if isinstance(action.type, Below):
            yield option, Path(getattr(args, action.type.flag)) / value, action.type.kind, action
        elif isinstance(action.type, OutputFolder):
            action.type.check(value, option)
            for path, kind in action.type.found(value, args):
                yield option, path, kind, action
        elif isinstance(action.type, Kind):
            yield option, Path(value), action.type, action
            if os.fspath(value) not in STREAMS:
                for path, other in action.type.beside(Path(value)).items():
                    yield option, path, other, action


def check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises `UserError` if an option of `parser` would write over an input, over what another option writes, or over a
    file of another kind.
    """
    outputs = list(_outputs(parser, args))
    inputs = list(_inputs(parser, args)) if outputs else []
    for i, (option, path, kind, action) in enumerate(outputs):
        if os.fspath(path) not in STREAMS:
            for name, source in inputs:
                if name != option and same_place(path, source):
                    raise UserError(
                        f"{option}: {path} is what {name} names, and would be overwritten; give another path"
                    )
            for name, target, _, other in outputs[:i]:
                if other is not action and same_place(path, target):
                    raise UserError(f"{option} and {name} would both write {path}; give another path to one of them")
        if kind is not None:
            kind.check(path, option)
