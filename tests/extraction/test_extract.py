"""merv extract and merv store: from files to features, embeddings and neighbors."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import av
import numpy as np
import pytest
import torch
from media import make_video
from pyarrow import parquet
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from merv.cli.main import main
from merv.encoders.fake import Fake
from merv.errors import DataError
from merv.extraction.extract import extract
from merv.extraction.videos import Item, Items
from merv.features.dataset import videos_of
from merv.features.maintenance import verify
from merv.features.reader import Reader
from merv.features.store import FeatureStore
from merv.models.multi_encoder import MultiEncoder
from merv.video.sampling import Sampling


@pytest.fixture
def clips(tmp_path):
    """A folder with three different clips, and one that is no video."""
    folder = tmp_path / "clips"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("a.mp4", "b.mp4", "below/c.mp4")):
        make_video(folder / name, frames=8 + 4 * number)
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "readme.txt").touch()
    return folder


def extract_to(store, *arguments, encoders=("fake",)) -> int:
    grid = ("--grid", "4", "2", "2", "--num-workers", "0")
    return main(["extract", *map(str, arguments), "--out", str(store), "--encoders", *encoders, *grid])


# Sources -------------------------------------------------------------------------------------------


def test_folders_patterns_and_files_are_sources(clips):
    names = [os.path.relpath(item.name, clips) for item in Items([clips])]
    assert len(Items([clips, f"{clips}/*.mp4"])) == 4  # each once, and no source is empty
    assert names == ["a.mp4", "b.mp4", "bad.mp4", "below/c.mp4"]
    assert [item.name for item in Items([f"{clips}/[ab].mp4"])] == [f"{clips}/a.mp4", f"{clips}/b.mp4"]
    assert len(Items([clips / "a.mp4", clips])) == 4  # each once


def test_rows_of_data_files_are_sources(clips, tmp_path):
    rows = [
        {"video": name, "questions": [{"question": "?", "answer": "!"}]}
        for name in ("a.mp4", "b.mp4", "a.mp4")
    ]
    file = clips / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n{}\n")
    items = Items([file])
    assert [os.path.basename(item.name) for item in items] == ["a.mp4", "b.mp4", "train.jsonl:4"]
    assert items[2].error


def test_videos_in_a_shard_are_named_by_it(clips, tmp_path):
    row = {"questions": [{"question": "?", "answer": "!"}]}
    (tmp_path / "row.json").write_text(json.dumps(row))
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(tmp_path / "row.json", "000.json")
        shard.add(clips / "a.mp4", "000.mp4")
    assert extract_to(tmp_path / "store", tmp_path / "s.tar") == 0
    (key,) = FeatureStore(tmp_path / "store")
    assert key.source == f"{tmp_path}/s.tar/000"


@pytest.mark.parametrize("source", ["none", "none*.mp4"])
def test_a_source_without_videos_is_an_error(tmp_path, source):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / source, tmp_path / "empty"):
        with pytest.raises(DataError, match=path.name.replace("*", r"\*")):
            Items([path])


# Extraction ----------------------------------------------------------------------------------------


def test_features_are_those_of_the_encoders(clips, tmp_path, capsys):
    store = tmp_path / "store"
    assert extract_to(store, clips, encoders=("fake", "fake/video")) == 1
    out = capsys.readouterr().out
    assert "3 encoded, 0 already stored, 1 failed" in out
    model = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2))
    stored = FeatureStore(store)
    for name in ("a.mp4", "b.mp4", "below/c.mp4"):
        for encoder, grid in model.features(clips / name).items():
            kept = stored.get(model.key(clips / name, encoder))
            assert all(torch.equal(tensor, vars(kept)[field]) for field, tensor in vars(grid).items())


def test_failures_are_listed(clips, tmp_path):
    extract_to(tmp_path / "store", clips)
    (line,) = (tmp_path / "store" / "failed.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert failure["source"] == str(clips / "bad.mp4")
    assert failure["error"] == "UnreadableVideo"


def test_a_second_extraction_computes_nothing(clips, tmp_path, capsys, monkeypatch):
    (clips / "bad.mp4").unlink()
    assert extract_to(tmp_path / "store", clips) == 0
    before = sorted(os.listdir(tmp_path / "store"))
    monkeypatch.setattr(MultiEncoder, "encode", None)  # it must not be called
    assert extract_to(tmp_path / "store", clips) == 0
    assert "0 encoded, 3 already stored" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "store")) == before


def test_an_encoder_that_is_added_is_the_only_one_computed(clips, tmp_path, monkeypatch):
    (clips / "bad.mp4").unlink()
    extract_to(tmp_path / "store", clips)
    encoded, encode = [], MultiEncoder.encode

    def watched(self, clips):
        encoded.extend(clips[0].frames)
        return encode(self, clips)

    monkeypatch.setattr(MultiEncoder, "encode", watched)
    assert extract_to(tmp_path / "store", clips, encoders=("fake", "fake/video")) == 0
    assert encoded == ["fake_video"] * 3
    assert len(FeatureStore(tmp_path / "store")) == 6


def test_workers_read_the_videos(clips, tmp_path):
    (clips / "bad.mp4").unlink()
    model = MultiEncoder(["fake"], grid=(4, 2, 2))
    with FeatureStore(tmp_path / "a") as store:
        result = extract(model, Items([clips]), store, num_workers=2)
    assert (result.encoded, result.failures) == (3, [])
    again = extract(model, Items([clips]), FeatureStore(tmp_path / "a"), num_workers=2)
    assert (again.encoded, again.stored) == (0, 3)
    assert result.decode_cpu_s > 0


def test_a_full_disk_is_an_error_that_keeps_what_is_stored(clips, tmp_path, capsys, monkeypatch):
    (clips / "bad.mp4").unlink()
    calls, write = [], os.pwrite

    def full(*arguments):
        calls.append(1)
        if len(calls) > 3:  # two for each video
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    assert extract_to(tmp_path / "store", clips) == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.undo()
    assert extract_to(tmp_path / "store", clips) == 0
    assert verify(FeatureStore(tmp_path / "store")) == (3, [])


def test_a_failure_that_cannot_be_listed_is_an_error(clips, tmp_path, capsys):
    assert extract_to(tmp_path / "store", clips, "--failed", tmp_path / "none" / "failed.jsonl") == 2
    assert "--failed" in capsys.readouterr().err


def test_features_that_cannot_be_stored_are_failures(clips, tmp_path, monkeypatch):
    (clips / "bad.mp4").unlink()
    encode, calls = Fake.encode, []

    def sometimes_infinite(self, pixels):
        calls.append(1)
        return encode(self, pixels) / (len(calls) != 1)

    monkeypatch.setattr(Fake, "encode", sometimes_infinite)
    assert extract_to(tmp_path / "store", clips, "--store-dtype", "int8") == 1
    (line,) = (tmp_path / "store" / "failed.jsonl").read_text().splitlines()
    assert "int8" in json.loads(line)["reason"]
    assert len(FeatureStore(tmp_path / "store")) == 2


@pytest.mark.parametrize(
    "option", [("--grid", "1", "1", "1"), ("--num-frames", "fake=3"), ("--start-s", "1")]
)
def test_options_beside_a_recipe_are_an_error(clips, tmp_path, capsys, option):
    arguments = ["extract", str(clips), "--out", str(tmp_path / "store"), "--config", "demo", *option]
    assert main(arguments) == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--num-frames", "fake=abc"), ("--num-workers", "-1"), ("--device", "foo")]
)
def test_an_invalid_option_is_named(clips, tmp_path, capsys, option):
    try:
        status = extract_to(tmp_path / "store", clips, *option)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert option[0] in capsys.readouterr().err


def test_an_error_of_a_plug_in_in_a_worker_is_its_own(clips, tmp_path, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("my own mistake")

    monkeypatch.setattr(Reader, "read", broken)
    model, store = MultiEncoder(["fake"], grid=(4, 2, 2)), FeatureStore(tmp_path / "store")
    result = extract(model, Items([clips / "a.mp4"]), store, num_workers=1)
    assert result.failures[0].reason == "my own mistake"


def test_a_batch_has_the_features_of_its_videos(clips, tmp_path, monkeypatch):
    extract_to(tmp_path / "one", clips, encoders=("fake", "fake/video"))
    encode, calls = Fake.encode, []

    def counting(self, pixels):
        calls.extend([len(pixels)] * (self.spec.window_size == 1))
        return encode(self, pixels)

    monkeypatch.setattr(Fake, "encode", counting)
    extract_to(tmp_path / "all", clips, "--batch-size", "2", encoders=("fake", "fake/video"))
    one, together = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "all")
    assert set(one) == set(together)
    for key in one:
        for field, tensor in vars(one.get(key)).items():
            torch.testing.assert_close(getattr(together.get(key), field), tensor)

    assert calls == [16, 4, 8, 8]  # 8 and 12 distinct frames of two videos together, 16 of one


def test_a_video_of_a_batch_that_fails_does_not_cost_the_others(clips, tmp_path, monkeypatch):
    encode = Fake.encode

    def failing(self, pixels):
        if len(pixels) in (24, 4):  # the batch, and the rest of b.mp4, which has 12 frames
            raise DataError("cannot be encoded")
        return encode(self, pixels)

    monkeypatch.setattr(Fake, "encode", failing)
    items = [Item(name, clips / name) for name in ("a.mp4", "b.mp4", "below/c.mp4")]
    store = FeatureStore(tmp_path / "store")
    result = extract(MultiEncoder(["fake"], grid=(4, 2, 2)), items, store, batch_size=3)
    assert [failure.source for failure in result.failures] == ["b.mp4"]
    assert sorted(key.source for key in store) == ["a.mp4", "below/c.mp4"]


def test_a_copy_in_the_same_batch_is_stored_once(clips, tmp_path):
    shutil.copy(clips / "a.mp4", clips / "copy.mp4")
    extract_to(tmp_path, clips / "a.mp4", clips / "copy.mp4", "--batch-size", "2")
    (shard,) = tmp_path.glob("*.safetensors")
    assert len(load_file(shard)) == 4  # the tensors of one record


def test_a_gpu_without_memory_is_an_error_that_names_the_option(clips, tmp_path, monkeypatch, capsys):
    def full(self, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Fake, "encode", full)
    assert extract_to(tmp_path, clips, "--batch-size", "2") == 2
    assert "--batch-size" in capsys.readouterr().err


# Windows -------------------------------------------------------------------------------------------


def test_each_window_has_the_features_of_its_range(clips, tmp_path, capsys):
    (clips / "bad.mp4").unlink()
    assert extract_to(tmp_path / "store", clips, "--window", "0.2", "--pool", tmp_path / "out.parquet") == 0
    out = capsys.readouterr().out
    assert "7 windows in" in out  # of 8, 12 and 16 frames at 25 per second
    assert "3 videos, 1 encoder" in out
    store = FeatureStore(tmp_path / "store")
    windows = [v for v in videos_of(store) if v.source.startswith(str(clips / "below"))]
    ranges = [(0.0, 0.2), (0.2, 0.4), (0.4, 0.64)]  # the rest is too short
    assert [v.source for v in windows] == [f"{clips / 'below/c.mp4'}@{a:g}-{b:g}" for a, b in ranges]
    for video, (start_s, end_s) in zip(windows, ranges, strict=True):
        model = MultiEncoder(["fake"], grid=(4, 2, 2), sampling=Sampling(start_s=start_s, end_s=end_s))
        expected = model.features(clips / "below/c.mp4")["fake"]
        assert torch.equal(video.read(store, "fake").values, expected.values)
        assert torch.equal(video.read(store, "fake").times_s, expected.times_s)
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    np.testing.assert_allclose([(r["start_s"], r["end_s"]) for r in rows[-3:]], ranges, atol=1e-9)


def test_near_asks_for_one_window_of_several(clips, tmp_path, capsys):
    (clips / "bad.mp4").unlink()
    extract_to(tmp_path, clips, "--window", "0.2")
    assert main(["store", "near", str(tmp_path), str(clips / "a.mp4")]) == 2
    assert "2 windows of" in " ".join(capsys.readouterr().err.split())
    assert main(["store", "near", str(tmp_path), f"{clips / 'a.mp4'}@0-0.2"]) == 0


def test_windows_are_stored_once(clips, tmp_path, capsys):
    (clips / "bad.mp4").unlink()
    for _ in range(2):
        assert extract_to(tmp_path / "store", clips, "--window", "0.2", "--num-workers", "2") == 0
    assert "7 already stored" in capsys.readouterr().out
    assert len(FeatureStore(tmp_path / "store")) == 7


def test_a_video_without_a_second_window_is_whole(clips, tmp_path):
    extract_to(tmp_path / "store", clips / "a.mp4")
    extract_to(tmp_path / "store", clips / "a.mp4", "--window", "10")
    assert len(FeatureStore(tmp_path / "store")) == 1


def test_a_window_that_is_too_short_is_refused(clips, tmp_path, capsys):
    with pytest.raises(SystemExit):
        extract_to(tmp_path / "store", clips, "--window", "0.05")
    assert "expected a number of seconds of at least 0.1" in capsys.readouterr().err


def test_limit_counts_videos(clips, tmp_path):
    assert extract_to(tmp_path / "store", clips, "--limit", "2") == 0
    assert len(FeatureStore(tmp_path / "store")) == 2


@pytest.mark.parametrize("kind", [EOFError, ConnectionError, RuntimeError])
def test_an_error_without_workers_is_not_that_of_a_killed_one(clips, tmp_path, monkeypatch, kind):
    def broken(self, pixels):
        raise kind("of the encoder")

    monkeypatch.setattr(Fake, "encode", broken)
    with pytest.raises(kind, match="of the encoder"):
        extract(MultiEncoder(["fake"]), [Item("a", clips / "a.mp4")], FeatureStore())


class Killing(list):
    """Kills the worker process that asks for the last item, as a full memory does."""

    def __getitem__(self, index):
        if get_worker_info() and index == len(self) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_killed_worker_is_an_error_and_loses_nothing(tmp_path):
    videos = torch.randint(256, (6, 1, 3, 16, 16), dtype=torch.uint8)
    items = Killing([Item(f"{number}.mp4", video) for number, video in enumerate(videos)])
    model, store = MultiEncoder(["fake"], grid=(4, 2, 2)), FeatureStore(tmp_path / "store")
    with pytest.raises(DataError, match=r"killed while it read one of .*5\.mp4"):
        extract(model, items, store, num_workers=1)
    valid, damaged = verify(FeatureStore(tmp_path / "store"))
    assert damaged == []
    assert valid >= 3  # the worker reads two videos ahead of the one that is encoded


SCRIPT = """
import os, signal, sys
from merv.cli.main import main
from merv.models.multi_encoder import MultiEncoder
features, left = MultiEncoder.features, [int(sys.argv[1])]
def killing(self, *args, **options):
    left[0] -= 1
    result = features(self, *args, **options)
    if left[0] == 0:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return result
