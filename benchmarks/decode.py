"""Time per decoded token on a dense and on a pruned cache.

    python -m benchmarks.decode --geometry cpu-1024x24 --methods autoprune --budgets 192,64 --batch-sizes 1,8 --save

Both caches are transformers' DynamicCache and grow in the same way; what differs is their length per layer. A round is
a prefill (not timed) and then `--new-tokens` steps, each timed by itself. Output head included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.candidates import count_row, traces_of
from benchmarks.flags import Job, Settings, decoder_parser
from benchmarks.geometry import RandomPrompt
from benchmarks.timing import interleaved_rounds, median_ratio, summary, timed
from llava.eval.common.arguments import check_range
from llava.pruning import get_method
from llava.utils import cli_main

COLUMNS = ("method", "budget", "batch", "visual", "nominal", "processed", "ms", "p10", "p90", "of_dense",
           "flops_of_dense", "kv_mib", "kv_of_dense")  # fmt: skip


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


def measure(model: Any, prompt: RandomPrompt, settings: Settings, args: Any) -> list[dict[str, Any]]:
    """Rows for one batch size: dense, then every setting."""
    dense: Any = ("dense", None)
    methods = {dense: get_method("dense").from_options({}), **settings}
    runs = {key: Decoding(model, method, prompt, args.new_tokens) for key, method in methods.items()}
    seconds = interleaved_rounds(
        runs,
        args.rounds,
        prompt.embeds_BNC.device,
        args.warmup,
        measure=lambda run, where: run.seconds_per_step(run, where),
        description=f"decode, batch {len(prompt.embeds_BNC)}",
    )
    rows = []
    for key, method in methods.items():
        counts = count_row(traces_of(model, None if key == dense else method, prompt))
        rows.append(
            {
                **dict(zip(("method", "budget"), key, strict=True)),
                **counts,
                **summary(seconds[key]),
                "new_tokens": args.new_tokens,
                "of_dense": median_ratio(seconds[key], seconds[dense]),
                "kv_of_dense": counts["kv_mib"] / (rows[0]["kv_mib"] if rows else counts["kv_mib"]),
            }
        )
    return rows


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = decoder_parser("Time per decoded token on dense and pruned caches.")
    parser.add_argument("--new-tokens", type=int, default=16, help="steps per round")
    args = parser.parse_args(argv)
    check_range("--new-tokens", args.new_tokens, 1)
    job = Job.of(args)
    model = job.decoder()
    rows = [row for prompt in job.prompts() for row in measure(model, prompt, job.settings, args)]
    job.deliver("decode", rows, COLUMNS, args)


if __name__ == "__main__":
    main()
