"""From the text of an answer to a score. Pure functions: they know neither a model nor a benchmark.

An answer that is empty, refuses or cannot be parsed is wrong; it is never left out, and nothing is drawn at
random.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REASONING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# A capital letter that stands alone. "A" and "I" before a word in small letters are that word of English.
LETTER = r"(?<![\w'])([A-Z])(?![\w'])"
NO_WORD = r"(?<![AI](?=\s[a-z]))(?!(?<=[AI])\s+[a-z])"
# From the surest form to the least sure one; the first that finds something decides.
FORMS = tuple(
    re.compile(pattern)
    for pattern in (
        r"^\W*([A-Za-z])\W*$",  # "b", "(B)", "B."
        rf"(?i:answer)\W*(?i:(?:is|would be)\W*)?(?i:option\W*)?{LETTER}{NO_WORD}",
        r"^\W*([A-Z])\s*[).:\]](?!\w)(?!.*\([A-Z]\))",  # "B. a dog", "(B) a dog"
        rf"(?i:option|choice)\W*(?i:is\W*)?{LETTER}{NO_WORD}",
        rf"{LETTER}\W+(?i:is|seems|appears)\W+(?i:right|correct|the)",  # "D is right"
        r"\(([A-Z])\)",
    )
)


def without_reasoning(text: str) -> str:
    """Remove what stands between <think> and </think>.

    >>> without_reasoning("<think>A or B?</think> B")
    'B'
    """
    return REASONING.sub("", text).strip()


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """Find the option that an answer chooses.

    An answer chooses an option by its letter or by its text. An answer that names several letters in the same
    form, or none, chooses nothing.

    Args:
        text: The answer.
        options: Texts of the options, with or without "A. " in front.

    Returns:
        Number of the option, or None.

    Example:
        >>> options = ["a dog", "a cat", "a man opens a door"]
        >>> [parse_choice(text, options) for text in ("B", "(c)", "A man opens a door.", "", "(")]
        [1, 2, 2, None, None]
    """
    text = without_reasoning(text)
    texts = [normalize(re.sub(r"^\W*[A-Z]\s*[).:]\s*", "", option)) for option in options]
    answer = normalize(text)
    if answer and texts.count(answer) == 1:
        return texts.index(answer)
    for form in FORMS:
        found = {letter.upper() for letter in form.findall(text)}
        if found:
            number = LETTERS.index(found.pop())
            return None if found or number >= len(options) else number
    named = [number for number, option in enumerate(texts) if option and f" {option} " in f" {answer} "]
    # "a red car" also names "car", if both are options
    longest = [n for n in named if not any(m != n and f" {texts[n]} " in f" {texts[m]} " for m in named)]
    return longest[0] if len(longest) == 1 else None


def normalize(text: str) -> str:
    """An answer in small letters, without punctuation, articles and repeated spaces.

    >>> normalize("The  man's dog.")
    'man s dog'
    """
    words = re.sub(r"[^\w\s]|_", " ", without_reasoning(text).lower())
    return " ".join((ARTICLES.sub(" ", words).split()) or words.split())  # "A" may be an answer


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer equals one of the right ones, apart from spaces around it."""
    return text.strip() in {answer.strip() for answer in answers}


def normalized_match(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer equals one of the right ones after `normalize`. An empty answer equals none.

    >>> normalized_match("The dog.", ["dog"]), normalized_match(".", ["!"])
    (True, False)
    """
    return normalize(text) in {normalize(answer) for answer in answers} - {""}


def token_f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, for the right answer that fits best.

    Source: the F1 of SQuAD, arXiv 1606.05250.

    >>> token_f1("a brown dog", ["the dog", "a cat"])
    0.6666666666666666
    """
    words = Counter(normalize(text).split())

    def f1(answer: str) -> float:
        expected = Counter(normalize(answer).split())
        common = (words & expected).total()
        return 2 * common / (words.total() + expected.total()) if common else 0.0

    return max(map(f1, answers), default=0.0)
