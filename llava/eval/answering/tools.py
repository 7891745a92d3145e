"""The answering tools: their flags, the questions they read, and how their prompts differ.

`model_vqa_loader` answers LLaVA's question files, `model_vqa` the same with room for long answers, `model_vqa_science`
conversations, `model_vqa_mmbench` a table with the pictures in it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llava.eval.answering.command import KEEP, ZERO, add_padding_argument, add_running_arguments, run_questions
from llava.eval.common.arguments import (
    Parser,
    add_generation_arguments,
    add_model_arguments,
    add_pruning_arguments,
    check_range,
)
from llava.eval.common.outputs import ANSWERS
from llava.eval.common.questions import chunk, read_questions
from llava.eval.tasks import mmbench_rows, science_conversations
from llava.utils import visible

LONG_ANSWER = 1024  # tokens; the published default of all tools but model_vqa_loader


def _parser(tool: str, wish: str, padding_attention: str = ZERO, **defaults: Any) -> Parser:
    """The flags that all tools share. wish: what the tool does; padding_attention: the default that --help tells."""
    parser = Parser(
        prog=f"python -m llava.eval.{tool}", description=f"{wish} with LLaVA under a visual-token pruning method."
    )
    add_model_arguments(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--image-folder", default="", help="folder that the image names are relative to")
    data.add_argument("--question-file", default="tables/question.jsonl", help="one JSON object per line")
    data.add_argument("--answers-file", type=ANSWERS, default="answer.jsonl", help="written line by line")
    data.add_argument("--num-chunks", type=int, default=1, help="parts the question file is cut into")
    data.add_argument("--chunk-idx", type=int, default=0, help="the part to answer, from 0")
    data.add_argument("--limit", type=int, default=None, help="only the first LIMIT questions; default: all")
    add_generation_arguments(parser)
    add_pruning_arguments(parser)
    add_padding_argument(parser, padding_attention)
    add_running_arguments(parser)
    parser.set_defaults(**defaults)
    return parser


def loader_parser() -> Parser:
    """All flags of `model_vqa_loader`."""
    return _parser("model_vqa_loader", "Answer a question file")


def answer_question_file(args: argparse.Namespace, padding_attention: str = ZERO) -> int:
    """Runs what the flags of `model_vqa_loader` say; returns the exit status."""
    check_range("--limit", args.limit, 1)
    questions = chunk(read_questions(args.question_file)[: args.limit], args.num_chunks, args.chunk_idx)
    return run_questions(args, questions, padding_attention=padding_attention)


def open_ended_parser() -> Parser:
    """All flags of `model_vqa`."""
    return _parser("model_vqa", "Answer open questions", KEEP, max_new_tokens=LONG_ANSWER)


def answer_open_ended(args: argparse.Namespace) -> int:
    """Runs what the flags of `model_vqa` say; returns the exit status."""
    return answer_question_file(args, KEEP)


def science_parser() -> Parser:
    """All flags of `model_vqa_science`."""
    defaults: dict[str, Any] = {"max_new_tokens": LONG_ANSWER, "question_file": "tables/question.json"}
    parser = _parser("model_vqa_science", "Answer ScienceQA", KEEP, **defaults)
    group = parser.add_argument_group("prompt")
    group.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter and no more")
    group.add_argument("--answer-prompter", action="store_true", help="accepted for old scripts; does nothing")
    return parser


def answer_science(args: argparse.Namespace) -> int:
    """Runs what the flags of `model_vqa_science` say; returns the exit status."""
    check_range("--limit", args.limit, 1)
    questions = science_conversations.read_conversations(args.question_file, args.single_pred_prompt)[: args.limit]
    prompt_text = science_conversations.without_placeholder
    return run_questions(
        args,
        chunk(questions, args.num_chunks, args.chunk_idx),
        metadata={"single_pred_prompt": args.single_pred_prompt},
        prompt_text=prompt_text,
        padding_attention=KEEP,
    )


def mmbench_parser() -> Parser:
    """All flags of `model_vqa_mmbench`."""
    defaults: dict[str, Any] = {"max_new_tokens": LONG_ANSWER, "question_file": "tables/question.tsv"}
    parser = _parser("model_vqa_mmbench", "Answer MMBench", **defaults)
    group = parser.add_argument_group("prompt")
    group.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter and no more")
    group.add_argument("--all-rounds", action="store_true", help="ask each row once for every rotation of its options")
    languages = tuple(mmbench_rows.SINGLE_PREDICTION)
    group.add_argument("--lang", choices=languages, default="en", help="language of the instruction")
    return parser


def answer_mmbench(args: argparse.Namespace) -> int:
    """Runs what the flags of `model_vqa_mmbench` say; returns the exit status."""
    check_range("--limit", args.limit, 1)

    def warn(text: str) -> None:
        print(f"warning: {visible(text)}", file=sys.stderr)

    rows, images = mmbench_rows.read_rows(args.question_file, args.all_rounds, warn)
    own_rows = chunk(rows[: args.limit], args.num_chunks, args.chunk_idx)
    instruction = mmbench_rows.SINGLE_PREDICTION[args.lang] if args.single_pred_prompt else ""
    prompt_text = mmbench_rows.with_instruction(instruction)
    return run_questions(
        args,
        [question for row in own_rows for question in row],
        metadata={"single_pred_prompt": args.single_pred_prompt, "lang": args.lang, "all_rounds": args.all_rounds},
        prompt_text=prompt_text,
        images=images,
    )
