"""Suggestions for misspelled names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the most similar known name; it starts with a space. Empty if none is similar.

    >>> nearest("siglp", ["dinov2", "siglip"])
    " Did you mean 'siglip'?"
    >>> nearest("nothing like it", ["dinov2"])
    ''
    """
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
