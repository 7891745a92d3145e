"""A chat in the terminal: questions from stdin, answers streamed to stdout."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import Any

from llava.eval.answering.asking import add_chat_arguments, open_chat
from llava.eval.common.arguments import Parser
from llava.utils import UserError, describe_error, visible

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - makes input() editable; not on every platform


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = Parser(
        prog="python -m llava.serve.cli",
        description="Chat with LLaVA, or a model of transformers, about images in the terminal, under a visual-token "
        "pruning method.",
    )
    add_chat_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the prompt of every turn on stderr")
    return parser


def _shown(role: str) -> str:
    # Chat-markup roles carry their markup: "<|im_start|>user\n".
    return re.sub(r"<\|[^|]*\|>", "", role).strip().upper() or "USER"


def converse(chat: Any, run: Any, method_name: str, debug: bool = False) -> None:
    """Reads questions from stdin and answers them until an empty line or the end of the input."""
    from transformers import TextStreamer

    from llava.eval.answering.chat import token_report

    class Streamer(TextStreamer):
        """Shows on the terminal what the terminal would obey."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text, one_line=False), stream_end)

    user, assistant = (_shown(role) for role in chat.roles)
    # Beams are only decided at the end: nothing can be shown before.
    streams = chat.generation.num_beams == 1
    while True:
        try:
            question = input(f"{user}: ")
        except EOFError:
            question = ""
        if not question.strip():
            print("exit...")
            return
        print(f"{assistant}: ", end="", flush=True)
        streamer = Streamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        try:
            reply = chat.ask(question, run, streamer)
        except UserError as error:
            print(flush=True)
            print(f"error: {describe_error(error)}", file=sys.stderr)
            continue
        if not streams:
            print(visible(reply.text, one_line=False), flush=True)
        print(f"[{method_name}: {token_report(reply.trace)}]", file=sys.stderr)
        if debug:
            print(visible(f"[prompt: {chat.prompt()!r}]"), file=sys.stderr)


def run_chat(args: argparse.Namespace) -> None:
    """Chats as the flags say, until the user ends it."""
    chat, method = open_chat(args)
    # Bytes that are no text in the terminal's encoding cost one question, not the chat.
    with contextlib.suppress(AttributeError, OSError):
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    try:
        with method.attach(chat.model) as run:
            converse(chat, run, args.method, args.debug)
    except KeyboardInterrupt:
        print("\nexit...")
