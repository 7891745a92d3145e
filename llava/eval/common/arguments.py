"""Command line flags shared by the evaluation tools, and the pruning method that they describe.

`--help` of every tool shows the same text for the same flag.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from llava.eval.common.outputs import check_outputs
from llava.schema import LARGEST
from llava.utils import UserError, describe_error, kind_of

DEFAULT_METHOD = "autoprune"
DEFAULT_TARGET_TOKENS = 64
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
AUTO = "auto"  # of --batch-size
MAX_IMAGE_PIXELS = 89_478_485  # PIL's own idea of a decompression bomb: a quarter of a gigabyte as RGB
MAX_BEAMS = 1000
MAX_TOKENS = 1_000_000  # of an answer: no context is longer
MAX_WORKERS = 256
DTYPES = ("auto", "float32", "float16", "bfloat16")
DTYPE_HELP = (
    "auto: float16 on a GPU, float32 on a CPU; half precision on a CPU without AMX or AVX512-BF16 halves the memory "
    "and is five to six times slower"
)

# flag -> option of the method; x0, k0 and gamma exist only where the method declares them.
_METHOD_FLAGS = {
    "--target-token-num": "target_tokens",
    "--target-ratio": "target_ratio",
    "--visual-token-num": "visual_token_num",
    "--budget": "budget",
    "--view-budget": "view_budget",
    "--positions": "positions",
    "--x0": "x0",
    "--k0": "k0",
    "--gamma": "gamma",
}


def check_range(flag: str, value: float | None, least: float, most: float = LARGEST) -> None:
    """Raises `UserError` unless a number is from `least` to `most`; a flag that was not given (None) is fine."""
    if value is None or least <= value <= most:
        return
    bound = f"at most {most}" if value > most else f"at least {least}"
    raise UserError(f"{flag} must be {bound}, got {kind_of(value)}")


def parse_count(text: str, flag: str) -> int:
    """A number of at least 1, of an option that holds several of them."""
    with contextlib.suppress(ValueError):  # also numbers of thousands of digits
        if 1 <= int(text) <= LARGEST:
            return int(text)
    raise UserError(f"{flag}: {kind_of(text)} is not a number of at least 1")


def split_names(text: str | None) -> list[str]:
    """`a,b` as a list; blanks around names are ignored, and None names nothing."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that say nothing: the help text then tells what the tool does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one-line `UserError`s; the usage text is left to --help.

    Options that write (their `type` is of `common.outputs`) are checked against all else on the command line.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Abbreviated flags would change meaning whenever a flag is added.
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in the standard library, but what can be no text and no name of a file is refused, whatever takes it."""
        args = sys.argv[1:] if args is None else list(args)
        option = "the command line"
        for value in args:
            name, equals, given = value.partition("=")
            if value.startswith("--"):
                option, value = name, given if equals else None
            if value is not None:
                _check_text(option, value)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed = super().parse_args(args, namespace)
        check_outputs(self, parsed)
        return parsed


# Options whose value names a file or folder that there has to be, or has to become.
_PATH_OPTION = re.compile(r"--(.*-)?(path|base|file|files|dir|json|csv|src|dst|plot)$")


def _check_text(option: str, value: str) -> None:
    if "\0" in value:
        raise UserError(f"{option}: {value!r} holds a null character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{option}: {value!r} holds bytes that are not UTF-8: rename the file, or use UTF-8") from None
    if not value.strip() and _PATH_OPTION.fullmatch(option):
        raise UserError(f"{option} must not be empty: it names a file or folder")


def add_model_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Which checkpoint is loaded, and how; without a `default` one has to be given."""
    group = parser.add_argument_group("model")
    group.add_argument("--model-path", required=default is None, default=default, help="checkpoint folder or hub name")
    group.add_argument("--model-base", default=None, help="base checkpoint of a LoRA or projector-only model")
    group.add_argument("--device", default=None, help="cuda, cuda:1, mps, cpu; default: the best there is")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help=DTYPE_HELP)
    group.add_argument("--attn-implementation", default=None, help="eager, sdpa or flash_attention_2; default: sdpa")
    group.add_argument(
        "--mm-patch-merge-type",
        choices=MERGE_TYPES,
        default=None,
        help="LLaVA-1.6: how the crops of an image are put together; spatial_unpad: without padding, with newline "
        "tokens, as LLaVA; spatial: all patches, as the published AutoPrune; default: the checkpoint's own with "
        "--method dense, spatial when pruning",
    )


