"""The pruning methods with what they do; with a name, the method's description and its options.

python -m llava.eval.methods
python -m llava.eval.methods fastv
python -m llava.eval.methods --names
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from llava.eval.common.arguments import Parser, find_method
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.eval.methods", description="List the pruning methods.")
    parser.add_argument("method", nargs="?", help="describe this one: its paper, its budget, its options")
    parser.add_argument("--names", action="store_true", help="only the names, one a line")
    args = parser.parse_args(argv)
    if args.method is not None:
        kind = find_method(args.method, "METHOD")
        print(inspect.getdoc(kind) or args.method, "\n\noptions:")
        for name, default in kind.options().items():
            print(f"  {name}={default}")
        return
    from llava.pruning import get_method, list_methods

    for name in list_methods():
        print(name if args.names else f"{name:<20} {(inspect.getdoc(get_method(name)) or '').splitlines()[0]}")


if __name__ == "__main__":
    main()
