"""Checks for plug-in authors, and a tiny language model and video for tests and bug reports.

>>> from merv.testing import check_encoder
>>> all(result.passed for result in check_encoder("fake"))
True
"""

from merv.testing.conformance import check_encoder, check_mixer, check_projector
from merv.testing.results import CheckResult
from merv.testing.tiny import make_video, tiny_llm

__all__ = [
    "CheckResult",
    "check_encoder",
    "check_mixer",
    "check_projector",
    "make_video",
    "tiny_llm",
]
