"""MMBench's tsv and workbooks: quoting, empty cells, damage; workbooks survive what spreadsheets do to text."""

import os
import zipfile

import openpyxl
import pytest

from llava.eval.tasks import mmbench as mmbench_task
from llava.eval.tasks import mmbench_data
from llava.utils import UserError

HEADER = "index\tquestion\thint\tA\tB\tC\tD\tanswer\n"


def table(tmp_path, text, name="t.tsv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(path, **kwargs):
    return [row for _, row in mmbench_data.read_table(path, **kwargs)]


def test_line_breaks_tabs_and_quotation_marks_in_cells(tmp_path):
    path = table(tmp_path, HEADER + '7\t"two\nlines\t""and"" a tab"\t\tx\ty\t\t\tA\n8\t5" wide?\t\tx\ty\t\t\tB\n')
    first, second = mmbench_data.read_table(path)
    assert (first[0], second[0]) == (3, 4)
    assert first[1]["question"] == 'two\nlines\t"and" a tab' and second[1]["question"] == '5" wide?'
    assert first[1]["C"] == "" and list(first[1]) == HEADER.split()


def test_byte_order_mark_crlf_blank_lines_and_missing_cells_at_the_end(tmp_path):
    text = "\ufeff" + HEADER.replace("\n", "\r\n") + "1\tq\th\tx\ty\r\n\r\n2\tq\th\tx\ty\tz\tw\tD\r\n"
    first, second = rows(table(tmp_path, text))
    assert first["index"] == "1" and first["answer"] == "" and second["answer"] == "D"


def test_dropped_columns_and_large_cells(tmp_path):
    path = table(tmp_path, "index\timage\tA\n1\t" + "x" * 200_000 + "\ty\n")
    assert rows(path, drop=("image",)) == [{"index": "1", "A": "y"}]
    assert len(rows(path)[0]["image"]) == 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("index\tA\n1\tx\ty\n", "t.tsv:2: 3 cells in a table of 2 columns"),
        ('index\tA\n1\t"x\n2\ty\n', "not closed"),
        ("index\tA\tB\n1\tx\ty\n2\tx", "t.tsv:3: the last line is cut off"),
        ("index\tB\n1\tx\n", "column 'A' is missing"),
        ("index\tA\n1\tx\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_damaged_tables_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        rows(table(tmp_path, text), required=("index", "A"))


@pytest.mark.parametrize(
    ("cells", "letters"),
    [
        (("x", "y", "z", "w"), "ABCD"),
        (("x", "y", "", ""), "AB"),
        (("x", "nan", "z", ""), "A"),  # upstream stops at the first empty cell
        (("0", "1", "NaN", "None"), "AB"),
    ],
)
def test_options_of_a_row(cells, letters):
    row = dict(zip("ABCD", cells, strict=True))
    assert mmbench_data.row_options(row) == {letter: row[letter] for letter in letters}


def test_index_forms():
    assert [mmbench_data.row_index(v, "") for v in ("5", 5, 5.0, "5.0", " 5 ")] == [5] * 5
    for value in ("v1_5", "", None, "5.5", 5.5, float("nan"), float("inf"), -1):
        with pytest.raises(UserError, match="here: index"):
            mmbench_data.row_index(value, "here")


def test_workbook_keeps_text_as_it_is(tmp_path):
    pytest.importorskip("openpyxl")
    cells = ["=1+1", "two\nlines", "", None, "vertical\x0btab", 7, "x" * 40000, "+1", "café 红"]
    path = tmp_path / "deep" / "w.xlsx"
    assert mmbench_data.write_workbook(path, list("abcdefghi"), [cells]) == 2
    expected = ["=1+1", "two\nlines", None, None, "verticaltab", 7, "x" * 32767, "+1", "café 红"]
    assert mmbench_data.read_workbook(path) == [dict(zip("abcdefghi", expected, strict=True))]
    assert mmbench_data.is_workbook(path) and [p.name for p in path.parent.iterdir()] == ["w.xlsx"]


def test_rows_of_a_workbook_without_a_size_may_be_short(tmp_path):
    """A workbook written row by row does not say how wide it is: rows end with their last full cell."""
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    for cells in (["index", "A", "prediction", None, "answer"], [1, "x", "B", None, None, 9, 9], [2, "y"]):
        sheet.append(cells)
    book.save(tmp_path / "w.xlsx")
    assert mmbench_data.read_workbook(tmp_path / "w.xlsx") == [
        {"index": 1, "A": "x", "prediction": "B", "answer": None},
        {"index": 2, "A": "y", "prediction": None, "answer": None},
    ]


def test_bad_workbooks(tmp_path, monkeypatch):
    pytest.importorskip("openpyxl")
    with pytest.raises(UserError, match="not an Excel workbook"):
        mmbench_data.read_workbook(table(tmp_path, "no", "w.xlsx"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        mmbench_data.write_workbook(tmp_path / "file" / "w.xlsx", ["a"], [])


def test_without_openpyxl_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(UserError, match="pip install openpyxl"):
        mmbench_data.write_workbook(tmp_path / "w.xlsx", ["a"], [])


# What pandas takes for missing, from its documentation (`read_csv`, `na_values`), and what it does not.
MISSING = (
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"]
    + ["NULL", "NaN", "None", "n/a", "nan", "null"]
    + ["NONE", "none", "NAN", "Nan"]  # the published tool's own
)
PRESENT = ["0", "-", "no", "Null", "Na", "N/a", " ", " nan", "None.", "missing", "unknown", "nil"]


@pytest.mark.parametrize(("cells", "empty"), [(MISSING, True), (PRESENT, False)])
def test_missing_cells_are_those_of_the_published_tool(cells, empty):
    assert [cell for cell in cells if mmbench_data.is_empty(cell) is not empty] == []


def test_rows_that_lose_their_right_option_are_named(tmp_path, capsys):
    from llava.eval.tasks.mmbench_rows import read_rows

    header = "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n"
    path = table(
        tmp_path,
        header
        + "0\tHow many?\tnan\tNone\tTwo\tOne\tThree\tA\tx\n"
        + "1\tHow many?\tN/A\tTwo\tNone\tOne\tThree\tC\tx\n"
        + "2\tWhat is the code?\tread it\tX1\tB7\tNA\tA1\tB\tx\n"
        + "3\tPlain?\tnull\t1\t2\t3\t\tC\tx\n",
    )
    warnings = []
    read, _ = read_rows(str(path), warn=warnings.append)
    assert [row[0].text for row in read] == [
        "How many?",
        "How many?\nA. Two",
        "read it\nWhat is the code?\nA. X1\nB. B7",
        "Plain?\nA. 1\nB. 2\nC. 3",
    ]
    assert len(warnings) == 2
    for text, line, index, right, cell in zip(warnings, (2, 3), (0, 1), "AC", "AB", strict=True):
        assert f"t.tsv:{line}: the right option {right} of row {index}" in text and f"before {cell}, 'None'" in text
    # The scorer takes the table: what is right is what the row says, asked or not.
    rows_found = mmbench_task.load_rows(str(path))
    answers = [{"question_id": i, "text": text} for i, text in enumerate("AACC")]
    assert mmbench_task.evaluate_mmbench(rows_found, answers)["per_row"] == 50.0


def edited_workbook(path, edit, member="xl/worksheets/sheet1.xml"):
    """A workbook of two rows with one of its XML files changed."""
    mmbench_data.write_workbook(path, ["index", "prediction"], [[1, "A"], [2, "B"]])
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    files[member] = edit(files[member])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in files.items():
            new.writestr(name, content)
    return path


ENTITIES = b'<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><worksheet'


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda xml: xml + b" " * (200 << 20), "more than 128 MiB unpacked"),
        (lambda xml: xml.replace(b"<worksheet", ENTITIES, 1), "declares XML entities"),
        (lambda xml: xml.replace(b"<v>1</v>", b"<v>" + b"9" * 6000 + b"</v>"), "not an Excel workbook"),
        (lambda xml: xml.replace(b'<row r="3"', b'<row r="900000000"').replace(b"A3", b"A900000000"), "100000 rows"),
        (lambda xml: b"", "not an Excel workbook"),
    ],
)  # fmt: skip
def test_workbooks_that_unpack_to_more_than_they_are(tmp_path, edit, message):
    path = edited_workbook(tmp_path / "x.xlsx", edit)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=message):
        mmbench_data.read_workbook(path)


def test_the_size_that_a_sheet_declares_is_not_believed(tmp_path):
    path = edited_workbook(tmp_path / "x.xlsx", lambda xml: xml.replace(b"A1:B3", b"A1:XFD1048576"))
    assert b"XFD1048576" in zipfile.ZipFile(path).read("xl/worksheets/sheet1.xml")
    assert mmbench_data.read_workbook(path) == [{"index": 1, "prediction": "A"}, {"index": 2, "prediction": "B"}]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o002, 0o027, 0o077])
def test_workbooks_have_the_permissions_of_the_umask(tmp_path, mask):
    previous = os.umask(mask)
    try:
        mmbench_data.write_workbook(tmp_path / "x.xlsx", ["index"], [[1]])
    finally:
        os.umask(previous)
    assert os.stat(tmp_path / "x.xlsx").st_mode & 0o777 == 0o666 & ~mask


def test_half_a_surrogate_pair_is_left_out_of_a_workbook(tmp_path):
    assert mmbench_data.write_workbook(tmp_path / "x.xlsx", ["index", "text"], [[1, "a\ud800b"]]) == 1
    assert mmbench_data.read_workbook(tmp_path / "x.xlsx") == [{"index": 1, "text": "ab"}]
