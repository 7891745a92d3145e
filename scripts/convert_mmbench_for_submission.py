#!/usr/bin/env python
"""MMBench answers as the server takes them: an Excel workbook (needs the package openpyxl).

    python scripts/convert_mmbench_for_submission.py --annotation-file mmbench_dev_20230712.tsv \\
        --result-dir answers/mmbench_dev_20230712 --upload-dir answers_upload/mmbench_dev_20230712 \\
        --experiment llava-v1.5-7b

reads RESULT_DIR/EXPERIMENT.jsonl and writes UPLOAD_DIR/EXPERIMENT.xlsx.
"""

from collections.abc import Sequence
from pathlib import Path

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import WORKBOOK, OutputFolder
from llava.eval.tasks.join import warn
from llava.eval.tasks.mmbench import first_round_texts, mmbench_sheet
from llava.eval.tasks.mmbench_data import NOT_UPLOADED, read_table, row_index, write_workbook
from llava.eval.tasks.upload import join, load_whole_answers, report_bad_lines
from llava.utils import UserError, cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="MMBench answers as the server takes them.")
    parser.add_argument("--annotation-file", required=True, help="the tsv that was answered")
    parser.add_argument("--result-dir", required=True, help="folder with EXPERIMENT.jsonl")
    parser.add_argument(
        "--upload-dir",
        type=OutputFolder({"{experiment}.xlsx": WORKBOOK}),
        required=True,
        help="folder for EXPERIMENT.xlsx",
    )
    parser.add_argument("--experiment", required=True, help="name of the run")
    args = parser.parse_args(argv)
    source = Path(args.result_dir) / f"{args.experiment}.jsonl"
    rows = [row for _, row in read_table(args.annotation_file, ("index", "question"), NOT_UPLOADED)]
    if not rows:
        raise UserError(f"{args.annotation_file}: holds no question")
    questions = [{"question_id": row_index(row["index"], args.annotation_file)} for row in rows]
    answers, bad = load_whole_answers(str(source))
    texts, coverage = join(questions, first_round_texts(answers), str(source))
    coverage.report("rows have no answer; their cells stay empty")
    header, table = mmbench_sheet(rows, {int(key): text for key, text in texts.items()})
    changed = write_workbook(Path(args.upload_dir) / f"{args.experiment}.xlsx", header, table)
    if changed:
        warn(f"{changed} cells held what a workbook cannot hold (control characters, more than 32767 characters)")
    return report_bad_lines(bad, source)


if __name__ == "__main__":
    main()
