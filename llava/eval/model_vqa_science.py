"""Answers ScienceQA with LLaVA under a pruning method.

    python -m llava.eval.model_vqa_science --model-path CKPT --image-folder images/test \\
        --question-file llava_test_CQM-A.json --answers-file A.jsonl --single-pred-prompt --target-token-num 64

The question file is in LLaVA's conversation format: one JSON list of `id`, optional `image`, `conversations`. Exit
status: 0 all questions answered, 2 wrong input, 3 some samples were skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.answering.command import KEEP, run_questions
from llava.eval.common.jsonio import read_json
from llava.eval.common.questions import Question, chunk, image_names, require_encodable
from llava.eval.model_vqa import MAX_NEW_TOKENS
from llava.eval.model_vqa_loader import build_parser as build_loader_parser
from llava.utils import UserError, cli_main

SINGLE_PREDICTION = "Answer with the option's letter from the given choices directly."


def read_conversations(path: str, single_prediction: bool = False) -> list[Question]:
    """The questions of a file: the first turn of each conversation.

    The text is what answer files carry as `prompt`: the placeholder of the image on a line of its own if there is an
    image, the question, and with `single_prediction` the instruction to name only a letter. As in LLaVA the placeholder
    of a single image comes first, wherever the question has it; those of several images stay where they are.
    """
    entries = read_json(path, "question file")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: not a question file of conversations (needs a non-empty JSON list)")
    return [_question(entry, index, f"{path}: entry {index}", single_prediction) for index, entry in enumerate(entries)]


def _question(entry: Any, index: int, source: str, single_prediction: bool) -> Question:
    identity = entry.get("id") if isinstance(entry, dict) else None
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise UserError(f"{source} needs an 'id', a number or a string")
    source = f"{source} (id {identity})"
    turns = entry.get("conversations")
    first = turns[0].get("value") if isinstance(turns, list) and turns and isinstance(turns[0], dict) else None
    if not isinstance(first, str):
        raise UserError(f"{source} needs a list of 'conversations' whose first has a text as 'value'")
    images = image_names(entry, source)
    text, written = first.strip(), first.count(DEFAULT_IMAGE_TOKEN)
    if len(images) == 1 and written <= 1:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{first.replace(DEFAULT_IMAGE_TOKEN, '').strip()}"
    elif not written:
        text = f"{DEFAULT_IMAGE_TOKEN}\n" * len(images) + text
    if single_prediction:
        text = f"{text}\n{SINGLE_PREDICTION}"
    require_encodable(source, str(identity), text, *images)
    return Question(index, source, identity, text, images)


def without_placeholder(question: Question) -> str:
    """The text without the line of a single image's placeholder, which belongs into the prompt as the checkpoint needs
    it.
    """
    if len(question.images) == question.text.count(DEFAULT_IMAGE_TOKEN) == 1:
        return question.text.removeprefix(f"{DEFAULT_IMAGE_TOKEN}\n")
    return question.text


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = build_loader_parser(KEEP)
    parser.prog = "python -m llava.eval.model_vqa_science"
    parser.description = "Answer ScienceQA with LLaVA under a visual-token pruning method."
    parser.set_defaults(max_new_tokens=MAX_NEW_TOKENS, question_file="tables/question.json")
    group = parser.add_argument_group("prompt")
    group.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter and no more")
    group.add_argument("--answer-prompter", action="store_true", help="accepted for old scripts; does nothing")
    return parser


def eval_model(args: argparse.Namespace) -> int:
    """Runs what the flags say; returns the exit status."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    questions = read_conversations(args.question_file, args.single_pred_prompt)[: args.limit]

    def answerer(*parts: Any) -> Any:
        from llava.eval.answering.varied import VariedAnswerer  # imports torch: not for --help and wrong flags

        return VariedAnswerer(*parts, prompt_text=without_placeholder)

    return run_questions(
        args,
        chunk(questions, args.num_chunks, args.chunk_idx),
        answerer,
        metadata={"single_pred_prompt": args.single_pred_prompt},
        prompt_text=without_placeholder,
        padding_attention=KEEP,
    )


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
