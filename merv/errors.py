"""Everything that merv raises for something a user can cause.

MervError
├── VideoError            a video, image or folder of frames cannot be used
│   ├── UnreadableVideo   nothing could be decoded from it
│   └── DamagedVideo      some frames could be decoded, not all that were wanted
├── SamplingError         the times asked for do not fit the clip
├── ShapeError            a tensor has another shape than its contract says
├── PluginError           a plug-in cannot be found, loaded or trusted, or has no such option
│   ├── UnknownPlugin     no encoder, mixer … of that name; the nearest is suggested
│   ├── AmbiguousPlugin   two distributions register that name
│   └── BrokenPlugin      it is there but does not load or keep its contract
├── EncoderError          an encoder cannot do what it is asked, or makes what its spec does not say
├── WeightsError          weights are missing, or do not fit the module
├── CheckpointError       a saved folder does not fit what it is loaded into
├── PromptError           chat messages cannot be turned into a prompt
├── TrainingError         what shall be trained, or how, does not fit the model
│   └── BadLoss           a loss is no number, or a spike
├── DataError             a training or evaluation sample is malformed
└── MissingDependency     an optional package is needed; the message has the command

Every message says what came, what was wanted and what to try.
"""


class MervError(Exception):
    """Root of the tree above."""


class VideoError(MervError):
    """A video, image or folder of frames cannot be used; the message names it."""


class UnreadableVideo(VideoError):
    """Nothing could be decoded."""


class DamagedVideo(VideoError):
    """Some frames could be decoded, but not all that were wanted."""


class SamplingError(MervError, ValueError):
    """The times asked for do not fit the clip."""


class ShapeError(MervError, ValueError):
    """A tensor has another shape than its contract says."""


class PluginError(MervError):
    """A plug-in cannot be found, loaded or trusted, or has no such option."""


class UnknownPlugin(PluginError, KeyError):
    """No plug-in of that name."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class AmbiguousPlugin(PluginError):
    """Two distributions register the same name."""


class BrokenPlugin(PluginError):
    """A registered plug-in does not load, or does not keep its contract."""


class EncoderError(MervError):
    """An encoder cannot do what it is asked, or makes what its spec does not say."""


class WeightsError(MervError):
    """Weights are missing, unreachable, or do not fit the module."""


class CheckpointError(MervError):
    """A saved folder does not fit what it is loaded into."""


class PromptError(MervError, ValueError):
    """Chat messages cannot be turned into a prompt."""


class TrainingError(MervError, ValueError):
    """What shall be trained, or how, does not fit the model."""


class BadLoss(TrainingError):
    """A loss that is not to be learned from; the message names the samples."""


class DataError(MervError):
    """A training or evaluation sample is malformed."""


class MissingDependency(MervError, ImportError):
    """An optional package is needed; the message has the install command."""
