"""Many methods and budgets on tasks of lmms-eval with one loaded model.

    python -m llava.integrations.lmms_eval --base llava_hf --model-args pretrained=llava-hf/llava-1.5-7b-hf \\
        --methods dense,autoprune,divprune --budgets 192,64 --tasks pope,gqa --output results/lmms.json
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.integrations.lmms_eval.sweep import build_parser, run
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
