"""MMBench's files: the tsv with questions, and the workbook that its server takes (it needs the package openpyxl)."""

from __future__ import annotations

import csv
import itertools
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava.eval.jsonio import require_file
from llava.utils import UserError

OPTIONS = ("A", "B", "C", "D")
ROTATION = 1_000_000  # rows with the same index modulo this are one question with its options rotated
# Columns of the tsv that an upload does not carry.
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_PLACE = 6  # behind index, question, A, B, C, D

_END = "\0end of file\0"
# XML 1.0, and with it a workbook, has no way to hold these.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_MAX_CELL = 32767  # characters


# What pandas reads as a missing value if nobody tells it otherwise (documented under `na_values` of `read_csv`).
_MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"]
    + ["N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
)


def is_empty(value: str | None) -> bool:
    """Whether LLaVA's published tool takes a cell for empty: it reads the table with pandas, which knows many words for
    a missing value, and then leaves out nan and none in any spelling.
    """
    return value is None or value in _MISSING or value.lower() in ("nan", "none")


def row_options(row: Mapping[str, str]) -> dict[str, str]:
    """Letter -> text of the options a row has: those before the first empty one."""
    return dict(itertools.takewhile(lambda item: not is_empty(item[1]), ((c, row.get(c)) for c in OPTIONS)))


def read_table(
    path: str | os.PathLike[str], required: Sequence[str] = (), drop: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (number of the line where the row ends, row as column -> text) of an MMBench tsv.

    Cells may be quoted and then hold tabs and line breaks; CRLF and a byte order mark are accepted, blank
    lines skipped. `required` columns must exist, `drop` columns are left out of the rows (the images make
    most of the file). `UserError` names file and line.
    """
    path = require_file(path, "annotation file")
    csv.field_size_limit(1 << 30)  # images are cells
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # A quotation mark that is never closed would swallow the rest of the file, and this line with it.
            reader = csv.reader(itertools.chain(file, [_END]), delimiter="\t")
            yield from _rows(reader, path, required, drop)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    except csv.Error as error:
        raise UserError(f"{path}: malformed table ({error})") from None


def _rows(reader: Any, path: Path, required: Sequence[str], drop: Sequence[str]) -> Iterator[tuple[int, dict]]:
    header: list[str] | None = None
    short = ""  # the latest row, if it has too few cells
    for cells in reader:
        if cells == [_END]:
            if short and not _ends_with_line_break(path):
                raise UserError(f"{short}: the last line is cut off")
            break
        where = f"{path}:{reader.line_num}"
        if any(cell.endswith(_END) for cell in cells):
            raise UserError(f"{path}: a quotation mark is opened and not closed before the end of the file")
        if not any(cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            for column in required:
                if column not in header:
                    raise UserError(f"{path}: column {column!r} is missing; it has: {', '.join(header)[:200]}")
            continue
        if len(cells) > len(header):
            raise UserError(f"{where}: {len(cells)} cells in a table of {len(header)} columns")
        # Empty cells at the end of a row may be left out, but not in a row that stops in mid-line.
        short = where if len(cells) < len(header) else ""
        cells += [""] * (len(header) - len(cells))
        yield reader.line_num, {name: cell for name, cell in zip(header, cells, strict=True) if name not in drop}
    if header is None:
        raise UserError(f"{path}: empty; needs an MMBench table with a header line")


def _ends_with_line_break(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) in b"\r\n"


def row_index(value: Any, where: str) -> int:
    """The `index` of a row as a number; spreadsheets may have made a float of it."""
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value) if isinstance(value, float) else int(str(value).strip().removesuffix(".0"))
        if number == int(number) and number >= 0:
            return int(number)
    raise UserError(f"{where}: index {str(value)[:40]!r} is not a whole number")


def _openpyxl() -> Any:
    try:
        import openpyxl
    except ImportError:
        raise UserError("MMBench workbooks (.xlsx) need the package openpyxl: pip install openpyxl") from None
    return openpyxl


def read_workbook(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of the first sheet as column -> value (None for an empty cell); the first row names the columns."""
    path = require_file(path, "result workbook")
    openpyxl = _openpyxl()
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zipfile, XML and openpyxl each have their own
        raise UserError(f"{path}: not an Excel workbook ({' '.join(str(error).split())})") from None
    try:
        lines = iter(book.worksheets[0].iter_rows(values_only=True))
        header = [None if cell is None else str(cell).strip() for cell in next(lines, ())]
        # A workbook need not say how wide it is; rows then end with their last cell that is not empty.
        return [
            {name: cell for name, cell in itertools.zip_longest(header, cells[: len(header)]) if name}
            for cells in lines
            if any(cell is not None for cell in cells)
        ]
    finally:
        book.close()


def write_workbook(path: str | os.PathLike[str], header: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    """Writes one sheet, whole or not at all; returns how many cells had to be changed.

    Cells that start with `=` stay text. Control characters, which a workbook cannot hold, are dropped, and
    cells are cut at 32767 characters.
    """
    openpyxl = _openpyxl()
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    changed = 0
    for number, values in enumerate([header, *rows], start=1):
        for column, value in enumerate(values, start=1):
            if value is None or value == "":
                continue
            cell = sheet.cell(row=number, column=column)
            if isinstance(value, str):
                text = _CONTROL_CHARACTERS.sub("", value)[:_MAX_CELL]
                changed += text != value
                cell.value = text
                cell.data_type = "s"  # not a formula
            else:
                cell.value = value
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        book.save(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    return changed


def is_workbook(path: str | os.PathLike[str]) -> bool:
    """True for an Excel workbook, whatever its name: it is a zip archive."""
    return zipfile.is_zipfile(require_file(path, "result file"))
