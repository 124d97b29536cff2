"""What can be done with stored features: listings, embeddings, neighbors, and files for other programs."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from merv.errors import DataError, MissingDependency
from merv.features.dataset import StoredVideo, videos_of
from merv.features.keys import content_digest
from merv.features.store import FeatureStore
from merv.fusion.align import cell_edges
from merv.types import Grid
from merv.utils.files import new_folder, temporary_beside

VIDEOS_PER_TAR = 1000
ROWS_AT_ONCE = 1000  # rows of a table that are held in memory


# Embeddings -----------------------------------------------------------------------------------


def pooled(grid: Grid, per_step: bool = False) -> Tensor:
    """The mean over the valid cells of a video: [D], or [t, D] with `per_step`. NaN where there is none.

    >>> mask = torch.ones(1, 2, 1, 1, dtype=torch.bool)
    >>> grid = Grid(torch.ones(1, 2, 1, 1, 3), torch.zeros(1, 2), torch.zeros(1, 4), mask)
    >>> pooled(grid).tolist(), pooled(grid, per_step=True).shape
    ([1.0, 1.0, 1.0], torch.Size([2, 3]))
    """
    mask = grid.mask[0, ..., None].float()
    values = torch.where(grid.mask[0, ..., None], grid.values[0].float(), 0.0)
    axes = (1, 2) if per_step else (0, 1, 2)
    return values.sum(axes) / mask.sum(axes)


def embeddings(
    store: FeatureStore, videos: Sequence[StoredVideo], per_step: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a row for each video and encoder (and time step): names, the time in seconds that it covers, and
    the mean of the features. The time is None if the grid has one step, whose length is not known."""
    for video in videos:
        for encoder, key in video.keys.items():
            grid = video.read(store, encoder)
            options = json.loads(key.options)
            row = {
                "source": video.source,
                "video": video.digest,
                "encoder": encoder,
                "variant": options["variant"][0],
                "weights": options["weights"],
            }
            bounds_s = cell_edges(grid.times_s)[0].tolist()
            if per_step:
                steps = pooled(grid, per_step=True)
            else:
                steps, bounds_s = pooled(grid)[None], [(bounds_s[0][0], bounds_s[-1][1])]
            for embedding, (start_s, end_s) in zip(steps, bounds_s, strict=True):
                has_length = end_s > start_s
                times = {
                    "start_s": round(start_s, 6) + 0.0 if has_length else None,  # no -0.0
                    "end_s": round(end_s, 6) if has_length else None,
                }
                yield row | times | {"embedding": embedding.numpy()}


@dataclass(frozen=True)
class Neighbor:
    """A video of a store and its cosine similarity to another one."""

    source: str
    similarity: float


def neighbors(
    store: FeatureStore, query: str, count: int = 5, encoders: Sequence[str] = ()
) -> list[Neighbor]:
    """Find the videos that are most similar to one of the store, by exact search.

    The similarity is the mean over the encoders of the cosine of the pooled features, from which the mean of
    the store is subtracted.

    Args:
        store: The store.
        query: Path or name of a video in the store, or of a file with the same content.
        count: How many to return.
        encoders: Which encoders to use; all of the query by default. Videos without them are left out.

    Raises:
        DataError: The store does not have the query, or no other video.
    """
    videos = videos_of(store, encoders)
    names = videos[_position_of(query, videos)].keys
    videos = [video for video in videos if set(names) <= set(video.keys)]
    position = _position_of(query, videos)
    similarity = torch.zeros(len(videos))
    for name in names:
        matrix = torch.stack([pooled(video.read(store, name)) for video in videos]).nan_to_num()
        matrix = normalize(matrix - matrix.mean(dim=0), dim=-1)
        similarity += matrix @ matrix[position] / len(names)
    order = [i for i in similarity.argsort(descending=True).tolist() if i != position]
    if not order:
        raise DataError(f"The store has no other video with features of {', '.join(names)}.")
    return [Neighbor(videos[i].source, round(similarity[i].item(), 4)) for i in order[:count]]


def _position_of(query: str, videos: Sequence[StoredVideo]) -> int:
    for position, video in enumerate(videos):
        if query in (video.source, video.digest):
            return position
    path = Path(query).expanduser()
    if path.exists():
        digest = content_digest(path)
        same = [n for n, video in enumerate(videos) if video.digest.partition("@")[0] == digest]
        whole = [position for position in same if videos[position].digest == digest]
        if len(same) > 1 and not whole:
            raise DataError(
                f"The store has {len(same)} windows of {query}. Pass the name of one, such as "
                f"{videos[same[0]].source}; `merv store ls` lists them."
            )
        if same:
            return (whole or same)[0]
    some = ", ".join(video.source for video in videos[:3])
    raise DataError(
        f"{query} is not in the store, which has {len(videos)} videos ({some}, …). Add it with `merv "
        "extract`."
    )


