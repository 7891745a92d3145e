#!/usr/bin/env python
"""VQAv2 answers as the EvalAI server takes them: every question of test2015, answers normalized.

    python scripts/convert_vqav2_for_submission.py --split llava_vqav2_mscoco_test-dev2015 --ckpt llava-v1.5-7b

reads DIR/answers/SPLIT/CKPT/merge.jsonl and writes DIR/answers_upload/SPLIT/CKPT.json.
"""

from collections.abc import Sequence
from pathlib import Path

from llava.eval.arguments import Parser
from llava.eval.convert import join, load_questions, load_whole_answers, vqav2_upload, write_upload
from llava.utils import UserError, cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="VQAv2 answers as the EvalAI server takes them.")
    parser.add_argument("--dir", default="./playground/data/eval/vqav2", help="folder of the benchmark")
    parser.add_argument("--ckpt", help="name of the run below answers/SPLIT")
    parser.add_argument("--split", help="name of the answered question file, without .jsonl")
    parser.add_argument("--question-file", help="whole test split; default: DIR/llava_vqav2_mscoco_test2015.jsonl")
    parser.add_argument("--result-file", help="answers; default: DIR/answers/SPLIT/CKPT/merge.jsonl")
    parser.add_argument("--result-upload-file", help="written; default: DIR/answers_upload/SPLIT/CKPT.json")
    args = parser.parse_args(argv)
    if not (args.ckpt and args.split) and not (args.result_file and args.result_upload_file):
        raise UserError("give --split and --ckpt, or --result-file and --result-upload-file")
    folder = Path(args.dir)
    source = args.result_file or folder / "answers" / args.split / args.ckpt / "merge.jsonl"
    target = args.result_upload_file or folder / "answers_upload" / args.split / f"{args.ckpt}.json"

    questions = load_questions(args.question_file or str(folder / "llava_vqav2_mscoco_test2015.jsonl"))
    answers, bad = load_whole_answers(str(source))
    texts, coverage = join(questions, answers, str(source))
    print(f"total results: {len(texts)}, total split: {len(questions)}, error_line: {bad}")
    # Runs answer test-dev, a quarter of the whole split: questions without an answer are the rule.
    coverage.report(missing=None)
    write_upload(target, vqav2_upload(questions, texts))


if __name__ == "__main__":
    main()
