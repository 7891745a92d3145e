"""The families of models that can be pruned, with transformers' classes and what they take.

python -m llava.eval.families
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.eval.families", description="List the families of models.")
    parser.add_argument("--names", action="store_true", help="only the names of those that can be pruned, one a line")
    args = parser.parse_args(argv)

    from llava.families.registry import known_families

    for family in known_families():
        if not args.names:
            takes = f"refused: {family.refused}" if family.refused else ", ".join(family.modalities)
            print(f"{family.name:<16} {family.classes[0]:<40} {takes}")
        elif family.refused is None:
            print(family.name)


if __name__ == "__main__":
    main()
