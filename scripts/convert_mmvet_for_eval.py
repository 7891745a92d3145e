#!/usr/bin/env python
"""MM-Vet answers as its evaluator takes them: {"v1_<question id>": text}.

python scripts/convert_mmvet_for_eval.py --src answers.jsonl --dst results/llava-v1.5-7b.json
"""

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import JsonObject
from llava.eval.tasks.join import load_answers
from llava.eval.tasks.mmvet import mmvet_answers
from llava.eval.tasks.upload import join, write_upload
from llava.utils import UserError, cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="MM-Vet answers as its evaluator takes them.")
    parser.add_argument("--src", required=True, help="answer file (.jsonl)")
    parser.add_argument(
        "--dst", type=JsonObject("answers for MM-Vet", values=str), required=True, help="written (.json)"
    )
    args = parser.parse_args(argv)
    answers = load_answers(args.src)
    if not answers:
        raise UserError(f"{args.src}: holds no answer")
    texts, coverage = join(answers, answers, args.src)
    coverage.report()
    write_upload(args.dst, mmvet_answers(texts), indent=2)


if __name__ == "__main__":
    main()
