#!/usr/bin/env python
"""VQAv2 answers as the EvalAI server takes them: every question of test2015, answers normalized.

    python scripts/convert_vqav2_for_submission.py --split llava_vqav2_mscoco_test-dev2015 --ckpt llava-v1.5-7b
    python scripts/convert_vqav2_for_submission.py --dir vqav2 --src answers/run/merge.jsonl --dst upload.json

The first, LLaVA's way, reads DIR/answers/SPLIT/CKPT/merge.jsonl and writes DIR/answers_upload/SPLIT/CKPT.json; the
second, AutoPrune's, names both below DIR. Exit status 3: written, but with empty answers for lines that are no answers
or for questions of the split that have none.
"""

from collections.abc import Sequence
from pathlib import Path

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import Below, JsonList
from llava.eval.tasks.join import shorten, warn
from llava.eval.tasks.upload import join, load_questions, load_whole_answers, report_bad_lines, write_upload
from llava.eval.tasks.vqa import vqav2_upload
from llava.utils import INCOMPLETE_STATUS, UserError, cli_main

UPLOAD = JsonList("an upload for VQAv2", ("question_id", "answer"))


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="VQAv2 answers as the EvalAI server takes them.")
    parser.add_argument("--dir", default="./playground/data/eval/vqav2", help="folder of the benchmark")
    parser.add_argument("--ckpt", help="name of the run below answers/SPLIT")
    parser.add_argument("--split", help="name of the answered question file, without .jsonl")
    parser.add_argument("--question-file", help="whole test split; default: DIR/llava_vqav2_mscoco_test2015.jsonl")
    parser.add_argument("--src", help="answers, below DIR")
    parser.add_argument("--dst", type=Below("dir", UPLOAD), help="written, below DIR")
    parser.add_argument("--result-file", help="answers; default: DIR/answers/SPLIT/CKPT/merge.jsonl")
    parser.add_argument(
        "--result-upload-file", type=UPLOAD, help="written; default: DIR/answers_upload/SPLIT/CKPT.json"
    )
    args = parser.parse_args(argv)
    if (args.src and args.result_file) or (args.dst and args.result_upload_file):
        raise UserError("give --src or --result-file, and --dst or --result-upload-file, not both")
    folder = Path(args.dir)
    source = folder / args.src if args.src else args.result_file
    target = folder / args.dst if args.dst else args.result_upload_file
    if not (args.ckpt and args.split) and not (source and target):
        raise UserError("give --split and --ckpt, --src and --dst, or --result-file and --result-upload-file")
    source = source or folder / "answers" / args.split / args.ckpt / "merge.jsonl"
    target = target or folder / "answers_upload" / args.split / f"{args.ckpt}.json"

    asked_file = args.question_file or str(folder / "llava_vqav2_mscoco_test2015.jsonl")
    UPLOAD.check(target, "--dst" if args.dst else "", reading=(source, asked_file))
    questions = load_questions(asked_file)
    answers, bad = load_whole_answers(str(source))
    texts, coverage = join(questions, answers, str(source))
    print(f"total results: {len(texts)}, total split: {len(questions)}, error_line: {bad}")
    # Runs answer test-dev, a quarter of the whole split: questions without an answer are the rule.
    coverage.report(missing=None)
    lacking = []
    asked = folder / f"{args.split}.jsonl" if args.split else None
    if asked and asked.is_file():
        lacking = [str(q["question_id"]) for q in load_questions(str(asked)) if str(q["question_id"]) not in texts]
    if lacking:
        warn(f"{len(lacking)} questions of {asked} have no answer and get an empty one: {shorten(lacking)}")
    write_upload(target, vqav2_upload(questions, texts))
    return report_bad_lines(bad, source) or (INCOMPLETE_STATUS if lacking else 0)


if __name__ == "__main__":
    main()
