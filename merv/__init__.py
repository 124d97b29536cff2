"""merv: any set of frozen visual encoders into any language model.

>>> from merv import MultiEncoder
>>> video = MultiEncoder(["fake"])(torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
>>> video.tokens.shape
torch.Size([1, 1024, 8])

Names are loaded on first use, so that `import merv` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merv.align import Aligner as Aligner
    from merv.chat import ask as ask
    from merv.encode import Encoder as Encoder
    from merv.errors import MervError as MervError
    from merv.fuse import Fusion as Fusion
    from merv.load import load_video as load_video
    from merv.multi_encoder import MultiEncoder as MultiEncoder
    from merv.preprocessing import preprocess as preprocess
    from merv.registry import create_encoder as create_encoder
    from merv.registry import find_encoder as find_encoder
    from merv.registry import list_encoders as list_encoders
    from merv.sample import Sampling as Sampling
    from merv.store import FeatureStore as FeatureStore
    from merv.types import EncoderSpec as EncoderSpec
    from merv.types import Frames as Frames
    from merv.types import Fused as Fused
    from merv.types import Grid as Grid
    from merv.types import Preset as Preset
    from merv.types import VideoInfo as VideoInfo
    from merv.video_llm import VideoLLM as VideoLLM

_HOME = {
    "Aligner": "merv.align",
    "Encoder": "merv.encode",
    "EncoderSpec": "merv.types",
    "FeatureStore": "merv.store",
    "Frames": "merv.types",
    "Fused": "merv.types",
    "Fusion": "merv.fuse",
    "Grid": "merv.types",
    "MervError": "merv.errors",
    "MultiEncoder": "merv.multi_encoder",
    "Preset": "merv.types",
    "Sampling": "merv.sample",
    "VideoInfo": "merv.types",
    "VideoLLM": "merv.video_llm",
    "ask": "merv.chat",
    "create_encoder": "merv.registry",
    "find_encoder": "merv.registry",
    "list_encoders": "merv.registry",
    "load_video": "merv.load",
    "preprocess": "merv.preprocessing",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "__version__":
        return version("merv")
    raise AttributeError(f"module 'merv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