MultiEncoder.features = killing
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_an_extraction_that_was_stopped_goes_on(clips, tmp_path, capsys, name):
    (clips / "bad.mp4").unlink()
    arguments = ["extract", str(clips), "--out", str(tmp_path / "store"), "--encoders", "fake"]
    arguments += ["--grid", "4", "2", "2", "--num-workers", "0"]
    subprocess.run([sys.executable, "-c", SCRIPT, "2", name, *arguments], check=False, capture_output=True)
    assert main(arguments) == 0
    assert "1 encoded, 2 already stored" in capsys.readouterr().out
    assert verify(FeatureStore(tmp_path / "store")) == (3, [])


def test_gc_of_a_folder_that_is_not_there_creates_nothing(tmp_path):
    assert main(["store", "gc", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_one_of_encoders_config_and_model_is_needed(clips, tmp_path, capsys):
    assert main(["extract", str(clips), "--out", str(tmp_path / "store")]) == 2
    assert "--config" in capsys.readouterr().err


def test_the_encoders_of_a_saved_model(clips, tmp_path):
    (clips / "bad.mp4").unlink()
    model = MultiEncoder(["fake"], grid=(4, 1, 1))
    model.save_pretrained(tmp_path / "model")
    arguments = ["extract", str(clips), "--out", str(tmp_path / "store"), "--model", str(tmp_path / "model")]
    assert main([*arguments, "--num-workers", "0"]) == 0
    assert model.key(clips / "a.mp4", "fake") in FeatureStore(tmp_path / "store")


def test_options_of_the_encoders_are_used(clips, tmp_path):
    (clips / "bad.mp4").unlink()
    options = ("--preset", "fake=upstream", "--num-frames", "fake=8", "--store-dtype", "bfloat16")
    assert extract_to(tmp_path / "store", clips, *options) == 0
    model = MultiEncoder(["fake"], grid=(4, 2, 2), presets={"fake": "upstream"}, num_frames={"fake": 8})
    grid = FeatureStore(tmp_path / "store").get(model.key(clips / "a.mp4", "fake"))
    assert grid.values.dtype == torch.bfloat16


# merv store ----------------------------------------------------------------------------------------


@pytest.fixture
def store(clips, tmp_path):
    (clips / "bad.mp4").unlink()
    extract_to(tmp_path / "store", clips, encoders=("fake", "fake/video"))
    return tmp_path / "store"


def run(capsys, *arguments) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["store", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_ls_lists_videos_and_encoders(store, clips, capsys):
    lines = run(capsys, "ls", store)[1].splitlines()
    assert [line.split()[0] for line in lines] == [str(clips / n) for n in ("a.mp4", "b.mp4", "below/c.mp4")]
    assert lines[0].endswith("fake, fake_video")
    row = json.loads(run(capsys, "ls", store, "--json")[1].splitlines()[0])
    assert row["encoders"] == ["fake", "fake_video"]


def test_stats_show_sizes_and_options(store, capsys):
    out = run(capsys, "stats", store)[1]
    assert "3 videos, " in out
    assert "in 1 files" in out
    assert "fake_video: 3 records" in out
    assert '"merv.encoders.fake:Fake"' in out


def test_verify_finds_damage_and_gc_removes_it(store, capsys):
    assert run(capsys, "verify", store) == (0, "6 records are valid, 0 things are damaged.\n")
    (path,) = store.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    status, out = run(capsys, "verify", store)
    assert status == 1
    assert path.name in out
    assert run(capsys, "gc", store)[0] == 0
    assert run(capsys, "verify", store) == (0, "5 records are valid, 0 things are damaged.\n")


def test_gc_keeps_some_encoders(store, capsys):
    assert "3 records dropped" in run(capsys, "gc", store, "--keep", "fake")[1]
    assert {key.encoder for key in FeatureStore(store)} == {"fake"}
    assert main(["store", "gc", str(store), "--keep", "clip"]) == 2


def test_a_copy_of_a_video_is_its_nearest_neighbor(clips, tmp_path, capsys):
    (clips / "bad.mp4").unlink()
    with av.open(str(clips / "a.mp4")) as source, av.open(str(clips / "a_copy.mp4"), "w") as copy:
        stream = copy.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for frame in source.decode(video=0):
            copy.mux(stream.encode(frame.reformat(32, 24)))
        copy.mux(stream.encode())
    extract_to(tmp_path / "store", clips)
    out = run(capsys, "near", tmp_path / "store", clips / "a.mp4", "-k", "1")[1]
    assert out.split()[1] == str(clips / "a_copy.mp4")
    assert main(["store", "near", str(tmp_path / "store"), "none.mp4"]) == 2


def test_embeddings_are_means_over_valid_cells(store, clips, tmp_path, capsys):
    run(capsys, "export", store, tmp_path / "out.parquet")
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(rows) == 6
    model = MultiEncoder(["fake"], grid=(4, 2, 2))
    grid = model.features(clips / "a.mp4")["fake"]
    (row,) = (r for r in rows if r["source"] == str(clips / "a.mp4") and r["encoder"] == "fake")
    assert grid.mask.all()
    np.testing.assert_allclose(row["embedding"], grid.values.mean((0, 1, 2, 3)), rtol=1e-5)
    run(capsys, "export", store, tmp_path / "steps.parquet", "--per-step", "--encoders", "fake")
    steps = parquet.read_table(tmp_path / "steps.parquet").to_pylist()
    assert [(row["start_s"] + row["end_s"]) / 2 for row in steps[:4]] == pytest.approx(
        grid.times_s[0].tolist()
    )
    assert [row["start_s"] for row in steps[1:4]] == [row["end_s"] for row in steps[:3]]
    np.testing.assert_allclose(steps[1]["embedding"], grid.values[0, 1].mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("form", ["numpy", "webdataset"])
def test_features_are_exported(store, clips, tmp_path, capsys, form):
    assert run(capsys, "export", store, tmp_path / "out", "--format", form)[0] == 0
    if form == "webdataset":
        with tarfile.open(tmp_path / "out" / "features-000000.tar") as shard:
            shard.extractall(tmp_path / "out", filter="data")
    arrays = np.load(tmp_path / "out" / "000000.npz")
    grid = MultiEncoder(["fake"], grid=(4, 2, 2)).features(clips / "a.mp4")["fake"]
    np.testing.assert_array_equal(arrays["fake.values"], grid.values[0])
    np.testing.assert_array_equal(arrays["fake.times_s"], grid.times_s[0])


def test_own_grids_of_encoders_are_stored(clips, tmp_path, capsys):
    arguments = ["--out", tmp_path, "--encoders", "fake", "fake/video", "--num-workers", "0", "--own-grid"]
    assert main(["extract", *map(str, [clips / "a.mp4", *arguments])]) == 0
    model = MultiEncoder(["fake", "fake/video"])
    clip = model.read(clips / "a.mp4")
    for name, (own,) in model.encode([clip]).items():
        stored = next(v for v in videos_of(FeatureStore(tmp_path))).read(FeatureStore(tmp_path), name)
        assert torch.equal(stored.values, own.values)
        assert torch.equal(stored.times_s, own.times_s)


def test_grid_and_own_grid_exclude_each_other(clips, tmp_path, capsys):
    assert extract_to(tmp_path / "store", clips, "--own-grid") == 2
    assert "--grid T H W or --own-grid" in capsys.readouterr().err


def test_pool_per_step_has_a_row_for_each_step(clips, tmp_path, capsys):
    assert extract_to(tmp_path / "store", clips / "a.mp4", "--per-step") == 2
    assert "--pool" in capsys.readouterr().err
    extract_to(tmp_path / "store", clips / "a.mp4", "--per-step", "--pool", tmp_path / "out.parquet")
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    duration_s = 8 / 25
    assert [row["start_s"] for row in rows] == pytest.approx([duration_s * i / 4 for i in range(4)])
    assert rows[-1]["end_s"] == pytest.approx(duration_s)


def test_pool_writes_embeddings_of_this_extraction(clips, tmp_path):
    (clips / "bad.mp4").unlink()
    extract_to(tmp_path / "store", clips / "a.mp4")
    extract_to(tmp_path / "store", clips / "b.mp4", "--pool", tmp_path / "out.parquet")
    (row,) = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert row["source"] == str(clips / "b.mp4")


def test_estimate_is_the_size_of_the_values(capsys):
    out = run(capsys, "estimate", "--encoders", "fake", "--videos", "1000", "--grid", "4", "2", "2")[1]
    assert "1000 videos: 0.6 MB" in out  # 16 cells × (8 channels × 4 bytes + 1), 4 times, 4 edges


@pytest.mark.parametrize("form", ["numpy", "webdataset"])
def test_export_replaces_no_folder(store, tmp_path, capsys, form):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for out in (tmp_path / "mine", store):
        assert main(["store", "export", str(store), str(out), "--format", form]) == 2
        assert "exists" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert len(FeatureStore(store)) == 6
    assert main(["store", "export", str(store), str(tmp_path / "mine")]) == 2  # a Parquet file


def test_near_uses_the_encoders_of_the_query(store, clips, capsys):
    extract_to(store, clips / "a.mp4", "--preset", "fake=upstream")
    assert len(run(capsys, "near", store, clips / "b.mp4")[1].splitlines()) == 2
    assert main(["store", "near", str(store), str(clips / "a.mp4")]) == 2  # no other has this setting


def test_a_folder_without_features_is_no_store(tmp_path, capsys):
    assert main(["store", "ls", str(tmp_path)]) == 2
    assert "merv extract" in capsys.readouterr().err


def test_two_settings_of_one_encoder_have_two_names(store, clips, capsys):
    extract_to(store, clips, "--preset", "fake=upstream")
    names = {name for video in videos_of(FeatureStore(store)) for name in video.keys}
    assert len(names) == 3
    assert sum(name.startswith("fake-") for name in names) == 2