def add_generation_arguments(parser: argparse.ArgumentParser, single: bool = False) -> None:
    """How answers are generated. single: for tools that ask one question at a time and take the template from the
    model's name.
    """
    group = parser.add_argument_group("generation")
    by_name = "; default: by the model's name" if single else ""
    group.add_argument(
        "--conv-mode", default=None if single else "vicuna_v1", help=f"name of the conversation template{by_name}"
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy; above: sampling")
    group.add_argument("--top-p", "--top_p", type=float, default=None, help="nucleus sampling: probability mass kept")
    group.add_argument("--num-beams", "--num_beams", type=int, default=1, help="beams of beam search")
    group.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=128, help="tokens per answer at most")
    group.add_argument("--seed", type=int, default=0, help="seed of sampling")
    if not single:
        group.add_argument(
            "--batch-size", type=parse_batch_size, default=1, help=f"questions per forward pass; {AUTO}: finds a number"
        )


def parse_batch_size(text: str) -> int | str:
    """A number of at least 1 or `auto`, for argparse."""
    if text == AUTO:
        return AUTO
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or {AUTO}, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 or {AUTO}, got {value}")
    return value


def add_pruning_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pruning method runs, with which options. Read them with `method_from_args`."""
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--method",
        default=DEFAULT_METHOD,
        help="pruning method: autoprune, fastv, random, ...; dense: no pruning; a+b: a, then b (divprune+autoprune); "
        "LAYER:METHOD:SHARE;...: shares kept in front of layers (2:fastv:0.5;16:random:0.5)",
    )
    group.add_argument(
        "--target-token-num",
        type=int,
        default=None,
        help=f"budget: mean number of visual tokens per decoder layer; {DEFAULT_TARGET_TOKENS} if not given",
    )
    group.add_argument(
        "--target-ratio",
        type=float,
        default=None,
        metavar="R",
        help="budget as a share of each prompt's visual tokens, above 0 and at most 1 (0.11), instead of "
        "--target-token-num; for models whose pictures have different numbers of tokens",
    )
    group.add_argument(
        "--budget",
        choices=("nominal", "processed"),
        default=None,
        help="which mean meets the budget: nominal, as the method's paper counts, or processed, the visual tokens "
        "that the layers compute on, alike for all methods; default: nominal",
    )
    group.add_argument(
        "--view-budget",
        default=None,
        metavar="joint|equal|FILE",
        help="questions of several images: all tokens compete (joint, the default), or every image keeps its share of "
        "each selection: equal ones, or those of a file with a number per image; not all methods can",
    )
    group.add_argument(
        "--visual-token-num",
        type=int,
        default=None,
        help="visual tokens of an image that enter the decoder, chosen by CLS attention in each crop in proportion to "
        "its size; a number of at least those an image has (576, LLaVA-1.6: 2880) keeps all; default: all",
    )
    group.add_argument(
        "--positions",
        choices=("compact", "original"),
        default=None,
        help="positions of surviving tokens: renumbered in each layer, or kept; default: the method's own",
    )
    group.add_argument("--x0", type=float, default=None, help="AutoPrune: middle of the curve, in layers (14.9)")
    group.add_argument("--k0", type=float, default=None, help="AutoPrune: base slope of the curve, per layer (0.4)")
    group.add_argument("--gamma", type=float, default=None, help="AutoPrune: slope per bit of information (0.2)")
    group.add_argument(
        "--method-args",
        default="",
        metavar="K=V,...",
        help="further options of the method; keys as in Python",
    )


def merge_type_from_args(args: argparse.Namespace) -> str | None:
    """`mm_patch_merge_type` for `load_pretrained_model`: the flag, or what a pruned run is by default."""
    given = getattr(args, "mm_patch_merge_type", None)
    prunes = getattr(args, "method", "dense") != "dense"
    return "spatial" if given is None and prunes else given


def parse_method_args(text: str) -> dict[str, str]:
    """`k=v,k=v` as a dict of strings; raises `UserError` for an entry without `=` or a key given twice."""
    options: dict[str, str] = {}
    for entry in split_names(text):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not key or not value:
            raise UserError(f"--method-args: {entry!r} is not of the form key=value")
        if key in options:
            raise UserError(f"--method-args: {key!r} is given twice")
        options[key] = value
    return options


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the method from its own flags and from --method-args; the budget has its default here."""
    for flag in ("--target-token-num", "--visual-token-num"):
        value = _value(args, flag)
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    ratio = _value(args, "--target-ratio")
    if ratio is not None and not 0 < ratio <= 1:
        raise UserError(f"--target-ratio must be above 0 and at most 1, got {ratio}")
    options: dict[str, Any] = parse_method_args(args.method_args)
    for flag, option in _METHOD_FLAGS.items():
        value = _value(args, flag)
        if value is None:
            continue
        if option in options:
            raise UserError(f"{flag} and --method-args {option}=... are the same option: give one of them")
        options[option] = value
    if "target_tokens" in options and "target_ratio" in options:
        raise UserError("--target-token-num and --target-ratio are two ways to give the budget: give one of them")
    if args.method == "dense" or ":" in args.method:
        # One script runs all with the same flags; a budget means nothing without pruning or for given shares.
        options.pop("target_tokens", None)
        options.pop("target_ratio", None)
        if args.method == "dense":
            options.pop("view_budget", None)
    elif "target_ratio" not in options:
        options.setdefault("target_tokens", DEFAULT_TARGET_TOKENS)
    return options


