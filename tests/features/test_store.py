"""FeatureStore: what is stored and found again, by whom, and what damage, kills and full disks do."""

import errno
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import grids
import pytest
import torch
from grids import some_grid, some_key
from safetensors.torch import load_file

from merv.errors import DataError
from merv.features import places, shard
from merv.features.direct import BLOCK
from merv.features.maintenance import collect_garbage, verify
from merv.features.shard import FeatureKey
from merv.features.store import FeatureStore
from merv.models.multi_encoder import MultiEncoder
from merv.training.module import encode_all
from merv.types import Grid


def filled(folder, count: int = 3, **options) -> FeatureStore:
    store = FeatureStore(folder, **options)
    for number in range(count):
        store.put(some_key(number), some_grid(number))
    store.flush()
    return store


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def assert_same(grid: Grid, expected: Grid) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(tensor, getattr(grid, name)), name
        assert tensor.dtype == getattr(grid, name).dtype, name


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("merv.features.store.VIDEOS_PER_SHARD", 2)


# What was put is what is got ---------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_get_returns_what_was_put(tmp_path, on_disk, dtype):
    store, grid = FeatureStore(tmp_path if on_disk else None), some_grid(dtype=dtype)
    assert store.get(some_key()) is None
    assert_same(store.put(some_key(), grid), grid)
    assert_same(store.get(some_key()), grid)  # before it is published
    store.flush()
    assert_same(store.get(some_key()), grid)


def test_another_process_sees_what_is_published(tmp_path):
    store, reader = FeatureStore(tmp_path), FeatureStore(tmp_path)
    store.put(some_key(), some_grid())
    assert reader.get(some_key()) is None
    store.flush()
    assert_same(reader.get(some_key()), some_grid())


def test_full_shards_are_published(tmp_path, small_shards):
    store = FeatureStore(tmp_path)
    for number in range(5):
        store.put_all({some_key(number, name): some_grid(number) for name in ("a", "b")})
    assert len(shards(tmp_path)) == 2  # of 2 videos with 2 encoders each
    assert len(FeatureStore(tmp_path)) == 8
    assert len(store) == 10


def test_shards_are_safetensors_files(tmp_path):
    filled(tmp_path)
    tensors = load_file(shards(tmp_path)[0])
    assert torch.equal(tensors[f"{some_key(1).id}/values"], some_grid(1).values)


@pytest.mark.parametrize("t", [1, 2, 3, 5])
def test_records_of_any_size_are_aligned(tmp_path, t):
    store = FeatureStore(tmp_path, dtype="int8")
    for number in range(3):
        store.put(some_key(number), some_grid(number, t=t))
    store.flush()
    assert all(record.offset % 8 == 0 for record in store.records())
    load_file(shards(tmp_path)[0])


def test_store_lists_what_it_has(tmp_path):
    store = filled(tmp_path)
    assert len(store) == 3
    assert {key.source for key in store} == {f"clips/{i}.mp4" for i in range(3)}
    assert some_key(1) in store
    assert some_key(9) not in store
    assert repr(store) == f"FeatureStore({tmp_path}: 3 videos, 1 encoder)"
    assert repr(FeatureStore()) == "FeatureStore(in memory: 0 videos, 0 encoders)"


def test_a_name_does_not_matter_for_finding_features(tmp_path):
    store = filled(tmp_path)
    renamed = FeatureKey(some_key(1).options, some_key(1).video, "other", "elsewhere.mp4")
    assert_same(store.get(renamed), some_grid(1))


def test_pickling_keeps_the_folder_and_the_options(tmp_path):
    store = pickle.loads(pickle.dumps(filled(tmp_path, dtype="float16", verify=False)))
    assert (len(store), store.dtype, store.verify) == (3, "float16", False)
    memory = FeatureStore()
    memory.put(some_key(), some_grid())
    assert len(pickle.loads(pickle.dumps(memory))) == 0


