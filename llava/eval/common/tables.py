"""Tables as Markdown and CSV, and their place in a document."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_text, write_text_atomic
from llava.utils import UserError


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> str:
    """A pipe table. The first `labels` columns are aligned to the left, the others, which hold numbers, to the right.

    Rows may be shorter than the header; the cells that they lack are empty.
    """
    columns = ["---"] * labels + ["---:"] * (len(header) - labels)
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |" + " |" * (len(header) - len(row)))
    return "\n".join(lines)


def csv_table(header: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> str:
    """CSV with Unix line ends. Rows are sequences in the header's order or mappings from its names; None is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([row.get(name) for name in header] if isinstance(row, Mapping) else row)
    return stream.getvalue()


def replace_between(document: str, name: str, text: str, where: str) -> str:
    """`document` with what is between the markers of `name` replaced; raises `UserError` if they are not there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise UserError(f"{where}: needs the lines {begin} and {end} once each, in this order")
    head, rest = document.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def print_or_insert(text: str, document: str | None, name: str) -> None:
    """Prints `text`, or replaces with it what is between the markers of `name` in a document on disk."""
    if document is None:
        print(text)
    else:
        wrapped = replace_between(read_text(document, "document"), name, wrap(text), document)
        write_text_atomic(Path(document), wrapped)


def wrap(text: str, width: int = 120) -> str:
    """Markdown with its prose in lines of at most `width` characters, as documents have it; tables stay as they are."""
    lines = []
    for line in text.split("\n"):
        if line and not line.startswith("|"):
            lines += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        else:
            lines.append(line)
    return "\n".join(lines)
