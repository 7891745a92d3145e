"""What all scorers share: reading LLaVA answer files, joining answers to questions, saying what did not join."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.common.jsonio import write_json
from llava.jsonfiles import iter_jsonl, parse_line, require_file
from llava.schema import ID, SCALAR, TEXT, Fields, check, optional
from llava.utils import UserError, visible

Key = TypeVar("Key", bound=Hashable)
MAX_EXAMPLES = 3
ANSWER = Fields({"question_id": ID, "text": SCALAR, "prompt?": optional(TEXT)})
LEFT_OUT = "of {expected} questions have no answer and are left out of the score"


def shorten(ids: list[str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(ids[:MAX_EXAMPLES]) + (", ..." if len(ids) > MAX_EXAMPLES else "")


def warn(text: str) -> None:
    """Prints a warning to stderr, where it does not mix with the score lines."""
    print(f"warning: {visible(text)}", file=sys.stderr)


@dataclass
class Coverage:
    """How answers and questions fit together. The lists hold ids for messages; their lengths are the counts.

    expected: number of questions; scored: questions with an answer; missing: questions without one;
    duplicate: further answers to a question already answered (the last one counts); unmatched: answers to
    no known question.
    """

    expected: int = 0
    scored: int = 0
    missing: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.duplicate or self.unmatched)

    def to_dict(self) -> dict[str, int]:
        """Counts under flat keys for the JSON result."""
        return {
            "expected": self.expected,
            "scored": self.scored,
            "missing": len(self.missing),
            "duplicate": len(self.duplicate),
            "unmatched": len(self.unmatched),
        }

    def warnings(self, missing: str | None = LEFT_OUT) -> list[str]:
        """One line per kind of trouble; empty if every question has exactly one answer.

        missing: what is said of questions without an answer, behind their number; None says nothing.
        """
        lines = []
        for ids, text in (
            (self.missing if missing else [], (missing or "").format(expected=self.expected)),
            (self.duplicate, "answers repeat a question; the last answer counts"),
            (self.unmatched, "answers belong to no question and are ignored"),
        ):
            if ids:
                lines.append(f"{len(ids)} {text}: {shorten(ids)}")
        return lines

    def report(self, missing: str | None = LEFT_OUT) -> None:
        """Prints the `warnings`."""
        for line in self.warnings(missing):
            warn(line)


def load_answers(path: str, keep_torn: bool = False) -> list[dict[str, Any]]:
    """All answers of a LLaVA answer file; each has at least `question_id` and `text` (a string).

    A number or null as `text` is read as its string form, as json round trips of spreadsheets produce them.
    keep_torn: a last line that was cut off (a kill, a full disk) is left out with a warning instead of being an error;
    for scorers, which count the question as missing.
    """
    limit = _whole_bytes(path) if keep_torn else None
    answers = [
        as_answer(record, f"{path}:{number}") for number, record in iter_jsonl(path, "answer file", limit_bytes=limit)
    ]
    if limit is not None:
        warn(f"{path}: the last line is cut off and left out; the run is not finished")
    return answers


def as_answer(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A line of an answer file with its text as a string; a prompt that is null is none. `UserError` names `where`."""
    check(record, ANSWER, where)
    text = record["text"]
    answer = {**record, "text": text if isinstance(text, str) else "" if text is None else str(text)}
    if answer.get("prompt", "") is None:
        del answer["prompt"]
    return answer


def _whole_bytes(path: str) -> int | None:
    """Size of the whole lines before a last line that is cut off; None if the last line is whole, or the only one."""
    data = require_file(path, "answer file").read_bytes()
    end = data.rfind(b"\n") + 1
    if end in (0, len(data)):
        return None
    try:
        parse_line(data[end:], path, "answer file")
    except UserError:
        return end
    return None


