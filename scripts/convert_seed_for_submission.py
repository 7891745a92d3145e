#!/usr/bin/env python
"""SEED-Bench: accuracy by question type, and the answers as the leaderboard takes them (JSON lines).

python scripts/convert_seed_for_submission.py --annotation-file SEED-Bench.json \\
    --result-file answers.jsonl --result-upload-file upload.jsonl
"""

import json
from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import write_json, write_text_atomic
from llava.eval.common.outputs import SCORES, JsonLines
from llava.eval.tasks.join import load_answers
from llava.eval.tasks.seed import load_seed, seed_accuracy, seed_upload
from llava.eval.tasks.upload import join, require_all
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="SEED-Bench accuracy, and answers as the leaderboard takes them.")
    parser.add_argument("--annotation-file", required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl)")
    parser.add_argument(
        "--result-upload-file",
        type=JsonLines("an upload for SEED-Bench", ("question_id", "prediction")),
        help="written (.jsonl), if every question has its answer",
    )
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the accuracies as JSON (percent)")
    args = parser.parse_args(argv)
    questions, names = load_seed(args.annotation_file)
    texts, coverage = join(questions, load_answers(args.result_file, keep_torn=True), args.result_file)
    counts = seed_accuracy(questions, texts, names)
    accuracies = {name: right / count * 100 for name, (right, count) in counts.items()}
    for name, percent in accuracies.items():
        print(f"{name}{'' if name in names.values() else ' accuracy'}: {percent:.2f}%")
    coverage.report("questions have no answer and count as wrong")
    if args.json:
        flat = {"accuracy": accuracies.pop("Total"), **accuracies}
        write_json(args.json, {**flat, "expected": len(questions), "missing": len(coverage.missing)})
    if not args.result_upload_file:
        return
    require_all(coverage, args.result_upload_file)
    lines = (json.dumps(entry) + "\n" for entry in seed_upload(questions, texts))
    write_text_atomic(args.result_upload_file, "".join(lines))


if __name__ == "__main__":
    main()
