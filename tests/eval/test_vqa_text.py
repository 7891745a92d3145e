"""Answer normalization and soft accuracy against cases worked out by hand from the rules."""

import pytest

from llava.eval.tasks.vqa_text import normalize_answer, soft_accuracy


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("  The Dakota Digital ", "dakota digital"),
        ("Two dogs, a cat?", "2 dogs cat"),  # number word, comma and question mark deleted, article dropped
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("men's", "men 's"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("its", "its"),  # would be another word with an apostrophe
        ("somebody'd", "somebodyd"),
        ("self-righteous", "self righteous"),  # the hyphen touches no blank: it becomes one
        ("self -righteous", "self righteous"),  # it touches one: it goes
        ("a-b c- d", "ab c d"),  # decided once for all occurrences of the mark: "a-b" loses its hyphen too
        ("3.50", "3.50"),  # a period before a digit stays
        ("mr. smith.", "mr smith"),
        (".5", ".5"),
        ("line\none\ttwo", "line 1 2"),
        ("1,000", "1000"),
        ("yes/no", "yes no"),
        ("", ""),
        ("the", ""),
        ("(hello)", "hello"),
    ],
)
def test_normal_form(raw, normal):
    assert normalize_answer(raw) == normal


def test_only_the_first_32_periods_are_deleted():
    assert normalize_answer("x." * 40) == "x" * 32 + "x." * 8


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leave_one_out_mean_over_ten_answers(matches, score):
    """1 match: nine subsets contain it, 9 * 1/3 / 10 = 0.3; 3 matches: (7 * 1 + 3 * 2/3) / 10 = 0.9."""
    references = ["Seven"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert soft_accuracy("7", references) == pytest.approx(score, abs=1e-12)
