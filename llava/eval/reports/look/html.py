"""The page: its own style and script, and the data of the runs as JSON between tags that cannot be closed from inside.

The policy in its head lets nothing be loaded and no other script run, whatever an answer says.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import write_text_atomic
from llava.eval.common.outputs import Text
from llava.eval.reports.look.joined import Entry, Joined, page_data
from llava.eval.tasks.join import warn

REPORT = Text("a report of this tool", r"<!doctype html>\s*<!-- A report of llava\.eval\.report -->")
_LARGE = 20_000_000  # bytes of a file that still opens fast
_SCRIPTS = ("data.js", "charts.js", "picture.js", "list.js", "main.js")


def render(data: Mapping[str, Any]) -> str:
    """The whole file. data: what `joined.page_data` gives."""
    style, script = _read("style.css"), "\n".join(map(_read, _SCRIPTS))
    parts = {
        "title": html.escape(data["title"]),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": script_safe(data),
    }
    page = _read("page.html")
    pieces = [page]
    for name, text in parts.items():  # what is filled in is not searched again
        pieces = [part for piece in pieces for part in _filled(piece, name, text)]
    return "".join(pieces)


class _Done(str):
    """Text that was filled in."""


def _filled(piece: str, name: str, text: str) -> list[str]:
    if isinstance(piece, _Done):
        return [piece]
    first, *rest = piece.split(f"{{{name}}}")
    return [first, *(part for own in rest for part in (_Done(text), own))]


def script_safe(data: Any) -> str:
    """JSON that is the same inside a script element: no `<` in it, nothing but ASCII."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read(name: str) -> str:
    return files("llava.eval.reports.look").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_report(
    path: str | Path, joined: Joined, entries: Sequence[Entry], title: str, preset: Mapping[str, Any] | None = None
) -> None:
    """Writes the report of some questions and says where it is. preset: filters that are set when it opens."""
    data = page_data(joined, entries, title, preset or {})
    text = render(data)
    write_text_atomic(path, text)
    for problem in data["problems"]:
        warn(problem)
    if len(text) > _LARGE:
        warn(f"{path} has {len(text) / 1e6:.0f} MB; --limit makes it smaller")
    print(f"wrote {path}: {len(entries)} questions, {len(joined.runs)} runs, {len(text) / 1e6:.1f} MB")