def method_from_args(args: argparse.Namespace) -> Any:
    """The `PruningMethod` that the flags describe; `UserError` for an unknown name, option or value."""
    method_class = find_method(args.method, "--method")  # an unknown name is told before its options
    return with_options(method_class, method_options(args), f"--method {args.method}")


def find_method(name: str, flag: str) -> Any:
    """What `get_method` gives for a name; `UserError`, beginning with `flag`, for an unknown one."""
    from llava.pruning import get_method  # imports torch: not for --help and wrong flags

    try:
        return get_method(name)
    except (KeyError, ValueError) as error:
        raise UserError(f"{flag}: {_message(error)}") from None


def with_options(method_class: Any, options: Mapping[str, Any], what: str) -> Any:
    """The method with these options; `UserError`, beginning with `what`, for an unknown option or a wrong value."""
    try:
        return method_class.from_options(options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {_message(error)}") from None


def check_budget(method: Any, visual_tokens: int | None, images: int = 1, flag: str = "--target-token-num") -> None:
    """Raises `UserError` if the budget exceeds what a prompt of `images` images (0 counts as 1) can have.

    visual_tokens: the most the model can get from one image; None where that depends on the image.
    """
    target, most = method.target_tokens, None if visual_tokens is None else visual_tokens * max(images, 1)
    if target is not None and most is not None and target > most:
        raise UserError(
            f"{flag} {target} is more than the {most} visual tokens of this model; "
            "use --method dense to run without pruning"
        )


def _value(args: argparse.Namespace, flag: str) -> Any:
    return getattr(args, flag.lstrip("-").replace("-", "_"))


def _message(error: Exception) -> str:
    # str() of a KeyError puts quotes around the message.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else describe_error(error)


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated. temperature 0 means greedy or, with num_beams > 1, beam search."""

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        check_range("--num_beams", self.num_beams, 1, MAX_BEAMS)
        check_range("--max_new_tokens", self.max_new_tokens, 1, MAX_TOKENS)
        check_range("--seed", self.seed, 0)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> GenerationOptions:
        return cls(args.temperature, args.top_p, args.num_beams, args.max_new_tokens, args.seed)

    @cached_property
    def samples(self) -> bool:
        return self.temperature > 0

    @cached_property
    def generate_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `generate`; sampling parameters are left out where they would only warn."""
        kwargs: dict[str, Any] = {
            "do_sample": self.samples,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "use_cache": True,
        }
        if self.samples:
            kwargs["temperature"] = self.temperature
            if self.top_p is not None:
                kwargs["top_p"] = self.top_p
        return kwargs
