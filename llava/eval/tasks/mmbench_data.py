"""MMBench's files: the tsv with questions, and the workbook that its server takes (it needs the package openpyxl)."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import require_file, write_lines_atomic
from llava.utils import UserError

OPTIONS = ("A", "B", "C", "D")
ROTATION = 1_000_000  # rows with the same index modulo this are one question with its options rotated
# Columns of the tsv that an upload does not carry.
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_PLACE = 6  # behind index, question, A, B, C, D

_END = "\0end of file\0"
# XML 1.0, and with it a workbook, has no way to hold these.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_MAX_CELL = 32767  # characters
_MAX_UNPACKED = 128 << 20  # bytes of a workbook; the largest upload has a few MiB
_CHUNK = 1 << 16
_MAX_ROWS, _MAX_COLUMNS = 100_000, 200


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
    return dict(itertools.takewhile(lambda item: not is_empty(item[1]), ((c, row.get(c, "")) for c in OPTIONS)))


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
    except UnicodeDecodeError:
        raise UserError(f"{path}:{_first_bad_line(path)}: not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: malformed table ({error})") from None


def _first_bad_line(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


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
                    names = " ".join(", ".join(header)[:200].split())
                    raise UserError(f"{path}: column {column!r} is missing; it has: {names}")
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
    _refuse_bombs(path)
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            return _sheet_rows(book.worksheets[0], path)
        finally:
            book.close()
    except UserError:
        raise
    except Exception as error:  # zipfile, XML and openpyxl each have their own, also for cells that come late
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not an Excel workbook ({reason})") from None


def _refuse_bombs(path: Path) -> None:
    """A workbook is a zip of XML files: a few kilobytes can unpack to gigabytes, in files or in XML entities."""
    try:
        with zipfile.ZipFile(path) as archive:
            total = 0
            for member in archive.infolist():
                # What the directory says of sizes may be a lie: count what comes out.
                with archive.open(member) as file:
                    start = file.read(_CHUNK)
                    if b"<!DOCTYPE" in start.replace(b"\0", b""):  # also as UTF-16
                        raise UserError(f"{path}: not an Excel workbook ({member.filename} declares XML entities)")
                    size = len(start)
                    while piece := file.read(_CHUNK):
                        size += len(piece)
                        if total + size > _MAX_UNPACKED:
                            mib = _MAX_UNPACKED >> 20
                            raise UserError(f"{path}: more than {mib} MiB unpacked; no upload is so large")
                    total += size
    except UserError:
        raise
    except Exception as error:  # damaged archives: BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not an Excel workbook ({reason})") from None


def _sheet_rows(sheet: Any, path: Path) -> list[dict[str, Any]]:
    # The size that a sheet declares costs nothing to write and a cell of memory each to believe.
    sheet.reset_dimensions()
    lines = sheet.iter_rows(values_only=True, max_col=_MAX_COLUMNS)
    header = [None if cell is None else str(cell).strip() for cell in next(lines, ())]
    rows = []
    for number, cells in enumerate(lines, start=2):
        if number > _MAX_ROWS:  # a row may be numbered anything, and the ones before it are made up
            raise UserError(f"{path}: more than {_MAX_ROWS} rows; MMBench has fewer")
        if any(cell is not None for cell in cells):
            # Rows end with their last cell that is not empty.
            rows.append({name: cell for name, cell in itertools.zip_longest(header, cells[: len(header)]) if name})
    return rows


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
    # Made in memory, so that the file is written as all others are: whole, with the permissions of the umask.
    stream = io.BytesIO()
    book.save(stream)
    write_lines_atomic(path, [stream.getvalue()])
    return changed


def is_workbook(path: str | os.PathLike[str]) -> bool:
    """True for an Excel workbook, whatever its name: it is a zip archive."""
    return zipfile.is_zipfile(require_file(path, "result file"))
