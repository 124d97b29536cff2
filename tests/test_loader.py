"""Loading: the batches after a resume are those that would have come."""

import json
import re

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from merv.data import ChatData
from merv.errors import DataError
from merv.train_cli import NOISE

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{re.escape(words)}.*") for words in NOISE]


class Recorder(LightningModule):
    """Trains nothing and remembers the origins that it got."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, ...]] = []
        self.asked: list[str] = []

    def training_step(self, batch, index):
        self.seen.append(tuple(origin.rpartition("/")[2] for origin in batch.origins))
        self.asked += [str(talk[0]["content"]) for group in batch.groups for talk in group]
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class SaveAfter(Callback):
    """Saves a checkpoint when so many batches have been trained on, as checkpoint callbacks do."""

    def __init__(self, batches: int, path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, module, *args):
        if len(module.seen) == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def files(tmp_path):
    """11 samples and 6 samples, mixed to 12 in an epoch: six batches of text, image and video, of many lengths; three questions in each."""
    for name, count in (("a", 11), ("b", 6)):
        rows = []
        for number in range(count):
            talk = [
                {"role": "user", "content": "?" * (1 + number % 5)},
                {"role": "assistant", "content": "!"},
            ]
            asked = [{"question": f"{name}{number}{q}", "answer": "!"} for q in "xyz"]
            shown = {"video": f"{number}.mp4"} if number % 3 else {"image": f"{number}.png"}
            rows.append({"messages": talk} if number % 4 == 0 else {**shown, "questions": asked})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {str(tmp_path / "a.jsonl"): 1.0, str(tmp_path / "b.jsonl"): 1.0}


def fit(files, folder, *, ckpt=None, save=None, epochs=3, data=None, **options):
    module = Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        **quiet,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[SaveAfter(*save)] if save else [],
        **options,
    )
    chat = ChatData(files, **{"batch_size": 2, "questions": 2, "seed": 3, "workers": 0, **(data or {})})
    trainer.fit(module, chat, ckpt_path=ckpt, weights_only=True)
    return module


GROUPED, PLAIN = {"group": True}, {}


@pytest.mark.parametrize(
    ("after", "data", "options"),
    [
        (1, GROUPED, {}),
        (4, PLAIN, {}),
        (6, GROUPED, {}),  # the last of an epoch of six
        (7, GROUPED, {}),
        (12, PLAIN, {}),
        (3, GROUPED, {"accumulate_grad_batches": 2}),
        (4, GROUPED, {"accumulate_grad_batches": 2}),
        (6, PLAIN, {"accumulate_grad_batches": 4}),
        (4, PLAIN, {"limit_train_batches": 4}),  # the last that is used of an epoch
        (5, PLAIN, {"limit_train_batches": 4}),
        (7, {"workers": 2, "group": True}, {}),
        (12, {"workers": 2}, {"accumulate_grad_batches": 2}),
    ],
)
def test_a_resumed_run_sees_the_batches_that_the_whole_run_saw(files, tmp_path, after, data, options):
    whole = fit(files, tmp_path, save=(after, tmp_path / "mid.ckpt"), data=data, **options)
    rest = fit(files, tmp_path, ckpt=tmp_path / "mid.ckpt", data=data, **options)
    assert len(whole.seen) == 3 * options.get("limit_train_batches", 6)
    assert whole.seen[after:] == rest.seen
    assert whole.asked[len(whole.asked) - len(rest.asked) :] == rest.asked


def test_epochs_differ_and_none_has_a_sample_twice(files, tmp_path):
    seen = fit(files, tmp_path).seen
    epochs = [[origin for batch in seen[start : start + 6] for origin in batch] for start in (0, 6, 12)]
    assert all(len(set(epoch)) == len(epoch) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_state_counts_batches_handed_out_not_those_ready(files):
    data = ChatData(files, batch_size=2, workers=2)
    data.setup()
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    next(batches)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (0, 2)


def test_a_state_of_other_data_is_refused(files):
    loaders = []
    for options in ({}, {"batch_size": 3, "seed": 1}):
        data = ChatData(files, **{"workers": 0, "batch_size": 2, **options})
        data.setup()
        loaders.append(data.train_dataloader())
    with pytest.raises(DataError, match="batch_size was 2 and is 3; seed was 0 and is 1"):
        loaders[1].load_state_dict(loaders[0].state_dict())


def test_loading_leaves_the_global_random_state_alone(files):
    data = ChatData(files, workers=0)
    data.setup()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
