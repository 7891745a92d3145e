"""ScienceQA's question file: LLaVA's conversations."""

from __future__ import annotations

from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.common.jsonio import read_json
from llava.eval.common.questions import Question, image_names, require_encodable
from llava.utils import UserError

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
