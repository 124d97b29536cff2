"""Load torch's distributed checkpoints without running code that they contain.

torch unpickles the `.metadata` of such a checkpoint and its values that are not tensors, without limits.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from merv.errors import CheckpointError

ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),  # and dtypes
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}


def load(state: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    """Fill a state dict from a checkpoint, in place.

    Raises:
        CheckpointError: The checkpoint is damaged, or needs code to be run.
    """
    try:
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=no_dist)
    except (Exception, CheckpointException) as error:  # damaged files raise errors of many types
        raise CheckpointError(
            f"{folder} could not be read: {_reason(error)}. Use an earlier checkpoint."
        ) from error


def read_metadata(folder: Path) -> Metadata:
    """Read which tensors a checkpoint has.

    Raises:
        CheckpointError: The file is damaged, or needs code to be run.
    """
    return _Reader(folder).read_metadata()


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path, ".metadata")
        try:
            metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
            if not isinstance(metadata, Metadata):
                raise ValueError(f"it holds a {type(metadata).__name__}")
        except Exception as error:  # damaged pickles raise errors of many types
            raise CheckpointError(f"{file} could not be read: {error}. Use an earlier checkpoint.") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Creates the classes of ALLOWED only."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it needs {module}.{name}, which merv does not run")


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises an error if the bytes need more than plain values
        value.seek(0)
        super().load_bytes(read_item, value)


def _reason(error: BaseException) -> str:
    """The first line of an error; that of the first process if it comes from several."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return (str(first).strip() or type(first).__name__).splitlines()[0]
