"""Private names of other libraries that merv uses, in one place.

Each section says why the name is needed, what happens without it, and which versions it was tested with.
"""

from __future__ import annotations

from torch import Tensor

# torch: Tensor._version ------------------------------------------------------------------------
#
# Why: the number of in-place writes to a tensor shows that weights have changed without hashing them.
# torch documents it for autograd only ("in-place correctness checks") and has no public name for it.
# Without it: features of a modified encoder would be stored under the key of the original weights.
# Tested with: torch 2.15.


def version_of(tensor: Tensor) -> int:
    """Number of in-place writes to a tensor, except writes through `tensor.data`.

    It is 0 for a tensor that was created in inference mode: torch does not count its writes.
    """
    try:
        return tensor._version
    except RuntimeError:
        return 0
