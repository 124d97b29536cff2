"""From the text of an answer to a score."""

import pytest

from merv.evaluation.answers import exact_match, normalized_match, parse_choice, token_f1

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
        ("Maybe the answer is A? No, it purrs.</think>\n\nB", 1),
        ("B\n\nExplanation: At the start, a dog is visible.", 1),
        ("B) a cat because (A) is wrong", 1),
        ("\\boxed{B}", 1),
        ("The answer is (b).", 1),
        ("answer: b", 1),
        ("The answer should be B", 1),
        ("The answer is probably B.", 1),
        ("The answer is A because it barks.", 0),
        ("Answer: A\nthe video shows a cat", 0),
        ("Option B is incorrect. The answer is A.", 0),
        ("A is the correct answer.", 0),
        # Nothing is chosen
        ("A. a dog\nB. a cat\nC. a man opens a door", None),
        ("(A) a dog\n(B) a cat", None),
        ("The answer is not (A).", None),
        ("Option B is incorrect.", None),
        ("I would rule out option A, so maybe.", None),
        ("Person B is the one.", None),
        ("Answer: A, B", None),
        ("Answer: A/B", None),
        ("", None),
        ("(", None),
        (")", None),
        ("   ", None),
        ("A man walks.", None),
        ("The answer is A man walking", None),
        ("The answer is A Fish", None),
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


def test_reasoning_is_no_part_of_an_answer():
    assert exact_match("<think>cat?</think> dog", ["dog"])
    assert normalized_match("cat?</think> Dog.", ["dog"])


def test_empty_answers_match_nothing():
    assert not normalized_match("", [""])
    assert normalized_match("A.", ["a"])
    assert token_f1("", ["dog"]) == 0
    assert token_f1("dog", []) == 0