def test_features_stored_in_inference_mode_can_be_used_in_training():
    store = FeatureStore()
    with torch.inference_mode():
        store.put(some_key(), some_grid())
    linear = torch.nn.Linear(4, 2)
    linear(store.get(some_key()).values.float()).sum().backward()
    assert linear.weight.grad is not None


def test_features_of_the_encoders_come_back_bit_for_bit(tmp_path):
    model = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2))
    video = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    expected = model.features(video)
    with FeatureStore(tmp_path) as store:
        model.features(video, store=store)
    stored = model.features(video, store=FeatureStore(tmp_path, read_only=True))
    for name, grid in expected.items():
        assert_same(stored[name], grid)


# Smaller dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_values_are_stored_in_another_dtype(tmp_path, dtype, error):
    grid = some_grid(dtype=torch.float32)
    with FeatureStore(tmp_path, dtype=dtype) as store:
        returned = store.put(some_key(), grid)
    stored = FeatureStore(tmp_path).get(some_key())
    assert_same(stored, returned)
    assert stored.values.dtype == getattr(torch, dtype)
    assert (stored.values.float() - grid.values).abs().max() <= error * grid.values.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_has_a_scale_per_cell_and_gives_back_the_dtype(tmp_path, dtype):
    grid = some_grid(dtype=dtype)
    grid = Grid(
        grid.values * torch.logspace(-3, 3, 18).reshape(1, 2, 3, 3, 1).to(dtype),
        *list(vars(grid).values())[1:],
    )
    with FeatureStore(tmp_path, dtype="int8") as store:
        returned = store.put(some_key(), grid)
    stored = FeatureStore(tmp_path).get(some_key())
    assert_same(stored, returned)
    assert stored.values.dtype == dtype
    largest = grid.values.float().abs().amax(-1, keepdim=True)
    step = largest / 127
    assert ((stored.values.float() - grid.values.float()).abs() <= 0.51 * step + largest / 256).all()


def test_int8_refuses_infinite_values_and_keeps_zeros(tmp_path):
    store, grid = FeatureStore(tmp_path, dtype="int8"), some_grid(dtype=torch.float32)
    zeros = Grid(torch.zeros_like(grid.values), grid.times_s, grid.extent, grid.mask)
    assert (store.put(some_key(), zeros).values == 0).all()
    grid.values[0, 0, 0, 0, 0] = torch.inf
    with pytest.raises(DataError, match="int8"):
        store.put(some_key(1), grid)


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(DataError, match="int4"):
        FeatureStore(tmp_path, dtype="int4")


# Several folders, readers and writers ---------------------------------------------------------------


def test_several_folders_are_read_and_the_first_is_written(tmp_path):
    filled(tmp_path / "shared")
    store = FeatureStore([tmp_path / "mine", tmp_path / "shared"])
    assert_same(store.get(some_key(1)), some_grid(1))
    store.put(some_key(7), some_grid(7))
    store.flush()
    assert len(FeatureStore(tmp_path / "mine")) == 1
    assert len(FeatureStore(tmp_path / "shared")) == 3
    assert len(store) == 4


def test_folders_can_be_copied_into_each_other(tmp_path):
    filled(tmp_path / "a")
    other = FeatureStore(tmp_path / "b")
    other.put(some_key(5), some_grid(5))
    other.put(some_key(1), some_grid(1))
    other.flush()
    for path in shards(tmp_path / "b"):
        os.rename(path, tmp_path / "a" / path.name)
    merged = FeatureStore(tmp_path / "a")
    assert len(merged) == 4  # the repeated record counts once
    assert_same(merged.get(some_key(5)), some_grid(5))


def test_any_address_of_fsspec_is_a_store():
    store = filled("memory://merv-test/features")
    assert len(FeatureStore("memory://merv-test/features")) == 3
    assert_same(FeatureStore("memory://merv-test/features").get(some_key(2)), some_grid(2))
    assert "memory://merv-test/features" in repr(store)
    assert verify(store) == (3, [])


