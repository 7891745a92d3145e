"""ScienceQA's problems as prompt and answer, in the formats of ScienceQA's and LLaVA's training scripts.

A format is `INPUT-OUTPUT`, such as `QCM-LEA`. Letters: Q question, C context (the hint), M options, L lecture,
E explanation (the problem's `solution`), A answer, P parts under headings. Source of the formats: ScienceQA (Lu et al.
2022, "Learn to Explain"), and `convert_sqa_to_llava.py` of LLaVA, whose files these equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.tasks.science_qa import OPTIONS
from llava.utils import UserError

INPUTS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
# AL and AE name the wrong one of lecture and explanation in the published scripts; files made with them do, too.
_REASONS = {"AL": "E", "AE": "L", "ALE": "LE", "AEL": "EL"}
_REASONS_FIRST = {"LA": "L", "EA": "E", "LEA": "LE", "ELA": "EL"}
OUTPUTS = ("A", *_REASONS, *_REASONS_FIRST, "LEPA")
LETTERED = "-lettered"
_REASON = "BECAUSE:"


def check_format(prompt_format: str) -> None:
    """Raises `UserError` unless the format is known."""
    if prompt_format.endswith(LETTERED):
        asked, dash, answered = prompt_format.removesuffix(LETTERED).partition("-")
        known = dash and asked and answered and set(asked) <= set("CQMLE") and set(answered) <= set("ALE")
    else:
        asked, _, answered = prompt_format.partition("-")
        known = asked in INPUTS and answered in OUTPUTS
    if not known:
        raise UserError(
            f"--prompt-format: {prompt_format!r} is not known; it is INPUT-OUTPUT with INPUT one of "
            f"{', '.join(INPUTS)} and OUTPUT one of {', '.join(OUTPUTS)}, or CQM-A{LETTERED}"
        )


def prompt_and_answer(problem: Mapping[str, Any], prompt_format: str) -> tuple[str, str]:
    """What is asked and what is to be answered, without the image; the format has passed `check_format`.

    problem: `question`, `choices`, `answer` (index); `hint`, `lecture`, `solution` may be absent.
    """
    if prompt_format.endswith(LETTERED):
        return _lettered(problem, *prompt_format.removesuffix(LETTERED).split("-"))
    asked, answered = prompt_format.split("-")
    options = " ".join(f"({letter}) {text}" for letter, text in zip(OPTIONS, problem["choices"], strict=False))
    # The published script writes line breaks as a backslash and n and turns all of those back.
    lecture, solution = (_text(problem, name).replace("\\n", "\n") for name in ("lecture", "solution"))
    reasons = {"L": lecture, "E": solution}
    parts = {
        "Q": f"Question: {_text(problem, 'question')}",
        "C": f"Context: {_text(problem, 'hint').strip() or 'N/A'}",
        "M": f"Options: {options}",
    }
    lines = []
    for is_reason, letters in groupby(asked, key=lambda letter: letter in reasons):
        if is_reason:
            lines.append(" ".join([_REASON, *(reasons[letter] for letter in letters)]))
        else:
            lines += [parts[letter] for letter in letters]
    letter = OPTIONS[problem["answer"]]
    prompt = _tidy("\n".join(lines) + "\n")
    # A prompt that begins with its question, and an answer, go without the word in front.
    return _without(prompt, "Question: "), _without(_tidy(_answer(answered, letter, reasons)), "Answer: ")


def _answer(output: str, letter: str, reasons: Mapping[str, str]) -> str:
    conclusion = f"The answer is {letter}."
    if output == "LEPA":
        headings = (("LECTURE", reasons["L"]), ("SOLUTION", reasons["E"]))
        return "".join(f"{name}: {text}\n" for name, text in headings if text.strip()) + f"###\nANSWER: {letter}."
    if output in _REASONS_FIRST:
        return " ".join(["Answer:", *(reasons[name] for name in _REASONS_FIRST[output]), conclusion])
    because = [_REASON, *(reasons[name] for name in _REASONS[output])] if output in _REASONS else []
    return " ".join(["Answer:", conclusion, *because])


def _tidy(text: str) -> str:
    """Pairs of blanks become one (once, not until none is left); a reason without text goes."""
    text = text.replace("  ", " ").strip()
    return text.replace(_REASON, "").strip() if text.endswith(_REASON) else text


def _without(text: str, word: str) -> str:
    return text.replace(word, "") if text.startswith(word) else text


def _text(problem: Mapping[str, Any], name: str) -> str:
    return str(problem.get(name) or "")


def _lettered(problem: Mapping[str, Any], asked: str, answered: str) -> tuple[str, str]:
    """The layout of LLaVA's evaluation file `llava_test_CQM-A.json`: options on lines of their own, no `Question:`,
    no line for what a problem lacks.
    """
    hint = _text(problem, "hint").strip()
    parts = {
        "C": f"Context: {hint}" if hint else "",
        "Q": _text(problem, "question").strip(),
        "M": "\n".join(f"{letter}. {text}" for letter, text in zip(OPTIONS, problem["choices"], strict=False)),
        "L": _text(problem, "lecture").strip(),
        "E": _text(problem, "solution").strip(),
        "A": f"The answer is {OPTIONS[problem['answer']]}.",
    }
    first, second = ("\n".join(parts[letter] for letter in letters if parts[letter]) for letters in (asked, answered))
    return first, second


def conversation(key: str, problem: Mapping[str, Any], prompt_format: str) -> dict[str, Any]:
    """One entry of LLaVA's training and evaluation files; the image's place is behind the text, its path ID/name."""
    entry, prompt, answer = _entry(key, problem, prompt_format)
    entry["conversations"] = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return entry


def instruction(key: str, problem: Mapping[str, Any], prompt_format: str) -> dict[str, Any]:
    """The same as `instruction` and `output`, for a file of JSON lines."""
    entry, prompt, answer = _entry(key, problem, prompt_format)
    return {**entry, "instruction": prompt, "output": answer}


def _entry(key: str, problem: Mapping[str, Any], prompt_format: str) -> tuple[dict[str, Any], str, str]:
    prompt, answer = prompt_and_answer(problem, prompt_format)
    if not problem.get("image"):
        return {"id": key}, prompt, answer
    return {"id": key, "image": f"{key}/{problem['image']}"}, f"{prompt}\n{DEFAULT_IMAGE_TOKEN}", answer
