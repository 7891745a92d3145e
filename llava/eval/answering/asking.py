"""One question, or a chat, about images: flags and what they open."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llava.eval.common.arguments import (
    GenerationOptions,
    Parser,
    add_generation_arguments,
    add_model_arguments,
    add_pruning_arguments,
    check_budget,
    method_from_args,
)
from llava.utils import UserError, visible

MAX_NEW_TOKENS = 512


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that one question and a chat have in common."""
    add_model_arguments(parser)
    for bits in (8, 4):
        parser.add_argument(f"--load-{bits}bit", action="store_true", help=f"quantize to {bits} bits (bitsandbytes)")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--image-file", default=None, help="image file(s) or http(s) address(es), separated by --sep; default: no image"
    )
    group.add_argument("--sep", default=",", help="what separates the names in --image-file")
    group.add_argument(
        "--allow-private-redirects",
        action="store_true",
        help="let an http(s) address redirect to this machine or to a private network",
    )
    add_generation_arguments(parser, single=True)
    parser.set_defaults(max_new_tokens=MAX_NEW_TOKENS)
    add_pruning_arguments(parser)


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = Parser(
        prog="python -m llava.eval.run_llava",
        description="Ask LLaVA, or a model of transformers, one question about images under a visual-token pruning "
        "method.",
    )
    add_chat_arguments(parser)
    parser.add_argument("--query", required=True, help="the question; <image-placeholder> marks where images belong")
    return parser


def open_chat(args: argparse.Namespace, query: str | None = None) -> tuple[Any, Any]:
    """The `Talk` and the pruning method that the flags describe; everything is checked before the model loads, the
    first question too if it is known.
    """
    method = method_from_args(args)
    generation = GenerationOptions.from_args(args)

    from llava.eval.answering.family import family_folder

    if (family := family_folder(args.model_path)) is not None:
        return _open_family(args, family, generation, query), method

    from llava.conversation import build_prompt
    from llava.eval.answering.adapter import max_visual_tokens
    from llava.eval.answering.chat import Chat, choose_conv_mode, load_images, require_unicode
    from llava.eval.answering.loading import load_model
    from llava.mm_utils import get_model_name_from_path

    conv_mode = choose_conv_mode(args.conv_mode, get_model_name_from_path(args.model_path))
    images = load_images(args.image_file, args.sep, args.allow_private_redirects)
    if query is not None:
        require_unicode(query, "--query")
        build_prompt(query, len(images), conv_mode)
    tokenizer, model, image_processor, _ = load_model(args)
    if images:
        check_budget(method, max_visual_tokens(model), len(images))
    return Chat(tokenizer, model, image_processor, images, conv_mode, generation), method


def _open_family(args: argparse.Namespace, family: str, generation: GenerationOptions, query: str | None) -> Any:
    """The conversation with a folder of a family of transformers."""
    from llava.eval.answering.chat import load_images, require_unicode
    from llava.eval.answering.family import FamilyAdapter, load_family
    from llava.eval.answering.family_chat import FamilyChat, message_parts

    for bits in (8, 4):
        if getattr(args, f"load_{bits}bit"):
            raise UserError(f"--load-{bits}bit is for LLaVA checkpoints: {args.model_path} is a {family} folder")
    if args.conv_mode is not None:
        text = f"[WARNING] --conv-mode {args.conv_mode} is not used: {family} has a chat template of its own"
        print(visible(text), file=sys.stderr)
    images = load_images(args.image_file, args.sep, args.allow_private_redirects)
    if query is not None:
        require_unicode(query, "--query")
        message_parts(query, len(images))
    return FamilyChat(FamilyAdapter(*load_family(args), family), images, generation)


def eval_model(args: Any) -> str:
    """Answers `args.query`, prints the answer and returns it.

    args: the flags by name, as `build_parser` gives them or any object with some of them as attributes (LLaVA's
    own example); what is missing has the default of the command line.
    """
    from llava.eval.answering.chat import token_report

    defaults = vars(build_parser().parse_args(["--model-path", args.model_path, "--query", args.query]))
    args = argparse.Namespace(**{name: getattr(args, name, value) for name, value in defaults.items()})
    chat, method = open_chat(args, args.query)
    with method.attach(chat.model) as run:
        reply = chat.ask(args.query, run)
    print(visible(reply.text, one_line=False), flush=True)
    print(f"[{args.method}: {token_report(reply.trace)}]", file=sys.stderr)
    return reply.text
