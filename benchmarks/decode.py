"""Time per decoded token on a dense and on a pruned cache.

    python -m benchmarks.decode --geometry cpu-1024x24 --methods autoprune --budgets 192,64 --batch-sizes 1,8 --save

Both caches are transformers' DynamicCache and grow in the same way; what differs is their length per layer. A round is
a prefill (not timed) and then `--new-tokens` steps, each timed by itself. Output head included.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.candidates import traces_of
from benchmarks.environment import use_fixed_allocator
from benchmarks.geometry import RandomPrompt, random_decoder, random_prompt
from benchmarks.output import add_method_arguments, common_parser, deliver
from benchmarks.prefill import count_row, describe_geometry, job_of
from benchmarks.timing import Summary, interleaved_rounds, median_ratio, timed
from llava.pruning import get_method
from llava.utils import UserError, cli_main

COLUMNS = ("method", "budget", "batch", "visual", "nominal", "processed", "ms", "p10", "p90", "of_dense", "kv_mib",
           "kv_of_dense")  # fmt: skip


class Decoding:
    """One method's prefill and the steps behind it."""

    def __init__(self, model: Any, method: Any, prompt: RandomPrompt, new_tokens: int) -> None:
        self.model, self.method, self.prompt, self.new_tokens = model, method, prompt, new_tokens
        self.token = torch.ones(len(prompt.embeds_BNC), 1, dtype=torch.long, device=prompt.embeds_BNC.device)

    def seconds_per_step(self, _: Callable[[], Any], device: torch.device) -> float:
        """Median over the steps of one round."""
        with self.method.attach(self.model) as run:
            run.set_visual(self.prompt.layout, self.prompt.cls_BV if run.needs_cls_attention else None)
            cache = self.model.model(inputs_embeds=self.prompt.embeds_BNC, use_cache=True).past_key_values
            self.cache = cache
            steps = [timed(lambda: self.step(cache), device) for _ in range(self.new_tokens)]
        return statistics.median(steps)

    def step(self, cache: Any) -> Any:
        """One token per row through decoder and output head."""
        return self.model(input_ids=self.token, past_key_values=cache, use_cache=True).logits


def measure(model: Any, prompt: RandomPrompt, settings: dict, args: Any) -> list[dict[str, Any]]:
    """Rows for one batch size: dense, then every setting."""
    device = prompt.embeds_BNC.device
    methods = {("dense", None): get_method("dense").from_options({}), **settings}
    runs = {key: Decoding(model, method, prompt, args.new_tokens) for key, method in methods.items()}
    seconds = interleaved_rounds(
        {str(key): run for key, run in runs.items()},
        args.rounds,
        device,
        args.warmup,
        measure=lambda run, where: run.seconds_per_step(run, where),
        description=f"decode, batch {len(prompt.embeds_BNC)}",
    )
    rows = []
    for (name, budget), method in methods.items():
        traces = traces_of(model, None if name == "dense" else method, prompt)
        own, dense = seconds[str((name, budget))], seconds[str(("dense", None))]
        summary = Summary.of(own)
        rows.append(
            {
                "method": name,
                "budget": budget,
                **count_row(traces),
                "ms": summary.median,
                "p10": summary.p10,
                "p90": summary.p90,
                "rounds": summary.rounds,
                "new_tokens": args.new_tokens,
                "of_dense": median_ratio(own, dense),
            }
        )
        rows[-1]["kv_of_dense"] = rows[-1]["kv_mib"] / rows[0]["kv_mib"]
    return rows


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = common_parser("Time per decoded token on dense and pruned caches.")
    add_method_arguments(parser)
    parser.add_argument("--new-tokens", type=int, default=16, help="steps per round")
    args = parser.parse_args(argv)
    if args.new_tokens < 1:
        raise UserError(f"--new-tokens must be at least 1, got {args.new_tokens}")
    if argv is None and args.allocator == "fixed":
        use_fixed_allocator("benchmarks.decode", sys.argv[1:])
    device, dtype, shape, visual, settings, sizes = job_of(args)
    model = random_decoder(shape, device, dtype, args.attn_implementation)
    rows = []
    for size in sizes:
        rows += measure(model, random_prompt(shape, size, device, dtype, visual), settings, args)
    name = describe_geometry(rows, shape, dtype, args)
    deliver("decode", f"{name} {visual} visual tokens", rows, COLUMNS, args, device)


if __name__ == "__main__":
    main()
