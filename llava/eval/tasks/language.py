"""BLEU, ROUGE-L and CIDEr of answers with one reference each, as the evaluation of image captions defines them.

Formulas: Papineni et al. 2002 (BLEU over a corpus, no smoothing), Lin 2004 (ROUGE-L), Vedantam et al. 2015 (CIDEr-D).
Words are found by an expression of our own where the usual tools start a Java program, so that figures can differ a
little from published ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

MOST = 4
"""Longest n-grams."""
_WORD = re.compile(r"\w+(?:[.'-]\w+)*")
_BETA = 1.2  # weight of recall in ROUGE-L
_SIGMA = 6.0  # words of difference in length that CIDEr-D forgives


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation around them."""
    return _WORD.findall(text.lower())


def language_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`bleu_1` ... `bleu_4`, `rouge_l` (0 to 1) and `cider` (0 to 10) of a corpus; 0 where it is empty.

    CIDEr weighs words by how few references have them: in a corpus of one pair, or of equal references, it is 0.
    """
    pairs = [(words(answer), words(reference)) for answer, reference in zip(answers, references, strict=True)]
    scores = {f"bleu_{n}": value for n, value in enumerate(_bleu(pairs), 1)}
    rouge = [_rouge_l(*pair) for pair in pairs]
    return {**scores, "rouge_l": sum(rouge) / max(len(rouge), 1), "cider": _cider(pairs)}


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _bleu(pairs: Sequence[tuple[list[str], list[str]]]) -> list[float]:
    said = sum(len(answer) for answer, _ in pairs)
    wanted = sum(len(reference) for _, reference in pairs)
    brevity = math.exp(min(0.0, 1 - wanted / said)) if said else 0.0
    product, scores = 1.0, []
    for n in range(1, MOST + 1):
        matched = sum((_grams(answer, n) & _grams(reference, n)).total() for answer, reference in pairs)
        total = sum(max(len(answer) - n + 1, 0) for answer, _ in pairs)
        product *= matched / total if total else 0.0
        scores.append(product ** (1 / n) * brevity)
    return scores


def _rouge_l(answer: list[str], reference: list[str]) -> float:
    common = _common(answer, reference)
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous = 0
        for i, other in enumerate(second, 1):
            previous, row[i] = row[i], previous + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]


def _cider(pairs: Sequence[tuple[list[str], list[str]]]) -> float:
    if not pairs:
        return 0.0
    total = 0.0
    for n in range(1, MOST + 1):
        counts = [(_grams(answer, n), _grams(reference, n)) for answer, reference in pairs]
        documents = Counter(gram for _, reference in counts for gram in reference)
        for (answer, reference), (said, wanted) in zip(counts, pairs, strict=True):
            weights = [
                {gram: times * math.log(len(pairs) / max(documents[gram], 1)) for gram, times in side.items()}
                for side in (answer, reference)
            ]
            total += _similarity(*weights) * math.exp(-((len(said) - len(wanted)) ** 2) / (2 * _SIGMA**2))
    return 10 * total / (MOST * len(pairs))


def _similarity(answer: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Cosine in which a gram said too often counts as often as in the reference."""
    product = sum(min(weight, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, weight in answer.items())
    norms = [math.sqrt(sum(weight**2 for weight in side.values())) for side in (answer, reference)]
    return product / (norms[0] * norms[1]) if all(norms) else 0.0
