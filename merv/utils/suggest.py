"""Did you mean …?: one place for suggestions in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest of `known`, with a leading space, or nothing.

    >>> nearest("siglp", ["dinov2", "siglip"])
    " Did you mean 'siglip'?"
    >>> nearest("nothing like it", ["dinov2"])
    ''
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""
