"""merv fuses several frozen visual encoders into one video language model.

>>> import torch
>>> from merv import MultiEncoder
>>> video = MultiEncoder(["fake"])(torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
>>> video.tokens.shape
torch.Size([1, 1024, 8])

Names are imported on first use, so that `import merv` is fast.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merv.encoding.base import Encoder as Encoder
    from merv.encoding.registry import create_encoder as create_encoder
    from merv.encoding.registry import find_encoder as find_encoder
    from merv.encoding.registry import list_encoders as list_encoders
    from merv.errors import MervError as MervError
    from merv.features.dataset import FeatureDataset as FeatureDataset
    from merv.features.store import FeatureStore as FeatureStore
    from merv.fusion.align import Aligner as Aligner
    from merv.fusion.fusion import Fusion as Fusion
    from merv.fusion.mixers import Mixer as Mixer
    from merv.fusion.mixers import WeightingMixer as WeightingMixer
    from merv.fusion.projectors import Projector as Projector
    from merv.models.chat import user_message as user_message
    from merv.models.multi_encoder import MultiEncoder as MultiEncoder
    from merv.models.video_llm import VideoLLM as VideoLLM
    from merv.types import EncoderSpec as EncoderSpec
    from merv.types import Frames as Frames
    from merv.types import Fused as Fused
    from merv.types import Grid as Grid
    from merv.types import Preset as Preset
    from merv.types import VideoInfo as VideoInfo
    from merv.video.load import load_video as load_video
    from merv.video.sampling import Sampling as Sampling
    from merv.video.transforms import preprocess as preprocess

_MODULES = {
    "Aligner": "merv.fusion.align",
    "Encoder": "merv.encoding.base",
    "EncoderSpec": "merv.types",
    "FeatureDataset": "merv.features.dataset",
    "FeatureStore": "merv.features.store",
    "Frames": "merv.types",
    "Fused": "merv.types",
    "Fusion": "merv.fusion.fusion",
    "Grid": "merv.types",
    "MervError": "merv.errors",
    "Mixer": "merv.fusion.mixers",
    "MultiEncoder": "merv.models.multi_encoder",
    "Preset": "merv.types",
    "Projector": "merv.fusion.projectors",
    "Sampling": "merv.video.sampling",
    "VideoInfo": "merv.types",
    "VideoLLM": "merv.models.video_llm",
    "WeightingMixer": "merv.fusion.mixers",
    "create_encoder": "merv.encoding.registry",
    "find_encoder": "merv.encoding.registry",
    "list_encoders": "merv.encoding.registry",
    "load_video": "merv.video.load",
    "preprocess": "merv.video.transforms",
    "user_message": "merv.models.chat",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name == "__version__":
        return version("merv")
    raise AttributeError(f"module 'merv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
