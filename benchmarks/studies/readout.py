"""A linear probe, called read-out here: a linear map answers questions about a clip from its fused tokens.

Fusion and read-out are trained together with cross-entropy, on the same questions as the language model. One
Linear maps the concatenated tokens of a clip to the outputs:

    first, last     one logit per thing
    count           one logit per number
    present         two logits per thing: yes, no
    when            three logits per thing: start, middle, end
    order           one score per thing; the thing with the larger score comes first
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merv.data.samples import Sample
from merv.demo.questions import NUMBERS
from merv.fusion.fusion import Fusion
from merv.training.module import warmup_cosine
from merv.types import Grid

WHEN = ("start", "middle", "end")


class Answers:
    """Express questions as choices between outputs of the read-out.

    Args:
        things: All names that occur in questions and answers.

    Attributes:
        things: Name → its index.
        start: Kind of question → its first output.
        outputs: Number of outputs of the read-out.
    """

    def __init__(self, things: Sequence[str]) -> None:
        self.things = {name: i for i, name in enumerate(things)}
        n = len(self.things)
        sizes = {"first": n, "last": n, "count": len(NUMBERS), "present": 2 * n, "when": 3 * n, "order": n}
        self.start: dict[str, int] = {}
        self.outputs = 0
        for kind, size in sizes.items():
            self.start[kind], self.outputs = self.outputs, self.outputs + size

    def of(self, kind: str, question: str, answer: str) -> tuple[list[int], int]:
        """Return the outputs to choose from, and the index of the right one."""
        named = [self.things[word] for word in re.findall(r"\w+", question) if word in self.things]
        start = self.start[kind]
        if kind in ("first", "last"):
            return [start + i for i in range(len(self.things))], self.things[answer]
        if kind == "count":
            return [start + i for i in range(len(NUMBERS))], NUMBERS.index(answer)
        if kind == "order":
            return [start + named[0], start + named[1]], ("yes", "no").index(answer)
        if kind == "present":
            return [start + 2 * named[0], start + 2 * named[0] + 1], ("yes", "no").index(answer)
        return [start + 3 * named[0] + i for i in range(3)], WHEN.index(answer)


class Questions:
    """All questions about a list of clips, as tensors."""

    def __init__(self, samples: Sequence[Sample], answers: Answers) -> None:
        clips, choices, right = [], [], []
        for clip, sample in enumerate(samples):
            for kind, (question, answer) in zip(sample.kinds, texts(sample), strict=True):
                outputs, index = answers.of(kind, question, answer)
                clips.append(clip)
                choices.append(torch.tensor(outputs))
                right.append(index)
        self.clip, self.right = torch.tensor(clips), torch.tensor(right)
        self.choices = nn.utils.rnn.pad_sequence(choices, batch_first=True, padding_value=-1)

    def logits(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Return logits [Q, choices] of the questions `rows` [Q], given the outputs [Q, O]."""
        choices = self.choices[rows]
        return outputs.gather(1, choices.clamp(min=0)).masked_fill(choices < 0, -1e9)


def texts(sample: Sample) -> list[tuple[str, str]]:
    """Return (question, answer) of each conversation of a sample."""
    return [
        (next(part["text"] for part in c[0]["content"] if part["type"] == "text"), c[-1]["content"])
        for c in sample.conversations
    ]


def read_out(
    fusion: Fusion,
    train: tuple[Mapping[str, Grid], Questions],
    tests: Mapping[str, tuple[Mapping[str, Grid], Questions]],
    outputs: int,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> dict[str, list[bool]]:
    """Train fusion and read-out, and test them.

    Args:
        fusion: The fusion, which is trained in place.
        train: Aligned features of the training clips, and the questions about them.
        tests: Name of a test → features and questions.
        outputs: Number of outputs of the read-out.
        steps: Number of training steps.
        batch: Clips per step.
        lr: Learning rate of the fusion; the read-out has a tenth of it.
        seed: Seed of the order of the clips.

    Returns:
        Name of a test → for each question, whether the answer is right.
    """
    grids, questions = train
    torch.manual_seed(seed)
    fusion.init_scale(1.0)
    clips = int(questions.clip.max()) + 1
    cells = fusion(_select(grids, torch.arange(1))).tokens.shape[1]
    head = nn.Linear(cells * fusion.output_dim, outputs)
    nn.init.zeros_(head.weight)
    groups = [{"params": fusion.parameters(), "lr": lr}, {"params": head.parameters(), "lr": lr / 10}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, warmup_steps=steps // 20, steps=steps)
    )
    by_clip = [(questions.clip == clip).nonzero()[:, 0] for clip in range(clips)]
    order = torch.empty(0, dtype=torch.long)
    fusion.train()
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(clips)
        chosen, order = order[:batch], order[batch:]
        selected = torch.cat([by_clip[clip] for clip in chosen.tolist()])
        rows = torch.cat([torch.full_like(by_clip[c], i) for i, c in enumerate(chosen.tolist())])
        out = head(fusion(_select(grids, chosen)).tokens.flatten(1))[rows]
        loss = F.cross_entropy(questions.logits(out, selected), questions.right[selected])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    fusion.eval()
    return {name: _right(fusion, head, *test) for name, test in tests.items()}


@torch.no_grad()
def _right(fusion: Fusion, head: nn.Linear, grids: Mapping[str, Grid], questions: Questions) -> list[bool]:
    out = head(fusion(grids).tokens.flatten(1))[questions.clip]
    all_questions = torch.arange(len(questions.clip))
    return (questions.logits(out, all_questions).argmax(dim=1) == questions.right).tolist()


def _select(grids: Mapping[str, Grid], clips: Tensor) -> dict[str, Grid]:
    return {
        name: Grid(grid.values[clips], grid.times_s[clips], grid.extent[clips], grid.mask[clips])
        for name, grid in grids.items()
    }
