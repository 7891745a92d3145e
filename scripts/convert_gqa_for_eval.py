#!/usr/bin/env python
"""GQA answers as its evaluator takes them: [{"questionId", "prediction"}].

python scripts/convert_gqa_for_eval.py --src answers.jsonl --dst testdev_balanced_predictions.json
"""

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import JsonList
from llava.eval.tasks.gqa import gqa_predictions
from llava.eval.tasks.join import load_answers, shorten, warn
from llava.eval.tasks.upload import join, write_upload
from llava.utils import UserError, cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="GQA answers as its evaluator takes them.")
    parser.add_argument("--src", required=True, help="answer file (.jsonl)")
    kind = JsonList("predictions for GQA", ("questionId", "prediction"))
    parser.add_argument("--dst", type=kind, required=True, help="written (.json)")
    args = parser.parse_args(argv)
    answers = load_answers(args.src)
    if not answers:
        raise UserError(f"{args.src}: holds no answer")
    _, coverage = join(answers, answers, args.src)
    if coverage.duplicate:
        # Upstream writes them all, and so do we; which of them counts is the evaluator's business.
        warn(f"{len(coverage.duplicate)} answers repeat a question; all are written: {shorten(coverage.duplicate)}")
    write_upload(args.dst, gqa_predictions(answers))


if __name__ == "__main__":
    main()
