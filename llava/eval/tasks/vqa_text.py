"""The answer normalization and soft accuracy of VQA, as TextVQA, VQAv2 and VizWiz use them.

Rules: VQA evaluation (Antol et al. 2015, section on evaluation) in the
variant of the TextVQA evaluator, whose order of steps differs slightly from the original VQA tool.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
# The published expression also contains a look-ahead that was meant as a look-behind and can never fail;
# what is left of it: a period goes unless a digit follows.
_PERIOD = re.compile(r"\.(?!\d)")
# The published call passes a flag where `count` is expected, so only this many periods are deleted.
_MAX_PERIODS = 32

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})

# Contractions whose apostrophe may be missing in an answer. Absent on purpose, because without the
# apostrophe they are other words: he'll, I'd, I'll, it's, she'd, she'll, she's, we'd, we'll, we're.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, character in enumerate(word) if character == "'"]


_RESTORED = {variant: word for word in _CONTRACTIONS for variant in _without_one_apostrophe(word)}
# This entry of the published table goes the other way round.
_RESTORED["somebody'd"] = "somebodyd"


def normalize_answer(text: str) -> str:
    """The normal form in which answers are compared.

    Lower case, commas and question marks deleted, possessive 's split off, punctuation removed or blanked,
    number words as digits, articles dropped, apostrophes of contractions restored.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = _strip_punctuation(text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    # Whether a mark is deleted or becomes a blank is decided once per mark, on the text before any change:
    # touching a blank anywhere means deleting it everywhere.
    grouped_number = _COMMA_BETWEEN_DIGITS.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        touches_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches_blank or grouped_number else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def soft_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Agreement of one prediction with the human answers, 0 to 1; both sides are normalized here.

    Mean over the leave-one-out subsets of the references of min(1, matches / 3); the plain min(1, matches/3)
    over all references is a different, higher number.
    """
    target = normalize_answer(prediction)
    matches = [normalize_answer(reference) == target for reference in references]
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3.0) for own in matches) / len(matches)


def in_words(references: Sequence[str]) -> str:
    """What people answered, the most frequent first, with their numbers where they do not agree: `red (7), orange`."""
    counts = Counter(references).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{text} ({count})" if count > 1 else text for text, count in counts)
