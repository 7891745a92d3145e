"""VQA accuracy where VQAv2 or VizWiz answers are at hand (their test answers are not: the server grades those).

python -m llava.eval.eval_vqa --annotation-file v2_mscoco_val2014_annotations.json --result-file answers.jsonl
python -m llava.eval.eval_vqa --annotation-file test.json --question-file llava_test.jsonl --result-file a.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.join import conclude
from llava.eval.tasks.vqa import flat_result, load_annotations, print_scores, score_files, vqa_accuracy
from llava.utils import cli_main

__all__ = ["load_annotations", "main", "score_files", "vqa_accuracy"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="VQA accuracy of VQAv2 or VizWiz answers.")
    parser.add_argument("--annotation-file", required=True, help="VQAv2 or VizWiz annotations with answers (.json)")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl) or upload file (.json)")
    parser.add_argument("--question-file", help="VizWiz: llava_test.jsonl, which names the image of each question")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON (percent)")
    args = parser.parse_args(argv)
    result = score_files(args.annotation_file, args.result_file, args.question_file)
    print_scores(result)
    conclude(result["coverage"], flat_result(result), args.json)


if __name__ == "__main__":
    main()
