"""Data: questions and answers about videos, from JSONL to groups of conversations.

A line is either questions about one video, which are learned in one pass over it,

    {"video": "clips/a.mp4", "questions": [{"question": "…", "answer": "…", "kind": "count"}, …]}

or one conversation, with any number of videos, images and turns,

    {"messages": [{"role": "user", "content": […]}, {"role": "assistant", "content": "…"}]}

Paths are relative to the file's folder. `kind` is free: accuracy is reported by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from merv.samples import Group as Group
from merv.samples import Sample as Sample
from merv.samples import read_samples as read_samples


class _Groups(Dataset):
    """Samples as groups for training: up to `most` of each one's conversations, drawn anew each time."""

    def __init__(self, samples: Sequence[Sample], most: int, seed: int) -> None:
        self.samples, self.most = samples, most
        self.drawn = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Group:
        talks = self.samples[index].conversations
        chosen = torch.randperm(len(talks), generator=self.drawn)[: self.most].tolist()
        return [talks[i] for i in chosen]


class ChatData(LightningDataModule):
    """Training and validation data from JSONL files.

    train, val: paths; val may be None. batch_size: videos (or conversations) a step.
    questions: at most so many questions of a video in one pass.
    seed: of the order of samples and of which questions are drawn.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        batch_size: int = 4,
        questions: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train_path, self.val_path = train, val
        self.batch_size, self.questions, self.seed = batch_size, questions, seed
        self.train: list[Sample] = []
        self.val: list[Sample] = []
        if val is not None:  # where there is no such method, Lightning does not validate
            self.val_dataloader = self._val_dataloader  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        """Read the files; errors in them come now, before anything slow."""
        self.train = self.train or read_samples(self.train_path)
        if self.val_path is not None:
            self.val = self.val or read_samples(self.val_path)

    def train_dataloader(self) -> DataLoader:
        """Batches of groups, shuffled by the seed."""
        return DataLoader(
            _Groups(self.train, self.questions, self.seed),
            batch_size=self.batch_size,
            shuffle=True,
            collate_fn=list,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave batches as they are: they name videos, and the model moves what it makes of them."""
        return batch

    def _val_dataloader(self) -> DataLoader:
        """Batches of samples, in the order of the file."""
        return DataLoader(self.val, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def videos(self) -> Iterator[Any]:
        """Each distinct video of both files once."""
        every = [video for sample in (*self.train, *self.val) for video in sample.videos()]
        yield from dict.fromkeys(every)
