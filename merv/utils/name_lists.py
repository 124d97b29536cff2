"""Options that take a list of names, and also accept a single name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merv.errors import TrainingError


def tuple_of_names(names: Sequence[str] | str, option: str) -> tuple[str, ...]:
    """Return names as a tuple; a string is a single name.

    Raises:
        TrainingError: A name has a bracket, comma or space, so it is a misspelled list.

    >>> tuple_of_names("lora", "model.trainable")
    ('lora',)
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if re.search(r"[\[\]{}(),\s]", str(name)):
            raise TrainingError(
                f"{option}: expected a name or a list of names; got {name!r}. Write a list as [a, b]; on the "
                f"command line, in quotes: '--{option}=[a, b]'."
            )
    return names
