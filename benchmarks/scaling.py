"""Prefill time and memory over the number of visual tokens, at one ninth of them (64 of 576), with fitted exponents.

python -m benchmarks.scaling --geometry cpu-1024x24 --visual-tokens 144,576,1152,2304,2880,5760 --save
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.candidates import build_method, needs_no_tower
from benchmarks.flags import Job, add_round_arguments, add_running_arguments, method_names, numbers, prepare
from benchmarks.geometry import GEOMETRIES, geometry, random_prompt
from benchmarks.prefill import measure, peak_flops
from benchmarks.saved import deliver
from llava.eval.common.arguments import Parser
from llava.utils import cli_main

COLUMNS = ("method", "budget", "visual", "processed", "ms", "p10", "p90", "of_dense", "flops_of_dense", "floor_ms",
           "over_floor", "peak_mib", "kv_mib")  # fmt: skip
SHARE = 9


def exponents(rows: Sequence[Mapping[str, Any]], quantity: str) -> dict[str, float]:
    """Method -> slope of log(quantity) over log(visual tokens), least squares; methods with fewer than two points and
    quantities that were not measured are left out.
    """
    found = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        points = [(float(r["visual"]), float(r[quantity])) for r in rows if r["method"] == name and r.get(quantity)]
        if len({x for x, _ in points}) > 1:
            x, y = np.log(np.array(points)).T
            found[name] = float(np.polyfit(x, y, 1)[0])
    return found


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Prefill time and memory over the number of visual tokens.")
    parser.add_argument("--geometry", default="cpu-1024x24", help=f"sizes of the decoder: {', '.join(GEOMETRIES)}")
    parser.add_argument("--methods", default="autoprune", help="pruning methods by commas; dense is always measured")
    parser.add_argument("--visual-tokens", default="144,576,1152,2304,2880,5760", help="by commas")
    add_round_arguments(parser, 5, 2)
    add_running_arguments(parser)
    args = parser.parse_args(argv)
    device, dtype = prepare(args)
    counts = numbers(args.visual_tokens, "--visual-tokens")
    budgets = {visual: max(visual // SHARE, 1) for visual in counts}
    names = method_names(args.methods)
    settings = {v: {(name, b): needs_no_tower(build_method(name, b)) for name in names} for v, b in budgets.items()}
    job = Job(device, dtype, geometry(args.geometry), 0, {}, attention=args.attn_implementation)
    model = job.decoder()
    peak = peak_flops(device, dtype)
    rows = []
    for visual in counts:
        rows += measure(model, random_prompt(job.shape, 1, device, dtype, visual), settings[visual], args, peak)
    for quantity in ("ms", "peak_mib"):
        print(f"exponents of {quantity}: {exponents(rows, quantity)}", file=sys.stderr)
    deliver("scaling", job.labelled(rows, visual=False), rows, COLUMNS, args, device)


if __name__ == "__main__":
    main()