# Files ----------------------------------------------------------------------------------------


def write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """Write embeddings to a Parquet file; return the number of rows."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema(
        [(name, pyarrow.string()) for name in ("source", "video", "encoder", "variant", "weights")]
        + [("start_s", pyarrow.float64()), ("end_s", pyarrow.float64())]
        + [("embedding", pyarrow.list_(pyarrow.float32()))]
    )
    count = 0
    with temporary_beside(path) as temporary:
        with parquet.ParquetWriter(temporary, schema) as writer:
            batch: list[dict[str, Any]] = []
            for row in rows:
                batch.append(row)
                if len(batch) == ROWS_AT_ONCE:
                    writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                    count, batch = count + len(batch), []
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
        temporary.replace(path)
    return count + len(batch)


def write_numpy(
    store: FeatureStore, videos: Sequence[StoredVideo], folder: Path, progress: bool = False
) -> int:
    """Write an .npz file per video, with the arrays ENCODER.values, .times_s, .extent and .mask, and
    index.jsonl with the names of the videos. bfloat16 becomes float32."""
    with new_folder(folder) as temporary, (temporary / "index.jsonl").open("w", encoding="utf-8") as index:
        for number, video in enumerate(_bar(videos, progress)):
            name = f"{number:06d}.npz"
            np.savez(temporary / name, **_arrays(store, video))  # type: ignore[arg-type]
            index.write(json.dumps({"file": name, "source": video.source, "video": video.digest}) + "\n")
    return len(videos)


def write_webdataset(
    store: FeatureStore, videos: Sequence[StoredVideo], folder: Path, progress: bool = False
) -> int:
    """Write shards of 1000 videos: KEY.npz as in `write_numpy`, and KEY.json with the name of the video."""
    with new_folder(folder) as temporary:
        bar = iter(_bar(videos, progress))
        for start in range(0, len(videos), VIDEOS_PER_TAR):
            with tarfile.open(temporary / f"features-{start // VIDEOS_PER_TAR:06d}.tar", "w") as shard:
                for number, video in enumerate(islice(bar, VIDEOS_PER_TAR), start):
                    content = BytesIO()
                    np.savez(content, **_arrays(store, video))  # type: ignore[arg-type]
                    about = json.dumps({"source": video.source, "video": video.digest}).encode()
                    for suffix, data in (("json", about), ("npz", content.getvalue())):
                        member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                        member.size = len(data)
                        shard.addfile(member, BytesIO(data))
    return len(videos)


def write_zarr(
    store: FeatureStore, videos: Sequence[StoredVideo], folder: Path, progress: bool = False
) -> int:
    """Write a Zarr group per video, named by its number, with one array per encoder and field."""
    try:
        import zarr
    except ImportError as error:
        raise MissingDependency("Export to Zarr needs the package zarr: pip install zarr") from error
    with new_folder(folder) as temporary:
        root = zarr.open_group(str(temporary), mode="w")
        for number, video in enumerate(_bar(videos, progress)):
            group = root.create_group(f"{number:06d}")
            group.attrs.update({"source": video.source, "video": video.digest})
            for name, array in _arrays(store, video).items():
                created = group.create_array(name, shape=array.shape, dtype=array.dtype)
                created[...] = array
    return len(videos)


WRITERS: dict[str, Callable[..., int]] = {
    "numpy": write_numpy,
    "webdataset": write_webdataset,
    "zarr": write_zarr,
}


def _arrays(store: FeatureStore, video: StoredVideo) -> dict[str, np.ndarray]:
    arrays = {}
    for encoder in video.keys:
        grid = video.read(store, encoder)
        for name, tensor in vars(grid).items():
            tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            arrays[f"{encoder}.{name}"] = tensor[0].numpy()
    return arrays


def check_output(path: Path, is_folder: bool) -> Path:
    """Return the absolute path of a file or folder to write.

    Raises DataError if a file would replace a folder, or a folder something that is not empty.
    """
    path = path.expanduser().absolute()
    if is_folder and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise DataError(f"{path} exists. Choose a new folder, or delete it first.")
    if not is_folder and path.is_dir():
        raise DataError(f"{path} is a folder. Choose the name of a file.")
    return path


def _bar(videos: Sequence[StoredVideo], progress: bool) -> Iterable[StoredVideo]:
    return tqdm(videos, "Exporting", unit="video", disable=None if progress else True)
