"""Writes a LLaVA checkpoint in llava-hf's layout, for transformers' own classes.

python -m llava.model.export_hf --model-path ORIGINAL --output FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from llava.utils import UserError, cli_main


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python -m llava.model.export_hf", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model-path", required=True, help="folder or hub name of LLaVA 1.5 or 1.6, original layout")
    parser.add_argument("--model-base", help="base checkpoint of a LoRA or projector-only model, which is merged")
    parser.add_argument("--output", required=True, help="folder to write: empty, or not there yet")
    parser.add_argument("--conv-mode", help="prompt template; default: vicuna_v1, with Mistral mistral_instruct")
    args = parser.parse_args(argv)

    from llava.model.llava_hf import export

    made = export(args.model_path, args.output, args.conv_mode, model_base=args.model_base)
    print(f"wrote {args.output}: {made.model_class}, {made.shards} weight file(s), vocabulary of {made.rows} rows")
    return 0


if __name__ == "__main__":
    main()
