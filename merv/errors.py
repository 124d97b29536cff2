"""The exceptions of merv. All of them derive from MervError.

MervError
├── VideoError            a video, image or folder of frames, or an option for reading it, cannot be used
│   ├── UnreadableVideo   no frame can be decoded
│   └── DamagedVideo      some of the requested frames cannot be decoded
├── SamplingError         the requested times do not fit the clip
├── ShapeError            a tensor has a wrong shape, or an option of preprocessing or fusion is invalid
├── PluginError           a plug-in cannot be found, loaded or trusted, or does not accept an option
│   ├── UnknownPlugin     no plug-in has this name
│   ├── AmbiguousPlugin   several distributions register this name
│   └── BrokenPlugin      a plug-in cannot be imported or created, or does not satisfy its contract
├── EncoderError          an encoder or one of its options is invalid, or its output does not match its spec
├── WeightsError          weights cannot be found or read, do not fit, or cannot be used as asked
├── CheckpointError       a saved folder cannot be written, uploaded or read, or does not fit the model
├── PromptError           messages, tokenizer or options of generate() do not give a usable prompt
├── TrainingError         the training options do not fit the model, the data or each other
│   └── BadLoss           a loss is not finite, or is a spike
├── DataError             a training or evaluation sample, or a feature store, is invalid
└── MissingDependency     an optional package is not installed

Each message says what merv got, what it expected and what to try.
"""


class MervError(Exception):
    """Base class of all exceptions of merv."""


class VideoError(MervError):
    """A video, image or folder of frames, or an option for reading it, cannot be used."""


class UnreadableVideo(VideoError):
    """No frame of a video can be decoded."""


class DamagedVideo(VideoError):
    """Some of the requested frames of a video cannot be decoded."""


class SamplingError(MervError, ValueError):
    """The requested times do not fit the clip."""


class ShapeError(MervError, ValueError):
    """A tensor has a wrong shape, or an option of preprocessing, alignment or fusion is invalid."""


class PluginError(MervError):
    """A plug-in cannot be found, loaded or trusted, or does not accept an option."""


class UnknownPlugin(PluginError, KeyError):
    """No plug-in has this name."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class AmbiguousPlugin(PluginError):
    """Several distributions register a plug-in with this name."""


class BrokenPlugin(PluginError):
    """A plug-in cannot be imported or created, or does not satisfy its contract."""


class EncoderError(MervError):
    """An encoder or one of its options is invalid, or its output does not match its spec."""


class WeightsError(MervError):
    """Weights cannot be found or read, do not fit the module, or cannot be used as asked."""


class CheckpointError(MervError):
    """A saved folder cannot be written, uploaded or read, or does not fit the model."""


class PromptError(MervError, ValueError):
    """Messages, tokenizer or options of `generate` do not give a usable prompt."""


class TrainingError(MervError, ValueError):
    """The training options do not fit the model, the data or each other."""


class BadLoss(TrainingError):
    """A loss is not finite, or is a spike. The message names the samples."""


class DataError(MervError):
    """A training or evaluation sample is invalid, or a feature store or its folder cannot be used."""


class MissingDependency(MervError, ImportError):
    """An optional package is not installed. The message has the command that installs it."""