def check_same_questions(result_file: str, texts: Mapping[str, str], answers: Sequence[dict[str, Any]]) -> None:
    """Ids can be the same in several benchmarks; what was asked is not.

    texts: id (as a string) -> text of the question; answers: `question_id` and, if they have one, `prompt`. Warns if
    prompts do not hold the question of the same id.

    Raises:
        UserError: no prompt does, and the ids do not fit either (half of them on one side have no partner).
    """
    pairs = [(texts[str(a["question_id"])], a.get("prompt")) for a in answers if str(a["question_id"]) in texts]
    known = [(_plain(text), _plain(prompt)) for text, prompt in pairs if isinstance(prompt, str)]
    known = [pair for pair in known if all(pair)]
    strange = sum(text not in prompt for text, prompt in known)
    if known and strange == len(known) and 2 * len(pairs) < max(len(answers), len(texts)):
        raise UserError(
            f"{result_file}: none of its prompts holds the question with the same id; answers of another benchmark?"
        )
    if strange:
        warn(f"{strange} of {len(known)} answers have a prompt that does not hold the question with the same id")


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def asks(prompt: str, question: str) -> bool:
    """True if `prompt` begins with `question`: what follows, an instruction or OCR tokens, does not identify a sample.

    Blanks, line breaks, case and placeholders of images do not count; the question has to end at the end of a word.
    """
    text, start = _plain(prompt.replace(DEFAULT_IMAGE_TOKEN, " ")), _plain(question)
    # Some releases carry a backslash and n where others have a line break: no letter of the question goes on there.
    return bool(start) and text.startswith(start) and not (start[-1].isalnum() and text[len(start) :][:1].isalnum())


class QuestionIndex:
    """Finds the known question that a prompt asks about a sample.

    known: pairs of what identifies the sample (an image, say) and the text of one of its questions.
    """

    def __init__(self, known: Iterable[tuple[Hashable, str]]) -> None:
        self._questions: dict[Hashable, dict[str, None]] = {}
        for sample, question in known:
            self._questions.setdefault(sample, {})[question] = None

    def find(self, sample: Hashable, prompt: str) -> str | None:
        """The question as it is known; of several that the prompt begins with the longest; None if there is none."""
        questions = self._questions.get(sample, {})
        if prompt in questions:
            return prompt
        return max((question for question in questions if asks(prompt, question)), key=len, default=None)


def join_answers(
    expected: Iterable[Key],
    answers: Iterable[dict[str, Any]],
    key: Callable[[dict[str, Any]], Key | None],
) -> tuple[dict[Key, str], Coverage]:
    """Maps each expected key to the text of its last answer: a later line is a rerun, and the published scorers that
    collect answers in a dictionary do the same.

    `key` computes an answer's key, or None if it has none. Returns the mapping in the order of `expected`
    and the coverage. Expected keys that occur twice are one question.
    """
    order = dict.fromkeys(expected)
    coverage = Coverage(expected=len(order))
    found: dict[Key, str] = {}
    for answer in answers:
        answer_key = key(answer)
        if answer_key is None or answer_key not in order:
            coverage.unmatched.append(str(answer["question_id"]))
            continue
        if answer_key in found:
            coverage.duplicate.append(str(answer["question_id"]))
        found[answer_key] = answer["text"]
    coverage.missing = [describe_key(item) for item in order if item not in found]
    coverage.scored = len(found)
    return {item: found[item] for item in order if item in found}, coverage


def describe_key(key: Hashable) -> str:
    """A key as text for messages: parts of a tuple are separated by a slash."""
    return " / ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def percent(values: Iterable[float]) -> float:
    """The mean of credits from 0 to 1, in percent; 0 where there is none."""
    values = list(values)
    return 100.0 * sum(values) / len(values) if values else 0.0


def require_joined(count: int, result_file: str, what: str) -> None:
    """Raises `UserError` if not a single answer could be scored. what: `a question of FILE`."""
    if not count:
        raise UserError(f"{result_file}: no answer belongs to {what}")


def conclude(coverage: Coverage, flat: Mapping[str, Any], path: str | None, missing: str | None = LEFT_OUT) -> None:
    """The end of every scorer: says what did not join, and writes the JSON result with the coverage if asked for."""
    coverage.report(missing)
    if path:
        write_json(path, {**flat, **coverage.to_dict()})
