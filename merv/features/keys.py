"""What features depend on: the content of the video, and everything about the encoder and the pipeline."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sys
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from io import TextIOBase
from pathlib import Path
from secrets import token_hex
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import values_digest
from merv.errors import DataError, EncoderError, UnreadableVideo
from merv.features.shard import KEY_VERSION
from merv.features.stored import StoredEncoder
from merv.fusion.align import Aligner
from merv.utils.files import file_digest, stream_digest, view_of
from merv.utils.plugins import class_path
from merv.utils.private import version_of
from merv.utils.torch_modules import device_and_dtype
from merv.video.open import open_video, original_of, path_of
from merv.video.reader import BACKENDS
from merv.video.sampling import Sampling
from merv.video.transforms import Resample

version = cache(metadata.version)  # it reads files
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Encoder → (state of its tensors, digest of its weights)
DIGESTS: WeakKeyDictionary[Encoder, tuple[list[Any], str]] = WeakKeyDictionary()
OBJECTS: WeakKeyDictionary[Encoder, str] = WeakKeyDictionary()  # names that no other object has


def feature_cache_key(
    encoder: Encoder,
    num_frames: int | None,
    sampling: Sampling,
    aligner: Aligner,
    backend: str,
    resample: Resample,
) -> str:
    """Describe everything that an encoder's aligned features depend on, except the video.

    Args:
        encoder: The encoder, with its final weights and dtype.
        num_frames: Number of frames per video; None for that of the encoder's spec.
        sampling: How times are chosen. The range is not part of the key; see `range_of`.
        aligner: The aligner.
        backend: Decoding backend.
        resample: How frames are resized.

    Returns:
        A JSON text, which is hashed together with the content of the video.

    Raises:
        EncoderError: The aligner is a custom one; merv does not know what its output depends on.
    """
    if isinstance(encoder, StoredEncoder):
        return encoder.options
    if type(aligner) is not Aligner:
        raise EncoderError(
            f"Features of the custom aligner {type(aligner).__name__} cannot be stored. Use merv.Aligner, "
            "or do not pass a store."
        )
    hash_values = encoder.modified or encoder.identity.sha256 is None  # the identity does not describe them
    spec, preset = encoder.spec, encoder.preset
    encoder_class: Any = type(encoder)
    key = {
        "version": KEY_VERSION,
        "class": class_path(encoder_class),
        "code": code_digest(encoder_class),
        # The effect of other arguments is not known, so no other object has these features
        "object": OBJECTS.setdefault(encoder, token_hex(16)) if own_arguments(encoder_class) else None,
        "weights": weights_digest(encoder) if hash_values else encoder.identity.sha256,
        "dtype": str(device_and_dtype(encoder)[1]),
        "variant": [
            encoder.variant,
            spec.layer,
            spec.grid,
            spec.embed_dim,
            spec.window_size,
            spec.tubelet_size,
        ],
        "frames": spec.num_frames if num_frames is None else num_frames,
        "rate": spec.fps if num_frames is None else None,
        "crop": [preset.crop_mode, preset.input_size, preset.resize_short_side, preset.center],
        "resize": [preset.interpolation, resample, version("pillow")],  # Pillow versions differ
        "normalization": [preset.mean, preset.std],
        "decoder": [(package, version(package)) for package in BACKENDS[backend]],
        "sampling": [sampling.mode, sampling.fps, sampling.seed, sampling.total],  # the range: `range_of`
        "aligner": (aligner.grid, aligner.grid and aligner.mode),
    }
    return json.dumps(key, sort_keys=True, default=str)


# Weights and code -----------------------------------------------------------------------------


def weights_digest(encoder: Encoder) -> str:
    """Return a hash of an encoder's weights; it is recomputed only if they were modified or moved."""
    tensors = encoder.state_dict(keep_vars=True).values()
    state = [(t.data_ptr(), t.dtype, version_of(t)) for t in tensors]
    if encoder not in DIGESTS or DIGESTS[encoder][0] != state:
        DIGESTS[encoder] = state, values_digest(encoder)
    return DIGESTS[encoder][1]


def own_arguments(encoder_class: type[Encoder]) -> list[str]:
    """Names of the arguments of a constructor that `Encoder` does not have.

    >>> from merv.encoders.fake import Fake
    >>> own_arguments(Fake)
    []
    """
    parameters = inspect.signature(encoder_class.__init__).parameters.values()
    known = {"self", *inspect.signature(Encoder.__init__).parameters}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.name not in known and p.kind not in variadic]


@cache
def code_digest(encoder_class: type[Encoder]) -> str:
    """Return a hash of the code that an encoder class consists of, so that edited code has other features.

    It covers the module of the class, those of its base classes, and what they import from the same package,
    without comments and docstrings. `KEY_VERSION` covers merv itself. A class whose code is in no file, such
    as one from an interactive session, gets a hash that no other process has.

    >>> from merv.encoders.fake import Fake
    >>> len(code_digest(Fake))
    16
    """
    modules: dict[str, str] = {}
    for owner in encoder_class.__mro__[: encoder_class.__mro__.index(Encoder)]:
        if not _collect(owner.__module__, modules):
            return token_hex(8)  # kept by `cache`
    return hashlib.sha256(json.dumps(modules, sort_keys=True).encode()).hexdigest()[:16]


