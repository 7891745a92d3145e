"""Planned trajectories on nuScenes: L2 and collisions, each in a named convention.

    python -m llava.eval.eval_planning --truth planning_truth.jsonl --result-file answers.jsonl --convention both

Figures of two conventions never stand in one table: they differ by a factor of 1.6 for equal predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.join import conclude
from llava.eval.tasks.planning import CONVENTIONS, flat_result, print_scores
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="L2 and collisions of planned trajectories.")
    parser.add_argument("--truth", required=True, help="truth of scripts/convert_nuscenes_planning.py (.jsonl)")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl)")
    parser.add_argument(
        "--convention", choices=("both", "all", *CONVENTIONS), default="both", help="both: UniAD's and ST-P3's"
    )
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON (metres, percent)")
    args = parser.parse_args(argv)
    wanted = {"both": CONVENTIONS[:2], "all": CONVENTIONS}.get(args.convention, (args.convention,))
    from llava.eval.tasks.planning_scores import score_files  # needs numpy and Pillow

    result = score_files(args.truth, args.result_file, wanted)
    print_scores(result)
    conclude(result["coverage"], flat_result(result), args.json)


if __name__ == "__main__":
    main()
