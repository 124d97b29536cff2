"""From the text of an answer to a score. Pure functions: they know neither a model nor a benchmark.

An answer that is empty, refuses or cannot be parsed is wrong; it is never left out, and nothing is drawn at
random.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REASONING = re.compile(r"\A.*</think>|<think>.*\Z", re.DOTALL)  # some templates put <think> into the prompt
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# A capital letter that stands alone. Before most words, "A" and "I" are words of English and no letters.
# A letter in a list, such as "A or B", is not chosen.
VERBS = r"(?:is|was|because|since|as|seems|appears|if|which|that)\b"
LETTER = (
    rf"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI])[ \t]+(?!{VERBS})[A-Za-z])"
    r"(?!\W{0,3}(?:,|/|&|\bor\b|\band\b)\W{0,3}[A-Z](?![\w']))"
)
FILLERS = r"(?:\W+(?i:is|would|should|must|be|probably|likely|most|option|choice|letter|therefore))*\W{0,4}"
# From the surest form to the least sure one; the first that finds something decides.
FORMS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\A\W*([A-Za-z])\W*\Z",  # "b", "(B)", "B."
        r"\A\W*([A-Z])\W*\n",  # "B" in the first line
        r"\\boxed\{\W*([A-Z])\W*\}",
        rf"(?i:\banswer){FILLERS}{LETTER}",
        rf"(?i:\banswer){FILLERS}\(([a-z])\)",
        rf"(?i:\banswer){FILLERS}(?<![\w'])([a-z])\W*\Z",
        rf"^\W*{LETTER}[ \t]*[).:\]](?!\w)",  # "B. a dog", "(B) a dog"
        rf"(?i:\b(?:option|choice)){FILLERS}{LETTER}",
        rf"{LETTER}\W+(?:is|seems|appears)\W+(?:to be\W+)?(?:the\W+)?(?:right|correct|best|answer)\b",
        rf"\({LETTER}\)",
    )
)
# Around a letter that is not chosen: "not (A)", "rule out option A", "B is wrong"
REFUSED_BEFORE = re.compile(
    r"(?i)(?:\bnot|n't|rule out|rules out|eliminate|exclude)\W+(?:option|choice)?\W*\Z"
)
LISTED_BEFORE = re.compile(r"(?<![\w'])[A-Z]\W{0,3}(?:[,/&]|\bor\b|\band\b)\W{0,3}\Z")
REFUSED_AFTER = re.compile(
    r"(?i)\W*(?:is|was|are|seems)\W+(?:not|wrong|incorrect|false)\b|\W*(?:isn't|wasn't)"
)


def without_reasoning(text: str) -> str:
    """Remove what stands before </think>, or after a <think> that does not end.

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
        found = {
            match[1].upper()
            for match in form.finditer(text)
            if not REFUSED_BEFORE.search(text[: match.start(1)])
            and not LISTED_BEFORE.search(text[: match.start(1)])
            and not REFUSED_AFTER.match(text[match.end(1) :])
        }
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
    return without_reasoning(text) in {answer.strip() for answer in answers}


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