def _collect(name: str, modules: dict[str, str]) -> bool:
    """Add the digest of a module, and those of the modules of its own package that it imports.

    Returns False if there is no source file.
    """
    if name in modules:
        return True
    path = _source_file(name)
    if path is None:
        return False
    modules[name], imported = _parsed(path, os.stat(path).st_mtime_ns, name)
    for other in imported:
        if _package(other) == _package(name):
            _collect(other, modules)
    return True


def _source_file(name: str) -> str | None:
    module = sys.modules.get(name)
    try:
        spec = find_spec(name) if module is None else None
    except (ImportError, ValueError):
        return None
    path = getattr(module, "__file__", None) if module is not None else spec and spec.origin
    return path if isinstance(path, str) and path.endswith(".py") and os.path.isfile(path) else None


def _package(module: str) -> str:
    """The package whose code counts as an encoder's own: the top one, but merv.encoders for merv's own."""
    top, _, rest = module.partition(".")
    return f"merv.{rest.partition('.')[0]}" if top == "merv" else top


@cache
def _parsed(path: str, modified_ns: int, name: str) -> tuple[str, frozenset[str]]:
    """The digest of a source file without comments and docstrings, and the names that it may import."""
    tree = ast.parse(Path(path).read_bytes())
    parts, imported = name.split("."), set()
    is_package = os.path.basename(path) == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            imported |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        has_docstring = isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None
        if has_docstring:
            node.body = node.body[1:]  # type: ignore[attr-defined]
    return hashlib.sha256(repr(_content(tree)).encode()).hexdigest(), frozenset(imported)


def _content(node: Any) -> Any:
    """A syntax tree as nested tuples, without empty fields: versions of Python differ in those."""
    if isinstance(node, ast.AST):
        fields = ((name, _content(value)) for name, value in ast.iter_fields(node))
        return type(node).__name__, *(field for field in fields if field[1] not in (None, ()))
    return tuple(map(_content, node)) if isinstance(node, list) else node


# Videos ---------------------------------------------------------------------------------------


def content_digest(video: Any) -> str:
    """Return a hash of the content of a video: the bytes of a file, tensor or array.

    Raises:
        UnreadableVideo: A path cannot be read.
        DataError: The object has no content, or it can be read only once.
    """
    video = original_of(video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return hashlib.sha256(video).hexdigest()
    if isinstance(video, (str, os.PathLike)):
        return _path_digest(path_of(video))
    if isinstance(video, np.ndarray):
        video = torch.from_numpy(np.array(video, order="C"))  # torch does not support negative strides
    if isinstance(video, Tensor):
        pixels = video.cpu().contiguous()
        header = f"{pixels.dtype}{tuple(pixels.shape)}".encode()
        return hashlib.sha256(header + pixels.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    # A PIL image, as decoded with its palette and orientation.
    if hasattr(type(video), "__array_interface__"):
        with open_video(video) as reader:
            return content_digest(reader.read([0]))
    if getattr(video, "seekable", lambda: False)() and not isinstance(video, TextIOBase):
        return stream_digest(view_of(video))
    raise DataError(
        f"Cannot store features of a {type(video).__name__}: its content cannot be hashed, or can be "
        "read only once. Pass a path or bytes."
    )


def _path_digest(path: Path) -> str:
    """Return a hash of the bytes of a file, or of the names and bytes of the files in a folder."""
    try:
        if not path.is_dir():
            return file_digest(path)
        files = sorted(p for p in path.iterdir() if p.is_file())
        digests = [f"{file.name} {file_digest(file)}" for file in files]
    except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
        raise UnreadableVideo(f"{path}: {getattr(error, 'strerror', None) or error}.") from error
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def source_name(video: Any) -> str:
    """The path or name of a video, for listings; empty if it has none. Bytes that are not UTF-8 are escaped.

    >>> source_name("clips/a.mp4"), source_name(b"...")
    ('clips/a.mp4', '')
    """
    original = original_of(video)
    name = original if isinstance(original, (str, os.PathLike)) else getattr(original, "name", "")
    return printable(os.fspath(name)) if isinstance(name, (str, os.PathLike)) else ""


def range_of(sampling: Sampling) -> str:
    """The range that is sampled, as it is appended to the hash and the name of a video; empty for all of it.

    >>> range_of(Sampling(start_s=10, end_s=12.5)), range_of(Sampling(start_s=10)), range_of(Sampling())
    ('@10-12.5', '@10-', '')
    """
    if not sampling.start_s and sampling.end_s is None:
        return ""
    start_s, end_s = (f"{s:.6f}".rstrip("0").rstrip(".") for s in (sampling.start_s, sampling.end_s or 0.0))
    return f"@{start_s}-{end_s if sampling.end_s else ''}"


def printable(name: str | bytes) -> str:
    """A name as text that can be encoded: bytes that are not UTF-8 are escaped.

    >>> len(printable(b"\\xff.mp4"))
    10
    """
    return os.fsdecode(name).encode("utf-8", "backslashreplace").decode()
