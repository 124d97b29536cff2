"""Compute the features of many videos once, and keep them in a feature store.

examples:
  merv extract clips/ --encoders dinov2 siglip --out features
  merv extract train.jsonl --config my_recipe.yaml --out features      what this recipe will train on
  merv extract 'clips/*.mp4' --encoders clip --out features --pool embeddings.parquet
  merv extract clips/ --encoders dinov2 siglip vivit --out features    computes only vivit
  merv store ls features

A source is a video, an image, a folder of them, a pattern, or a data file (.jsonl, .json, .parquet, .tar, a
folder of `datasets`). What the store already has is not computed again, so an extraction that was stopped can
be run again. Videos that cannot be read are listed in failed.jsonl, and the exit status is then 1.
`merv fit --model.feature_store=features` trains from the store. See docs/features.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merv.errors import EncoderError

if TYPE_CHECKING:
    from merv.extraction.extract import Extraction
    from merv.features.store import FeatureStore
    from merv.models.multi_encoder import MultiEncoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv extract` to `parser`."""
    option = parser.add_argument
    option("sources", nargs="+", metavar="SOURCE", help="videos, images, folders, patterns or data files")
    option("--out", required=True, metavar="STORE", help="folder of the store, or an address such as s3://…")
    option("--encoders", nargs="+", metavar="NAME", help="encoders; see `merv encoders`")
    option("--config", metavar="RECIPE", help="take the encoders and their options from a recipe")
    option("--model", metavar="FOLDER", help="take the encoders and their options from a saved model")
    option(
        "--grid",
        nargs=3,
        type=int,
        metavar=("T", "H", "W"),
        help="grid of time steps, rows and columns that all features are aligned to (default: 16 8 8)",
    )
    option("--own-grid", action="store_true", help="keep each encoder's own grid: for export, not for fusion")
    option(
        "--weights",
        action="append",
        type=_pair,
        default=[],
        metavar="NAME=SOURCE",
        help="weights of an encoder: a folder, file or hub id, or `none` for random ones; can be repeated",
    )
    option(
        "--preset",
        action="append",
        type=_pair,
        default=[],
        metavar="NAME=PRESET",
        help="how the frames of an encoder are preprocessed; can be repeated",
    )
    option(
        "--num-frames",
        action="append",
        type=_name_and_count,
        default=[],
        metavar="NAME=N",
        help="number of frames of an encoder per video; can be repeated",
    )
    option("--sampling", choices=["uniform", "released"], help="how frames are chosen (default: uniform)")
    option("--start-s", type=float, help="start of the range that is sampled, in seconds (default: 0)")
    option("--end-s", type=float, help="end of the range that is sampled, in seconds (default: the end)")
    option(
        "--window",
        type=_seconds,
        metavar="SECONDS",
        help="cut each video into windows of this length, each with features of its own",
    )
    option(
        "--batch-size",
        type=_positive,
        default=1,
        metavar="N",
        help="videos that are encoded at a time: more can be faster on a GPU, but the last bits of the "
        "features then depend on the other videos of the batch (default: %(default)s)",
    )
    option("--dtype", choices=["fp32", "bf16"], default="fp32", help="dtype of the encoders (default: fp32)")
    option(
        "--store-dtype",
        choices=["float32", "float16", "bfloat16", "int8"],
        help="dtype of stored features; int8 has a scale per cell (default: as the encoders return them)",
    )
    option("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is a GPU)")
    option("--num-workers", type=_count, help="processes that decode (default: one per core, at most 16)")
    option("--root", help="folder that paths in data files start at (default: the folder of each file)")
    option("--limit", type=_count, metavar="N", help="only the first N videos")
    option("--failed", metavar="FILE", help="where failures are listed (default: failed.jsonl in the store)")
    option("--pool", metavar="OUT.parquet", help="also write one embedding per video (or window) and encoder")
    option("--per-step", action="store_true", help="with --pool: one embedding per time step of the grid")


def run(args: argparse.Namespace) -> int:
    """Extract features; return 1 if a video could not be read."""
    from merv.extraction.export import check_output, embeddings, write_parquet
    from merv.extraction.extract import extract
    from merv.extraction.videos import Items
    from merv.features.dataset import StoredVideo
    from merv.features.store import FeatureStore

    if args.per_step and not args.pool:
        raise EncoderError("--per-step needs --pool OUT.parquet, the file that embeddings are written to.")
    signal.signal(signal.SIGTERM, _interrupt)
    encoders = _encoders(args)
    pool = check_output(Path(args.pool), is_folder=False) if args.pool else None
    items = Items(args.sources, args.root, args.limit)
    store = FeatureStore(args.out, dtype=args.store_dtype)
    is_local = "://" not in args.out
    if is_local:
        Path(args.out).expanduser().mkdir(parents=True, exist_ok=True)
    failed = Path(args.failed or (Path(args.out) / "failed.jsonl" if is_local else "failed.jsonl"))
    try:
        result = extract(
            encoders,
            items,
            store,
            window_s=args.window,
            batch_size=args.batch_size,
            num_workers=min(os.cpu_count() or 1, 16) if args.num_workers is None else args.num_workers,
            failed=failed.expanduser(),
            progress=True,
        )
    except KeyboardInterrupt:
        print(
            "merv: stopped. Run the same command again to go on; stored features are kept.", file=sys.stderr
        )
        raise
    unit = "video" if args.window is None else "window"
    sys.stdout.write(summary(result, store, failed, unit))
    if pool is not None:
        videos = [
            StoredVideo(next(iter(keys.values())).source, next(iter(keys.values())).video, keys)
            for keys in result.keys
        ]
        count = write_parquet(embeddings(store, videos, args.per_step), pool)
        print(f"Wrote {count} embeddings to {args.pool}.")
    return int(bool(result.failures))


