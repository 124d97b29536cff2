"""What authors of plug-ins run, and the tiny parts that tests and bug reports use.

>>> from merv.testing import check_encoder
>>> all(finding.passed for finding in check_encoder("fake"))
True

Names are loaded on first use, so that `python -m merv.testing.side_effects` starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merv.testing.conformance import check_encoder as check_encoder
    from merv.testing.conformance import check_mixer as check_mixer
    from merv.testing.conformance import check_projector as check_projector
    from merv.testing.conformance import contract_test as contract_test
    from merv.testing.findings import Finding as Finding
    from merv.testing.tiny import make_video as make_video
    from merv.testing.tiny import tiny_llm as tiny_llm

_HOME = {
    "Finding": "merv.testing.findings",
    "check_encoder": "merv.testing.conformance",
    "check_mixer": "merv.testing.conformance",
    "check_projector": "merv.testing.conformance",
    "contract_test": "merv.testing.conformance",
    "make_video": "merv.testing.tiny",
    "tiny_llm": "merv.testing.tiny",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'merv.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__]