def write_some(folder, start):
    with FeatureStore(folder) as store:
        for number in range(start, start + 5):
            store.put(some_key(number), some_grid(number))


def test_processes_write_to_one_folder(tmp_path, small_shards):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_some, args=(tmp_path, start)) for start in (0, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = FeatureStore(tmp_path)
    assert len(store) == 8
    assert verify(store) == (10, [])
    for number in range(8):
        assert_same(store.get(some_key(number)), some_grid(number))


def test_a_forked_process_does_not_publish_for_its_parent(tmp_path):
    store = FeatureStore(tmp_path)
    store.put(some_key(), some_grid())
    child = multiprocessing.get_context("fork").Process(target=store.flush)
    child.start()
    child.join()
    assert not shards(tmp_path)
    assert_same(store.get(some_key()), some_grid())
    store.flush()
    assert len(FeatureStore(tmp_path)) == 1


def test_a_forked_process_writes_to_a_file_of_its_own(tmp_path):
    store = FeatureStore(tmp_path)
    store.put(some_key(0), some_grid(0))

    def put_in_child():
        store.put(some_key(1), some_grid(1))
        store.flush()

    child = multiprocessing.get_context("fork").Process(target=put_in_child)
    child.start()
    child.join()
    store.put(some_key(2), some_grid(2))
    store.flush()
    assert verify(FeatureStore(tmp_path)) == (3, [])


def test_a_reader_survives_that_shards_are_merged(tmp_path):
    for number in range(4):
        filled_one = FeatureStore(tmp_path)
        filled_one.put(some_key(number), some_grid(number))
        filled_one.flush()
    reader = FeatureStore(tmp_path)
    assert len(reader) == 4
    collect_garbage(FeatureStore(tmp_path))
    for number in range(4):
        assert_same(reader.get(some_key(number)), some_grid(number))


# Kills ----------------------------------------------------------------------------------------------

WRITER = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from grids import some_grid, some_key
    from merv.features.store import FeatureStore
    store = FeatureStore({folder!r})
    for number in range(3):
        store.put(some_key(number), some_grid(number))
    {end}
"""


def run_writer(folder, end):
    code = textwrap.dedent(WRITER.format(tests=os.path.dirname(grids.__file__), folder=str(folder), end=end))
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode


def test_the_end_of_the_process_publishes(tmp_path):
    assert run_writer(tmp_path, "pass") == 0
    assert len(shards(tmp_path)) == 1
    assert len(FeatureStore(tmp_path)) == 3


def test_nothing_that_a_killed_process_had_put_is_lost(tmp_path):
    assert run_writer(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    assert len(FeatureStore(tmp_path, read_only=True)) == 0  # readers do not write
    store = FeatureStore(tmp_path)
    store.put(some_key(9), some_grid(9))
    store.flush()
    assert verify(store) == (4, [])
    for number in (0, 1, 2, 9):
        assert_same(store.get(some_key(number)), some_grid(number))
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def leftover(folder) -> bytes:
    """A file as a killed process leaves it, with three records."""
    run_writer(folder, "os.kill(os.getpid(), signal.SIGKILL)")
    (path,) = folder.glob(".shard.*")
    return path


@pytest.mark.parametrize("end", [1000, -3 * BLOCK, 100 - BLOCK])  # in the header, and in the last block
def test_a_torn_leftover_is_removed(tmp_path, end):
    path = leftover(tmp_path)
    path.write_bytes(path.read_bytes()[:end])
    filled(tmp_path, count=1)
    assert not path.exists()
    assert verify(FeatureStore(tmp_path)) == (1, [])


# Damage ---------------------------------------------------------------------------------------------


def test_any_flipped_bit_is_found(tmp_path, caplog):
    filled(tmp_path, count=2)
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 61):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        store = FeatureStore(tmp_path)
        assert verify(store)[1], bit
        for number in range(2):
            grid = store.get(some_key(number))
            if grid is not None:
                assert_same(grid, some_grid(number))


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_shard_that_was_cut_short_is_found(tmp_path, caplog, size):
    filled(tmp_path)
    (path,) = shards(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    store = FeatureStore(tmp_path)
    assert [damage.shard for damage in verify(store)[1]] == [str(path)]
    assert store.get(some_key(2)) is None
    assert path.name in caplog.text


def test_damaged_features_are_computed_and_stored_again(tmp_path, caplog):
    model, video = MultiEncoder(["fake"], grid=(4, 2, 2)), torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    with FeatureStore(tmp_path) as store:
        expected = model.features(video, store=store)["fake"]
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for attempt in range(2):
        caplog.clear()
        with FeatureStore(tmp_path) as store:
            assert_same(model.features(video, store=store)["fake"], expected)
        assert bool(caplog.records) == (attempt == 0)
    assert verify(FeatureStore(tmp_path)) == (1, [])  # the same features give the same shard


def test_a_damaged_record_is_stored_in_another_shard(tmp_path, caplog):
    filled(tmp_path)
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with FeatureStore(tmp_path) as store:
        assert store.get(some_key(2)) is None
        store.put(some_key(2), some_grid(2))
    assert len(shards(tmp_path)) == 2
    assert_same(FeatureStore(tmp_path).get(some_key(2)), some_grid(2))
    assert collect_garbage(FeatureStore(tmp_path)).shards_after == 1
    assert verify(FeatureStore(tmp_path)) == (3, [])


def test_digests_are_not_compared_without_verify(tmp_path):
    filled(tmp_path, count=1)
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert FeatureStore(tmp_path, verify=False).get(some_key(0)) is not None
    assert FeatureStore(tmp_path).get(some_key(0)) is None


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    filled(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no shard")
    (tmp_path / "failed.jsonl").touch()
    assert len(FeatureStore(tmp_path)) == 3


def test_a_store_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "ab").mkdir()
    with pytest.raises(DataError, match="older version"):
        FeatureStore(tmp_path)


def test_a_shard_of_a_newer_format_is_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shard, "FORMAT", "2")
    filled(tmp_path)
    monkeypatch.undo()
    assert len(FeatureStore(tmp_path)) == 0
    assert "format 2" in caplog.text


# Disks ------------------------------------------------------------------------------------------------


def failing_write(monkeypatch, code, after: int = 0):
    """Let the system call that writes fail after some calls, in the middle of the data."""
    calls, write = [], os.pwrite

    def pwrite(file, data, offset):
        calls.append(offset)
        if len(calls) > after:
            write(file, bytes(data)[: len(data) // 2], offset)
            raise OSError(code, os.strerror(code))
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("after", range(9))  # two for each video, and one at the end
def test_a_full_disk_loses_nothing_and_is_warned_about_once(tmp_path, monkeypatch, caplog, after):
    store = FeatureStore(tmp_path)
    failing_write(monkeypatch, errno.ENOSPC, after)
    for number in range(4):
        assert_same(store.put(some_key(number), some_grid(number)), some_grid(number))
    monkeypatch.undo()
    store.flush()
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) <= 1
    assert all("No space left" in r.getMessage() and str(tmp_path) in r.getMessage() for r in warnings)
    again = FeatureStore(tmp_path)
    valid, damaged = verify(again)
    assert not damaged
    for number in range(4):
        grid = again.get(some_key(number))
        assert (grid is not None) == (number < valid)
        if grid is not None:
            assert_same(grid, some_grid(number))


def test_what_cannot_be_published_stays_for_the_next_process(tmp_path, monkeypatch, caplog):
    store = FeatureStore(tmp_path)
    store.put(some_key(), some_grid())

    def refuse(*_args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    store.flush()
    monkeypatch.undo()
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith(".shard."))
    assert str(left) in caplog.text
    assert store.read_only
    left.rename(left.with_name(left.name.replace(f".{os.getpid()}.", ".9999999.")))  # as of an ended process
    with FeatureStore(tmp_path) as again:
        again.put(some_key(1), some_grid(1))
    assert verify(FeatureStore(tmp_path)) == (2, [])


def test_leftovers_in_a_read_only_folder_do_not_matter(tmp_path, monkeypatch):
    leftover(tmp_path)

    def refuse(*_args, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("merv.features.store.recover", refuse)
    FeatureStore(tmp_path).recover()


def test_a_damaged_shard_is_healed_while_it_is_open(tmp_path, caplog):
    store = filled(tmp_path, count=1)
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert store.get(some_key()) is None
    store.put(some_key(), some_grid())
    store.flush()
    assert_same(store.get(some_key()), some_grid())


def test_a_read_only_folder_is_read(tmp_path, monkeypatch, caplog):
    filled(tmp_path, count=1)
    store = FeatureStore(tmp_path)

    def refuse(*_args, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(places.LocalFolder, "temporary", refuse)
    for number in range(3):
        assert store.get(some_key(number)) is None or number == 0
        assert_same(store.put(some_key(number), some_grid(number)), some_grid(number))
    assert store.read_only
    assert len(caplog.records) == 1
    assert "Read-only file system" in caplog.text


def test_a_store_that_is_read_only_by_choice_writes_nothing(tmp_path):
    store = FeatureStore(tmp_path, read_only=True)
    assert_same(store.put(some_key(), some_grid()), some_grid())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_that_is_only_read_must_exist(tmp_path, read_only):
    folders = [tmp_path / "none"] if read_only else [tmp_path / "mine", tmp_path / "none"]
    with pytest.raises(DataError, match="none"):
        FeatureStore(folders, read_only=read_only)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("path", ["file", "file/store", "\0", "\ud800", "x" * 300])
def test_unusable_folder_is_an_error_at_once(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / path))} .*feature_store"):
        FeatureStore(tmp_path / path)


def test_training_goes_on_with_a_full_disk(tmp_path, monkeypatch):
    vision, clips = MultiEncoder(["fake"], grid=(4, 2, 2)), torch.randint(256, (3, 8, 3, 32, 32)).byte()
    expected = vision.features(list(clips))["fake"].values
    store = FeatureStore(tmp_path)
    vision.features([clips[0]], store=store)
    failing_write(monkeypatch, errno.ENOSPC)
    for _ in range(2):
        assert torch.equal(vision.features(list(clips), store=store)["fake"].values, expected)
    monkeypatch.undo()
    store.flush()
    with FeatureStore(tmp_path) as again:  # as in a new run, with space
        vision.features(list(clips), store=again)
    assert verify(FeatureStore(tmp_path)) == (3, [])


def test_encoding_ahead_ends_when_nothing_can_be_stored(tmp_path, monkeypatch):
    model = SimpleNamespace(
        vision=MultiEncoder(["fake"], grid=(4, 2, 2)), feature_store=FeatureStore(tmp_path)
    )
    failing_write(monkeypatch, errno.ENOSPC)
    clips = list(torch.randint(256, (3, 8, 3, 32, 32)).byte())
    encoded = []
    encode_all(model, [(str(n), clip) for n, clip in enumerate(clips)], should_stop=lambda: encoded.append(1))
    assert len(encoded) == 2  # the second time, the store is read-only


# Maintenance ------------------------------------------------------------------------------------------


def test_small_shards_are_merged_bit_for_bit(tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr("merv.features.maintenance.VIDEOS_PER_SHARD", 2)
    for number in range(5):
        with FeatureStore(tmp_path, dtype="int8") as store:
            store.put_all({some_key(number, name): some_grid(number) for name in ("a", "b")})
    before = {key.id: FeatureStore(tmp_path).get(key) for key in FeatureStore(tmp_path)}
    done = collect_garbage(FeatureStore(tmp_path))
    assert (done.shards_before, done.shards_after, done.dropped) == (5, 3, 0)
    after = FeatureStore(tmp_path)
    assert {key.id for key in after} == set(before)
    for key in after:
        assert_same(after.get(key), before[key.id])
    assert collect_garbage(FeatureStore(tmp_path)).shards_after == 3  # nothing is left to do


def test_repeats_and_encoders_that_are_not_kept_are_dropped(tmp_path):
    for numbers in (1, 2), (2, 1):
        with FeatureStore(tmp_path) as store:
            for number in numbers:
                store.put_all({some_key(number, name): some_grid() for name in ("a", "b")[:number]})
    done = collect_garbage(FeatureStore(tmp_path), lambda record: record.key.encoder == "a")
    assert (done.shards_before, done.shards_after, done.dropped) == (2, 1, 4)
    assert sorted(key.video for key in FeatureStore(tmp_path)) == ["video 1", "video 2"]


def test_gc_deletes_nothing_when_the_disk_fails(tmp_path, monkeypatch):
    for number in range(3):
        with FeatureStore(tmp_path) as store:
            store.put(some_key(number), some_grid(number))

    def refuse(*_args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("preadv", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, refuse)
            with pytest.raises(DataError, match="Nothing was deleted"):
                collect_garbage(FeatureStore(tmp_path))
        assert verify(FeatureStore(tmp_path)) == (3, [])


def test_gc_leaves_shards_of_another_format_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "FORMAT", "2")
    filled(tmp_path)
    monkeypatch.undo()
    assert collect_garbage(FeatureStore(tmp_path)).shards_after == 1


def test_a_shard_that_goes_away_while_it_is_listed_is_left_out(tmp_path, monkeypatch):
    filled(tmp_path)
    names = os.listdir(tmp_path)
    monkeypatch.setattr(os, "listdir", lambda folder: [*names, f"{'0' * 32}.safetensors"])
    assert len(FeatureStore(tmp_path)) == 3


def test_an_interrupt_while_a_shard_is_finished_loses_nothing(tmp_path):
    end = "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGINT); store.flush()"
    assert run_writer(tmp_path, end) != 0
    with FeatureStore(tmp_path) as store:
        store.put(some_key(9), some_grid(9))
    assert verify(FeatureStore(tmp_path)) == (4, [])


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    store, grid = FeatureStore(tmp_path, dtype="float16"), some_grid(dtype=torch.float32)
    grid.values[0, 0, 0, 0, 0] = 1e6
    with pytest.raises(DataError, match="float16"):
        store.put(some_key(), grid)


def test_an_interrupted_upload_can_be_repeated(monkeypatch):
    store = FeatureStore("memory://interrupted")
    store.put(some_key(), some_grid())
    files = store.places[0].files
    upload = type(files).put_file
    monkeypatch.setattr(type(files), "put_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.flush()
    assert_same(store.get(some_key()), some_grid())
    monkeypatch.setattr(type(files), "put_file", upload)
    store.flush()
    assert_same(FeatureStore("memory://interrupted").get(some_key()), some_grid())


def test_a_flush_that_was_interrupted_at_its_end_can_be_repeated(tmp_path, monkeypatch):
    store = filled(tmp_path, 0)
    store.put(some_key(), some_grid())
    replace = os.replace

    def interrupted(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.flush()
    store.flush()
    assert not store.read_only
    assert verify(FeatureStore(tmp_path)) == (1, [])


def test_a_key_that_is_put_twice_is_written_once(tmp_path):
    with FeatureStore(tmp_path) as store:
        store.put(some_key(), some_grid())
        store.put(some_key(), some_grid())
    (path,) = shards(tmp_path)
    assert {name.partition("/")[0] for name in load_file(path)} == {some_key().id}


def test_an_empty_store_is_not_false():
    assert FeatureStore()


def test_a_folder_that_was_deleted_is_a_warning_at_exit(tmp_path):
    end = f"import shutil; shutil.rmtree({str(tmp_path)!r})"
    assert run_writer(tmp_path, end) == 0


def test_only_one_folder_is_collected(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="one folder"):
        collect_garbage(FeatureStore([tmp_path / "a", tmp_path / "b"]))
