#!/usr/bin/env python
"""VizWiz answers as the EvalAI server takes them: image and normalized answer, in question order.

python scripts/convert_vizwiz_for_submission.py --annotation-file llava_test.jsonl \\
    --result-file answers.jsonl --result-upload-file upload.json
"""

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import JsonList
from llava.eval.tasks.upload import (
    join,
    load_questions,
    load_whole_answers,
    report_bad_lines,
    require_all,
    write_upload,
)
from llava.eval.tasks.vqa import vizwiz_upload
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="VizWiz answers as the EvalAI server takes them.")
    parser.add_argument("--annotation-file", required=True, help="question file (llava_test.jsonl)")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl)")
    parser.add_argument(
        "--result-upload-file",
        type=JsonList("an upload for VizWiz", ("image", "answer")),
        required=True,
        help="written (.json)",
    )
    args = parser.parse_args(argv)
    questions = load_questions(args.annotation_file, with_image=True)
    answers, bad = load_whole_answers(args.result_file)
    texts, coverage = join(questions, answers, args.result_file)
    print(f"total results: {len(texts)}, total split: {len(questions)}, error_line: {bad}")
    require_all(coverage, args.result_upload_file)
    coverage.report(missing=None)
    write_upload(args.result_upload_file, vizwiz_upload(questions, texts))
    return report_bad_lines(bad, args.result_file)


if __name__ == "__main__":
    main()
