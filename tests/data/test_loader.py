"""Loading: order, resumption, bad samples, workers, streams."""

import gc
import json
import multiprocessing
import os
import re
import signal
from contextlib import nullcontext

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from merv.cli.fit import NOISE
from merv.data.module import ChatData
from merv.data.sources import Samples
from merv.errors import DataError
from merv.features.store import FeatureStore
from merv.models.multi_encoder import MultiEncoder
from merv.testing import make_video

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{re.escape(words)}.*") for words in NOISE]


class Recorder(LightningModule):
    """Trains nothing and records the origins and questions of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, ...]] = []
        self.questions: list[str] = []

    def training_step(self, batch, index):
        self.seen.append(tuple(origin.rpartition("/")[2] for origin in batch.origins))
        self.questions += [str(turns[0]["content"]) for group in batch.groups for turns in group]
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class SaveAfter(Callback):
    """Saves a checkpoint after `batches` batches, like a checkpoint callback."""

    def __init__(self, batches: int, path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, module, *args):
        if len(module.seen) == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def files(tmp_path):
    """Two files with text, images and videos of many lengths. Mixed, an epoch has six batches of two."""
    for name, count in (("a", 11), ("b", 6)):
        rows = []
        for number in range(count):
            messages = [
                {"role": "user", "content": "?" * (1 + number % 5)},
                {"role": "assistant", "content": "!"},
            ]
            questions = [{"question": f"{name}{number}{q}", "answer": "!"} for q in "xyz"]
            media = {"video": f"{number}.mp4"} if number % 3 else {"image": f"{number}.png"}
            rows.append({"messages": messages} if number % 4 == 0 else {**media, "questions": questions})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {str(tmp_path / "a.jsonl"): 1.0, str(tmp_path / "b.jsonl"): 1.0}


def fit(files, folder, *, module=None, ckpt=None, save=None, epochs=3, data=None, **options):
    module = module or Recorder()
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
    chat = ChatData(
        files, **{"batch_size": 2, "max_questions": 2, "seed": 3, "num_workers": 0, **(data or {})}
    )
    trainer.fit(module, chat, ckpt_path=ckpt, weights_only=True)
    return module


GROUPED, PLAIN = {"group_by_length": True}, {}


@pytest.mark.parametrize(
    ("after", "data", "options"),
    [
        (1, GROUPED, {}),
        (4, PLAIN, {}),
        (6, GROUPED, {}),  # the last of the six batches of an epoch
        (7, GROUPED, {}),
        (12, PLAIN, {}),
        (3, GROUPED, {"accumulate_grad_batches": 2}),
        (4, GROUPED, {"accumulate_grad_batches": 2}),
        (6, PLAIN, {"accumulate_grad_batches": 4}),
        (4, PLAIN, {"limit_train_batches": 4}),  # the last used batch of an epoch
        (5, PLAIN, {"limit_train_batches": 4}),
        (7, {"num_workers": 2, "group_by_length": True}, {}),
        (12, {"num_workers": 2}, {"accumulate_grad_batches": 2}),
    ],
)
def test_resumed_run_sees_the_batches_of_an_uninterrupted_run(files, tmp_path, after, data, options):
    whole = fit(files, tmp_path, save=(after, tmp_path / "mid.ckpt"), data=data, **options)
    rest = fit(files, tmp_path, ckpt=tmp_path / "mid.ckpt", data=data, **options)
    assert len(whole.seen) == 3 * options.get("limit_train_batches", 6)
    assert whole.seen[after:] == rest.seen
    assert whole.questions[len(whole.questions) - len(rest.questions) :] == rest.questions


def test_epochs_differ_and_repeat_no_sample(files, tmp_path):
    seen = fit(files, tmp_path).seen
    epochs = [[origin for batch in seen[start : start + 6] for origin in batch] for start in (0, 6, 12)]
    assert all(len(set(epoch)) == len(epoch) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_state_counts_batches_handed_out_not_prefetched(files):
    data = ChatData(files, batch_size=2, num_workers=2)
    data.setup()
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    next(batches)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (0, 2)


def test_resuming_with_other_options_is_an_error(files):
    loaders = []
    for options in ({}, {"batch_size": 3, "seed": 1}):
        data = ChatData(files, **{"num_workers": 0, "batch_size": 2, **options})
        data.setup()
        loaders.append(data.train_dataloader())
    with pytest.raises(DataError, match=r"batch_size .*2 .*3; seed .*0 .*1"):
        loaders[1].load_state_dict(loaders[0].state_dict())


def test_resuming_with_changed_files_is_an_error(tmp_path):
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    before = chat(tmp_path / "a.jsonl", row).train_dataloader()
    same = chat(tmp_path / "moved.jsonl", row).train_dataloader()
    same.load_state_dict(before.state_dict())
    row["messages"][1]["content"] = "."
    with pytest.raises(DataError, match="content"):
        chat(tmp_path / "a.jsonl", row).train_dataloader().load_state_dict(before.state_dict())


def test_row_with_more_videos_is_longer_than_row_with_more_text(tmp_path):
    def row(characters: int, videos: int) -> dict:
        media = [{"type": "video", "video": f"{number}.mp4"} for number in range(videos)]
        text = {"type": "text", "text": "?" * characters}
        return {
            "messages": [{"role": "user", "content": [*media, text]}, {"role": "assistant", "content": "!"}]
        }

    data = chat(tmp_path / "a.jsonl", row(2000, 1), row(2, 3), group_by_length=True)
    _, lengths = data.modalities_and_lengths
    assert lengths[1] > lengths[0]


def test_loading_does_not_change_the_global_random_state(files):
    data = ChatData(files, num_workers=0)
    data.setup()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


# Bad samples, other processes ---------------------------------------------------------------


def chat(path, *rows, **options) -> ChatData:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    data = ChatData(str(path), **{"num_workers": 0, "batch_size": 2, **options})
    data.setup()
    data.reader = MultiEncoder(["fake"], grid=(2, 1, 1)).reader  # as in training
    return data


def row_about(video: str) -> dict:
    return {"video": video, "questions": [{"question": "Who?", "answer": "cat", "kind": "who"}] * 2}


@pytest.fixture
def rows(tmp_path):
    make_video(tmp_path / "good.mp4", frames=4)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    return [row_about("good.mp4"), row_about("bad.mp4"), row_about("bad.mp4"), "{", row_about("good.mp4")]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_skipped_listed_and_not_replaced(tmp_path, rows, workers):
    data = chat(
        tmp_path / "a.jsonl", *rows, on_error="skip", num_workers=workers, batch_size=5, group_by_length=True
    )
    loader = data.train_dataloader()
    loader.policy.folder = tmp_path
    batches = [batch for _ in range(2) for batch in loader]
    assert all(sorted(o[-1] for o in batch.origins) == ["1", "5"] for batch in batches)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(listed) == 3  # once in two epochs
    assert {"bad.mp4", "UnreadableVideo"} <= set(re.findall(r"[\w.]+", str(listed)))


def test_bad_sample_is_named_with_its_line(tmp_path, rows):
    for row, value in ((rows[1], r"UnreadableVideo: .*bad\.mp4"), ("{", "JSON")):
        with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{value}(.|\n)*data\.on_error"):
            next(iter(chat(tmp_path / "a.jsonl", row).train_dataloader()))


def test_max_skipped_stops_the_run_even_after_resuming(tmp_path, rows):
    data = chat(tmp_path / "a.jsonl", *rows[1:4], on_error="skip", max_skipped=1, batch_size=1)
    first, second = data.train_dataloader(), data.train_dataloader()
    next(iter(first))
    second.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match=r"2 .*data\.max_skipped .*1"):
        next(iter(second))


def test_workers_survive_ctrl_c_in_a_process_group_of_their_own(tmp_path, rows):
    loader = chat(tmp_path / "a.jsonl", *[rows[0]] * 3, batch_size=1, num_workers=1).train_dataloader()
    batches, before = iter(loader), multiprocessing.active_children()
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 2


class Failing(Recorder):
    """Fails at the first batch."""

    def training_step(self, batch, index):
        raise ArithmeticError


@pytest.mark.parametrize(
    ("module", "end"), [(Recorder, nullcontext()), (Failing, pytest.raises(ArithmeticError))]
)
def test_workers_stop_at_the_end_of_a_run(files, tmp_path, module, end):
    before = set(multiprocessing.active_children())
    with end:
        fit(files, tmp_path, module=module(), data={"num_workers": 2})
    assert set(multiprocessing.active_children()) <= before


def test_deleted_loader_stops_its_workers_at_once(tmp_path, rows):
    loader = chat(tmp_path / "a.jsonl", rows[0], num_workers=1).train_dataloader()
    before = set(multiprocessing.active_children())
    list(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    gc.disable()
    try:
        del loader
        assert worker.exitcode == 0
    finally:
        gc.enable()


def test_video_is_read_once_in_a_batch(tmp_path, rows):
    data = chat(tmp_path / "a.jsonl", rows[0], rows[4])
    (batch,) = data.train_dataloader()
    loaded = {id(turns[0]["content"][0]["video"]) for group in batch.groups for turns in group}
    assert len(loaded) == 1


def indices(loader) -> list[tuple[int, ...]]:
    """Frame indices in an epoch with one clip per batch."""
    return [batch.groups[0][0][0]["content"][0]["video"].clip.indices["fake"] for batch in loader]


def test_random_frames_repeat_when_a_run_is_repeated(tmp_path):
    make_video(tmp_path / "long.mp4", frames=64)
    row = row_about("long.mp4")

    def loader(workers: int, **options):
        data = chat(tmp_path / "a.jsonl", row, row, batch_size=1, num_workers=workers, **options)
        data.reader = MultiEncoder(["fake"], grid=(2, 1, 1), sampling="segment").reader
        return data.train_dataloader()

    no_worker, one_worker, other_seed = loader(0), loader(1), loader(0, seed=1)
    epochs = [indices(no_worker), indices(no_worker)]
    assert epochs == [indices(one_worker), indices(one_worker)]
    assert len({*epochs[0], *epochs[1], *indices(other_seed)}) == 6  # a draw per sample, epoch and seed


def test_random_frames_are_the_same_in_every_validation(tmp_path):
    make_video(tmp_path / "long.mp4", frames=64)
    data = chat(tmp_path / "a.jsonl", row_about("long.mp4"))
    data.reader = MultiEncoder(["fake"], grid=(2, 1, 1), sampling="segment").reader
    data.val = data.train
    loader = data._val_dataloader()
    assert indices(loader) == indices(loader)


def test_validation_keeps_file_order_and_all_conversations(tmp_path, rows):
    data = chat(tmp_path / "a.jsonl", rows[0])
    data.val = Samples(data.train.files * 3)
    for _ in range(2):  # Lightning's sanity check leaves an epoch early
        loader = data._val_dataloader()
        assert [batch.kinds for batch in loader] == [[("who", "who")] * 2, [("who", "who")]]


def test_processes_share_an_epoch(files):
    origins = []
    for process in range(3):
        data = ChatData(files, num_workers=0, batch_size=1)
        data.rank_and_world_size = lambda process=process: (process, 3)
        data.setup()
        loader = data.train_dataloader()
        assert len(loader) == 4
        origins += [origin for batch in loader for origin in batch.origins]
    assert len(set(origins)) == len(origins) == 12


def test_features_in_memory_need_zero_workers(files, tmp_path):
    data = ChatData(files, num_workers=4)
    vision = MultiEncoder(["fake"])
    assert data.worker_count(vision.reader()) == data.worker_count(vision.reader(FeatureStore(tmp_path))) == 4
    assert data.worker_count(vision.reader(FeatureStore())) == 0


def test_invalid_options_are_errors(files):
    for options, name in (
        ({"batch_size": 0}, "batch_size"),
        ({"on_error": "ignore"}, "'ignore'"),
        ({"stream": True}, r"data\.batches_per_epoch"),
        ({"stream": True, "batches_per_epoch": 1}, r"data\.group_by_length"),
    ):
        with pytest.raises(DataError, match=name):
            ChatData(files, **options)


# Streams ------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """40 rows of text in four files; one row is malformed."""
    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for file in range(4):
        rows = [
            [{"role": "user", "content": f"{file}.{i}"}, {"role": "assistant", "content": "!"}]
            for i in range(10)
        ]
        rows[5][0]["role"] = "nobody" if file == 2 else "user"
        Dataset.from_dict({"messages": rows}).to_parquet(tmp_path / f"{file}.parquet")
    return str(tmp_path / "*.parquet")


def stream(parquet, workers=0, process=0, processes=1):
    options = {"stream": True, "batches_per_epoch": 7, "shuffle_buffer_size": 4}
    options |= {"on_error": "skip", "batch_size": 3}
    data = ChatData(parquet, num_workers=workers, **options)
    data.rank_and_world_size = lambda: (process, processes)
    data.setup()
    return data.train_dataloader()


def questions(batch) -> list[str]:
    return [turns[0]["content"] for group in batch.groups for turns in group]


@pytest.mark.parametrize(("workers", "processes", "batches"), [(0, 1, 14), (2, 1, 14), (0, 3, 5)])
def test_pass_over_a_stream_has_each_sample_once(parquet, workers, processes, batches):
    passes = [[], []]
    for process in range(processes):
        loader = stream(parquet, workers, process, processes)
        endless = (batch for _ in range(4) for batch in loader)
        for seen in passes:
            seen += [text for _ in range(batches) for text in questions(next(endless))]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(set(passes[0]))
    assert len(passes[0]) == 39
    assert passes[0] != passes[1]


@pytest.mark.parametrize(("workers", "after"), [(0, 1), (0, 9), (0, 17), (2, 3), (2, 16)])
def test_stream_resumes_at_the_next_batch(parquet, workers, after):
    whole, first, rest = (stream(parquet, workers) for _ in range(3))
    expected = [questions(batch) for _ in range(3) for batch in whole]
    batches = (batch for _ in range(3) for batch in first)
    seen = [questions(next(batches)) for _ in range(after)]
    rest.load_state_dict(json.loads(json.dumps(first.state_dict()), object_hook=_with_int_keys))
    seen += [questions(batch) for _ in range(3 - after // 7) for batch in rest]
    assert seen == expected


def test_closed_stream_has_no_workers(parquet):
    loader, before = stream(parquet, workers=2), set(multiprocessing.active_children())
    next(iter(loader))
    loader.close()
    assert set(multiprocessing.active_children()) <= before


def _with_int_keys(table):
    return {int(key) if key.isdigit() else key: value for key, value in table.items()}