def summary(result: Extraction, store: FeatureStore, failed: Path, unit: str) -> str:
    """What an extraction has done, and what limited its speed."""
    total = result.encoded + result.stored + len(result.failures)
    lines = [
        f"{total} {unit}s in {result.seconds:.1f} s: {result.encoded} encoded, {result.stored} already "
        f"stored, {len(result.failures)} failed."
    ]
    if result.encoded:
        waiting = result.waited_s / result.seconds
        limit = "decoding: more --num-workers help" if waiting > 0.5 else "the encoders"
        lines.append(
            f"{result.encoded / result.seconds:.2f} {unit}s/s; the encoders waited for {waiting:.0%} of the "
            f"time; reading took {result.decode_cpu_s / total:.2f} core-seconds per {unit}. The limit is "
            f"{limit}."
        )
    for cause, count in result.causes.most_common():
        lines.append(f"  {count} × {cause}")
    if result.failures:
        lines.append(f"Failures are listed in {failed}.")
    return "\n".join([*lines, repr(store), ""])


def _encoders(args: argparse.Namespace) -> MultiEncoder:
    import torch

    from merv.models.multi_encoder import MultiEncoder
    from merv.video.sampling import Sampling

    given = [name for name in ("encoders", "config", "model") if getattr(args, name)]
    if len(given) != 1:
        raise EncoderError("Pass one of --encoders NAME …, --config RECIPE and --model FOLDER.")
    options = ("grid", "own_grid", "weights", "preset", "num_frames", "sampling", "start_s", "end_s")
    given_options = [name for name in options if getattr(args, name) not in (None, [], False)]
    if given_options and not args.encoders:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given_options)
        raise EncoderError(f"{names}: --{given[0]} sets these already. Leave them out, or pass --encoders.")
    if args.grid and args.own_grid:
        raise EncoderError("Pass --grid T H W or --own-grid, not both.")
    if args.model:
        encoders = _saved(args.model)
    elif args.config:
        encoders = MultiEncoder(**recipe_encoders(args.config))
    else:
        encoders = MultiEncoder(
            args.encoders,
            grid=None if args.own_grid else tuple(args.grid or (16, 8, 8)),
            weights={name: None if value == "none" else value for name, value in args.weights},
            presets=dict(args.preset),
            num_frames=dict(args.num_frames),
            sampling=Sampling(args.sampling or "uniform", start_s=args.start_s or 0.0, end_s=args.end_s),
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"--device {device}: {str(error).splitlines()[0]}") from error
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    return encoders.to(device=device, dtype=dtype).eval()


def recipe_encoders(recipe: str) -> dict[str, Any]:
    """The arguments of a MultiEncoder with the encoders of a recipe, without a fusion.

    >>> recipe_encoders("demo")["grid"]
    (8, 1, 1)
    """
    import yaml

    from merv.training.options import TrainingOptions
    from merv.training.recipes import with_recipes

    path = with_recipes(["--config", recipe])[1]
    try:
        options = TrainingOptions(**yaml.safe_load(Path(path).read_text(encoding="utf-8"))["model"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise EncoderError(f"{path}: expected a recipe with a section `model`: {error}.") from error
    kept = ("grid", "presets", "num_frames", "sampling", "align", "resample", "backend")
    arguments = {name: value for name, value in options.multi_encoder().items() if name in kept}
    return {"encoders": options.encoders, "weights": options.weights or {}, **arguments}


def _saved(folder: str) -> Any:
    from merv.checkpoints.folder import read_config
    from merv.checkpoints.pretrained import find_model
    from merv.models.multi_encoder import MultiEncoder
    from merv.models.video_llm import VideoLLM

    path = find_model(folder)
    kind: Any = VideoLLM if read_config(path)[0] == "VideoLLM" else MultiEncoder
    model = kind.from_pretrained(path)
    return model.vision if isinstance(model, VideoLLM) else model


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _name_and_count(text: str) -> tuple[str, int]:
    name, value = _pair(text)
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"expected NAME=N, got {text!r}")
    return name, int(value)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds of at least 0.1, got {text!r}")
    return seconds


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
