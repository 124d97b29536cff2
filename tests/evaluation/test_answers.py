"""From the text of an answer to a score."""

import pytest

from merv.evaluation.answers import normalized_match, parse_choice, token_f1

ANIMALS = ["a dog", "a cat", "a man opens a door", "a red car", "car"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1),
        (" B", 1),
        ("b.", 1),
        ("(B)", 1),
        ("B)", 1),
        ("**B**", 1),
        ("B. a cat", 1),
        ("(B) a cat", 1),
        ("B: because it purrs", 1),
        ("Answer: B", 1),
        ("The answer is A", 0),
        ("The answer is (A).", 0),
        ("The correct answer is option C", 2),
        ("Best option:(B", 1),
        ("Because of the video, the answer: A", 0),
        ("Based on the video, D is right", 3),
        ("Option A is wrong; the answer is B.", 1),
        ("I think that it is (C), as he opens it", 2),
        ("<think>A? No, the answer is A.</think>B", 1),
        ("A man opens a door", 2),
        ("a man opens the door.", 2),
        ("It is a cat.", 1),
        ("It is a red car.", 3),
        ("It is a car.", 4),
        # Nothing is chosen
        ("", None),
        ("(", None),
        (")", None),
        ("   ", None),
        ("A man walks.", None),
        ("The answer is A man walking", None),
        ("I cannot answer this.", None),
        ("A or B", None),
        ("(A) or (B)", None),
        ("The answer is A. No, the answer is B.", None),
        ("F", None),
        ("It is a dog and a cat", None),
        ("<think>B", None),
        ("Don't know", None),
    ],
)
def test_answers_choose_an_option(text, expected):
    assert parse_choice(text, ANIMALS) == expected


def test_options_may_carry_their_letters():
    options = ["A. Yes. He does.", "B. No. He does not."]
    assert parse_choice("No. He does not.", options) == 1
    assert parse_choice("A. Yes", options) == 0


def test_equal_options_are_not_told_apart_by_their_text():
    assert parse_choice("a dog", ["a dog", "a dog"]) is None
    assert parse_choice("B", ["a dog", "a dog"]) == 1


def test_empty_answers_match_nothing():
    assert not normalized_match("", [""])
    assert normalized_match("A.", ["a"])
    assert token_f1("", ["dog"]) == 0
    assert token_f1("dog", []) == 0
