#!/usr/bin/env python
"""Answers as DriveLM's evaluation takes them: a list of `id`, `question`, `gt_answer`, `answer`.

    python scripts/convert_drivelm_for_submission.py --truth drivelm_truth.json --src answers.jsonl --dst output.json

The server's upload wraps this list with method, team, authors, e-mail, institution and country, which nobody but you
knows.
"""

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import JsonList
from llava.eval.tasks.drivelm import frames, load_truth
from llava.eval.tasks.join import load_answers
from llava.eval.tasks.upload import join, require_all, write_upload
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Answers as DriveLM's evaluation takes them.")
    parser.add_argument("--truth", required=True, help="scenes with tagged questions (.json)")
    parser.add_argument("--src", required=True, help="answer file (.jsonl)")
    kind = JsonList("answers for DriveLM", ("id", "question", "gt_answer", "answer"))
    parser.add_argument("--dst", type=kind, required=True, help="written (.json)")
    args = parser.parse_args(argv)
    asked = [question for frame in frames(load_truth(args.truth)) for question in frame]
    texts, coverage = join([{"question_id": q.id} for q in asked], load_answers(args.src), args.src)
    require_all(coverage, args.dst)
    coverage.report()
    entries = [{"id": q.id, "question": q.text, "gt_answer": q.answer, "answer": texts[q.id]} for q in asked]
    write_upload(args.dst, entries, indent=2)


if __name__ == "__main__":
    main()
