"""Look into a feature store, check it, and take features out of it.

examples:
  merv store ls features                              the videos and their encoders
  merv store stats features                           size, and the options of each encoder
  merv store verify features                          compare every byte with its digest
  merv store gc features --keep dinov2 siglip         merge small files, drop other encoders
  merv store near features clips/a.mp4                the videos that are most similar to one
  merv store export features embeddings.parquet       one embedding per video and encoder
  merv store export features arrays --format numpy    the features themselves
  merv store estimate --encoders dinov2 siglip --videos 10000

A store is a folder of safetensors files, or an address such as s3://…. It can be copied, shared and read
while others write to it. See docs/features.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merv.cli.plan import size
from merv.errors import DataError, EncoderError

if TYPE_CHECKING:
    from merv.features.shard import FeatureKey, Record
    from merv.features.store import FeatureStore

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # of a value
FORMATS = ("parquet", "numpy", "webdataset", "zarr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv store` to `parser`."""
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> Callable[..., Any]:
        sub = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name != "estimate":
            sub.add_argument("store", metavar="STORE", help="folder or address of a feature store")
        return sub.add_argument

    action("ls", "list the videos and their encoders")("--json", action="store_true", help="as JSON lines")
    action("stats", "show the size, and the options of each encoder")
    action("verify", "compare every byte with its digest; the exit status is 1 if something is damaged")
    action("gc", "merge small files, and remove repeats, damaged records and leftovers")(
        "--keep", nargs="+", metavar="ENCODER", help="also drop the features of all other encoders"
    )
    option = action("near", "list the most similar videos, by the cosine of pooled features minus their mean")
    option("video", metavar="VIDEO", help="name of a video in the store, or a file with the same content")
    option("-k", "--count", type=int, default=5, help="how many to list (default: %(default)s)")
    option("--encoders", nargs="+", default=[], metavar="NAME", help="which encoders to use (default: all)")
    option = action("export", "write features to files for other programs")
    option("out", metavar="OUT", help="file (parquet) or folder to write")
    option(
        "--format",
        choices=FORMATS,
        default="parquet",
        help="parquet: one embedding per video and encoder; numpy, webdataset, zarr: all features (default: "
        "%(default)s)",
    )
    option("--encoders", nargs="+", default=[], metavar="NAME", help="which encoders (default: all)")
    option("--per-step", action="store_true", help="parquet: one embedding per time step")
    option = action("estimate", "estimate the size of a store before it is made")
    option("--encoders", nargs="+", required=True, metavar="NAME", help="encoders; see `merv encoders`")
    option("--videos", type=int, required=True, metavar="N", help="number of videos")
    option("--grid", nargs=3, type=int, default=(16, 8, 8), metavar=("T", "H", "W"), help="default: 16 8 8")
    option("--own-grid", action="store_true", help="each encoder's own grid")
    option(
        "--store-dtype",
        choices=list(BYTES),
        default="float32",
        help="dtype of a value (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run an action; return its exit status."""
    return ACTIONS[args.action](args) or 0


def _open(args: argparse.Namespace) -> FeatureStore:
    from merv.features.store import FeatureStore

    store = FeatureStore(args.store, read_only=True)
    if all(place.version() is None or not place.names() for place in store.places):
        raise DataError(f"{args.store} is no feature store: there is no shard in it. See `merv extract`.")
    return FeatureStore(args.store) if args.action == "gc" else store


def _ls(args: argparse.Namespace) -> None:
    from merv.features.dataset import videos_of

    videos = videos_of(_open(args))
    width = max((len(video.source) for video in videos), default=0)
    for video in videos:
        if args.json:
            print(json.dumps({"source": video.source, "video": video.digest, "encoders": sorted(video.keys)}))
        else:
            print(f"{video.source:{width}}  {', '.join(sorted(video.keys))}")


def _stats(args: argparse.Namespace) -> None:
    from merv.features.dataset import encoder_names

    store = _open(args)
    (place,) = store.places
    shards = place.names()
    records = list(store.records())
    names = encoder_names([record.key for record in records])
    videos = {record.key.video.partition("@")[0] for record in records}
    print(f"{place.address}: {len(videos)} videos, {size(sum(shards.values()))} in {len(shards)} files")
    for (encoder, options), name in names.items():
        own = [r for r in records if (r.key.encoder, r.key.options) == (encoder, options)]
        print(f"\n{name}: {len(own)} records, {size(sum(record.size for record in own))}, {_stored(own)}")
        for option, value in json.loads(options).items():
            print(f"  {option}: {json.dumps(value)}")


def _verify(args: argparse.Namespace) -> int:
    from merv.features.maintenance import verify

    valid, damaged = verify(_open(args), progress=True)
    for one in damaged:
        print(f"{one.shard}: {one.source}{': ' if one.source else ''}{one.reason}")
    print(f"{valid} records are valid, {len(damaged)} things are damaged.")
    if damaged:
        print("`merv store gc` removes what is damaged; `merv extract` computes it again.")
    return int(bool(damaged))


def _gc(args: argparse.Namespace) -> None:
    from merv.features.dataset import encoder_names
    from merv.features.maintenance import collect_garbage

    store = _open(args)
    names = encoder_names(list(store))
    if unknown := [name for name in args.keep or () if name not in names.values()]:
        available = ", ".join(names.values())
        raise DataError(f"--keep: the store has no features of {', '.join(unknown)}. Available: {available}.")

    def keep(record: Record) -> bool:
        return not args.keep or _name(names, record.key) in args.keep

    done = collect_garbage(store, keep, progress=True)
    print(
        f"{done.shards_before} shards before, {done.shards_after} after; {done.dropped} records dropped; "
        f"{done.unreadable} unreadable shards deleted; "
        f"{size(done.bytes_freed)} freed."
    )


def _near(args: argparse.Namespace) -> None:
    from merv.extraction.export import neighbors

    for one in neighbors(_open(args), args.video, args.count, args.encoders):
        print(f"{one.similarity:+.4f}  {one.source}")


def _export(args: argparse.Namespace) -> None:
    from merv.extraction.export import WRITERS, check_output, embeddings, write_parquet
    from merv.features.dataset import videos_of

    store, out = _open(args), check_output(Path(args.out), is_folder=args.format != "parquet")
    videos = videos_of(store, args.encoders)
    if args.format == "parquet":
        count = write_parquet(embeddings(store, videos, args.per_step), out)
        print(f"Wrote {count} embeddings of {len(videos)} videos to {out}.")
    else:
        WRITERS[args.format](store, videos, out, progress=True)
        print(f"Wrote the features of {len(videos)} videos to {out}.")


def _estimate(args: argparse.Namespace) -> None:
    from merv.encoding.registry import find_encoder, name_and_variant

    total = 0
    for name in args.encoders:
        encoder, variant = name_and_variant(name)
        variants = find_encoder(encoder).variants
        if variant is not None and variant not in variants:
            raise EncoderError(f"Unknown variant {name!r}. Available: {', '.join(variants)}.")
        spec = variants[variant or next(iter(variants))]
        t, h, w = spec.grid if args.own_grid else args.grid
        scale = 4 if args.store_dtype == "int8" else 0
        num_bytes = t * h * w * (spec.embed_dim * BYTES[args.store_dtype] + scale + 1) + 8 * t + 16
        total += num_bytes
        print(f"{name}: {size(num_bytes)} per video, {size(num_bytes / t)} per image")
    print(f"{args.videos} videos: {size(total * args.videos)}")


ACTIONS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "ls": _ls,
    "stats": _stats,
    "verify": _verify,
    "gc": _gc,
    "near": _near,
    "export": _export,
    "estimate": _estimate,
}


def _name(names: dict[tuple[str, str], str], key: FeatureKey) -> str:
    return names[key.encoder, key.options]


def _stored(records: list[Record]) -> str:
    dtypes = Counter(str(field.dtype) for r in records for field in r.fields if field.name == "values")
    shapes = Counter(
        "×".join(map(str, field.shape[1:])) for r in records for field in r.fields if field.name == "values"
    )
    return f"{', '.join(name.removeprefix('torch.') for name in dtypes)}, {', '.join(shapes)}"
