"""Files and streams of samples."""

import io
import json
import os
import pickle
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from datasets import Dataset, Image, IterableDataset, Video, config
from PIL import Image as Picture
from pyarrow import Table
from pyarrow.parquet import ParquetFile, write_table

from merv.data.samples import sample_of
from merv.data.sources import FilePart, expand, open_samples, stream_samples
from merv.errors import DataError, UnreadableVideo
from merv.testing import make_video
from merv.video.open import probe

TURNS = [{"from": "human", "value": "<image>\nWhät?"}, {"from": "gpt", "value": "A square."}]
ROW = {"video": "a.mp4", "conversations": TURNS}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` in the test's folder."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shard(path, **members: bytes):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def origins(samples) -> list[str]:
    return [sample.origin.rpartition("/")[2] for sample in samples]


def test_jsonl_rows_are_read_by_offset(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(ROW)}\n\n{json.dumps(ROW, ensure_ascii=False)}".encode())
    samples = open_samples(file)
    assert origins(samples) == ["a.jsonl:1", "a.jsonl:3"]
    assert samples[-1].conversations == samples[0].conversations
    assert samples[1].videos() == [str(tmp_path / "a.mp4")]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list_items_are_read_by_offset(tmp_path, indent):
    file = tmp_path / "a.json"
    rows = [{**ROW, "id": "ä"}, {**ROW, "video": "b.mp4"}, ROW]
    file.write_text(
        "\ufeff" * (indent is None) + json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8"
    )
    samples = open_samples(file, root="/clips")
    assert origins(samples) == ["a.json[0]", "a.json[1]", "a.json[2]"]
    assert samples[1].videos() == ["/clips/b.mp4"]


def test_windows_line_endings(tmp_path):
    rows = [{**ROW, "video": f"{i}.mp4"} for i in range(3)]
    (tmp_path / "a.json").write_bytes(json.dumps(rows, indent=1).replace("\n", "\r\n").encode())
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(map(json.dumps, rows)).encode())
    for name in "a.json", "a.jsonl":
        samples = open_samples(tmp_path / name, root="/clips")
        assert [sample.videos() for sample in samples] == [[f"/clips/{i}.mp4"] for i in range(3)]


def test_malformed_line_is_named_when_it_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b'\n{"a": NaN}\n\xff\n{\n')
    samples = open_samples(file)
    for index, reason in (1, "NaN"), (2, "utf-8"), (3, "JSON"):
        with pytest.raises(DataError, match=rf"a\.jsonl:{index + 1}: .*{reason}"):
            samples[index]
    assert samples[0].origin


def test_several_files_are_one_picklable_sequence(tmp_path):
    for name in "train-08", "train-09", "train-10", "val":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW))
    samples = open_samples([tmp_path / "train-{08..10}.jsonl", tmp_path / "v*.jsonl"])
    samples = pickle.loads(pickle.dumps(samples))
    assert len(samples) == 8
    assert origins(samples[3:8:2]) == ["train-09.jsonl:2", "train-10.jsonl:2", "val.jsonl:2"]
    with pytest.raises(IndexError):
        samples[8]


def test_braces_with_commas_list_words(tmp_path):
    for name in "train.json", "val.json":
        (tmp_path / name).touch()
    assert [path.name for path in expand(f"{tmp_path}/{{val,train}}.json")] == ["val.json", "train.json"]


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("empty.jsonl", b"\n", r"empty\.jsonl"),
        ("cut.json", b'[{"a": 1}, {"b"', r"cut\.json"),
        ("open.json", b'[{"a": 1}', r"open\.json"),
        ("latin.json", b'["\xe4"]', r"latin\.json: .*utf-8"),
        ("a.csv", b"a,b", r"a\.csv.* \.jsonl, \.json, \.parquet, \.tar"),
        ("a.parquet", b"PAR1" * 9, r"a\.parquet"),
        ("a.tar", b"no tar" * 999, r"a\.tar"),
    ],
)
def test_file_in_no_known_format_is_an_error(tmp_path, name, content, pattern):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=pattern):
        open_samples(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    for name, missing in ("none.jsonl", "none.jsonl"), ("*.tar", "*.tar"), ("a{0..1}.tar", "a0.tar"):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / missing))):
            open_samples(tmp_path / name)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        open_samples(tmp_path)


def test_shard_members_of_a_key_are_one_sample(tmp_path):
    video = make_video(tmp_path / "a.mp4").read_bytes()
    row = json.dumps({"conversations": TURNS}).encode()
    file = shard(tmp_path / "a.tar", x1__mp4=video, x1__json=row, x2__txt=b"A square.", x2__MP4=video)
    samples = open_samples(file)
    assert origins(samples) == ["x1", "x2"]
    for sample in samples:
        (clip,) = pickle.loads(pickle.dumps(sample.videos()))
        assert probe(clip).num_frames == 16
        assert clip.name == f"{sample.origin}.mp4"
    assert samples[1].conversations[0][-1]["content"] == "A square."


def shard_of(path, row: dict):
    """Write a shard with one sample: this row and two videos."""
    members = {"x.json": json.dumps(row).encode(), "x.0.mp4": b"0", "x.1.mp4": b"1"}
    return shard(path, **members)


def chat(*names: str, **keys) -> dict:
    """Return a row of chat messages whose content names these videos."""
    content = [{"type": "video", "video": name} for name in names]
    user = {"role": "user", "content": [*content, {"type": "text", "text": "?"}]}
    return {"messages": [user, {"role": "assistant", "content": "!"}], **keys}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(), ["x.0.mp4", "x.1.mp4"]),
        (chat(videos=["x.1.mp4", "x.0.mp4"]), ["x.1.mp4", "x.0.mp4"]),
        (chat("clips/x.1.MP4", "x.0.mp4", "x.1.mp4"), ["x.1.mp4", "x.0.mp4", "x.1.mp4"]),
        (chat("one.mp4", "two.mp4"), ["x.0.mp4", "x.1.mp4"]),
    ],
)
def test_members_of_a_shard_replace_the_files_that_a_row_names(tmp_path, row, expected):
    (sample,) = open_samples(shard_of(tmp_path / "a.tar", row))
    assert [video.name.rpartition("/")[2] for video in sample.videos()] == expected


@pytest.mark.parametrize("row", [chat("x.0.mp4"), chat("x.0.mp4", "y.mp4"), chat(video="y.mp4")])
def test_files_that_are_not_those_of_the_shard_are_named_with_the_members(tmp_path, row):
    samples = open_samples(shard_of(tmp_path / "a.tar", row))
    with pytest.raises(DataError, match=r"x: .*(x\.0|y)\.mp4.*x\.1\.mp4"):
        samples[0]


def test_object_over_several_lines_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"messages": []}, indent=1))
    with pytest.raises(DataError, match=r"a\.json: .*one object per line"):
        open_samples(tmp_path / "a.json")


FOREIGN = [
    "._0.json",
    ".DS_Store",
    ".json",
    "README",
    "readme.txt",
    "LICENSE.md",
    "Thumbs.db",
    "__MACOSX/0.json",
    "a/.cache/0.json",
    "./._1.mp4",
    "PaxHeaders.7/0.json",
    "pax_global_header",
]


def shard_with_foreign_members(path):
    """A shard as macOS and GNU tar write them: folders, PAX headers, a link, and files beside the samples."""
    row = json.dumps({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}).encode()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by hand"}) as tar:
        for name, kind in ("./", tarfile.DIRTYPE), ("./a", tarfile.DIRTYPE), ("l.json", tarfile.SYMTYPE):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.json" * (kind == tarfile.SYMTYPE)
            tar.addfile(member)
        for name in [*FOREIGN, "./0.json", f"./a/{'long' * 60}ä.json", "desktop.json"]:
            member = tarfile.TarInfo(name)
            content = b"\x00" if name in FOREIGN else row
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_members_of_a_shard_that_belong_to_no_sample_are_skipped_and_named(tmp_path):
    samples = open_samples(shard_with_foreign_members(tmp_path / "a.tar"))
    assert [sample.origin[len(f"{tmp_path}/a.tar/") :] for sample in samples] == [
        "./0", f"./a/{'long' * 60}ä", "desktop"
    ]  # fmt: skip
    assert samples.files[0].foreign == ["l.json", *FOREIGN]


def test_shard_without_any_sample_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar"):
        open_samples(shard(tmp_path / "a.tar", README=b"About this shard."))


def test_malformed_shard_sample_is_named_when_it_is_read(tmp_path):
    samples = open_samples(shard(tmp_path / "a.tar", x1__mp4=b"", x2__json=b"{"))
    with pytest.raises(DataError, match=r"a\.tar/x1: .*\.mp4"):
        samples[0]
    with pytest.raises(DataError, match=r"a\.tar/x2: .*JSON"):
        samples[1]


def test_file_part_reads_seeks_and_compares(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")
    part = FilePart(str(tmp_path / "f"), 2, 5, "part")
    assert (part.read(2), part.tell(), part.read(), part.read()) == (b"23", 2, b"456", b"")
    assert (part.seek(-2, io.SEEK_END), part.read(), part.seek(1), part.read(1)) == (3, b"56", 1, b"3")
    assert part == FilePart(str(tmp_path / "f"), 2, 5, "part") != FilePart(str(tmp_path / "f"), 3, 5, "part")
    assert len({part, FilePart(str(tmp_path / "f"), 2, 5, "part")}) == 1
    with pytest.raises(UnreadableVideo, match=r"^part: "):
        probe(part)


def test_saved_dataset_leaves_videos_undecoded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_video("a.mp4")
    table = Dataset.from_list([ROW, ROW]).cast_column("video", Video())
    table.save_to_disk("saved")
    samples = pickle.loads(pickle.dumps(open_samples("saved")))
    assert origins(samples) == ["saved[0]", "saved[1]"]
    assert probe(samples[1].videos()[0]).num_frames == 16


def parquet(path, rows: int):
    image = io.BytesIO()
    Picture.new("RGB", (6, 4)).save(image, "png")
    row = {"image": {"bytes": image.getvalue(), "path": None}, "conversations": TURNS, "video": None}
    table = Dataset.from_list([row] * rows).cast_column("image", Image())
    table.to_parquet(path)
    return path


def test_parquet_leaves_images_undecoded(tmp_path):
    samples = open_samples(parquet(tmp_path / "a.parquet", 2))
    assert probe(samples[1].videos()[0]).width == 6
    assert origins(samples) == ["a.parquet[0]", "a.parquet[1]"]


def test_stream_resumes_at_the_next_sample(tmp_path):
    file = parquet(tmp_path / "a.parquet", 3)
    stream = stream_samples(file)
    first = next(iter(stream))
    after = stream_samples(file)
    after.load_state_dict(stream.state_dict())
    assert origins([first, *after]) == ["a.parquet[0]", "a.parquet[1]", "a.parquet[2]"]
    assert probe(first.videos()[0]).width == 6


def test_shards_of_a_stream_are_the_whole_stream(tmp_path):
    rows = [
        {"messages": [{"role": r, "content": f"{r}{i}"} for r in ("user", "assistant")]} for i in range(5)
    ]
    stream = stream_samples(IterableDataset.from_generator(lambda: iter(rows)))
    questions = [s.conversations[0][0]["content"] for i in (0, 1) for s in stream.shard(i, 2)]
    assert sorted(questions) == [f"user{i}" for i in range(5)]


def test_malformed_row_of_a_stream_is_named():
    stream = stream_samples(IterableDataset.from_generator(lambda: iter([{"video": "a.mp4"}])))
    with pytest.raises(DataError, match=r"^stream\[0\]: .*'messages'"):
        next(iter(stream))


def test_source_that_cannot_be_streamed_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl"):
        stream_samples(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="'no/such'"):
        stream_samples("no/such")


@pytest.mark.parametrize(
    "text",
    ["[{row},]", "[{row} {row}]", "[{row}] more"],
)
def test_malformed_json_list_is_an_error(tmp_path, text):
    row = '{"messages": [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "b"}]}'
    (tmp_path / "a.json").write_text(text.replace("{row}", row))
    with pytest.raises(DataError, match=r"a\.json"):
        open_samples(str(tmp_path / "a.json"))


# Damage ---------------------------------------------------------------------------------------------------

QUESTION = {"question": "Why?", "answer": "So."}


def deep(depth: int = 100_000) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (deep(), "recursion"),
        (b'{"messages": ' + deep() + b"}", "recursion"),
        (b'{"messages": ' + b"1" * 5000 + b"}", "5000 digits"),
        (b'{"messages": 1e999}', "inf"),
        (b'"\xff"', "utf-8"),
        (b"\xff\xfe[\x00]\x00", "utf-8"),
        (b"3", "got 3"),
        (b"null", "got None"),
        (b'{"video": "\\ud800.mp4", "questions": [{"question": "?", "answer": "!"}]}', "ud800"),
        (b'{"video": "\\u0000.mp4", "questions": [{"question": "?", "answer": "!"}]}', "null byte"),
    ],
)
def test_malformed_line_is_an_error_with_its_number(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(
        json.dumps(ROW).encode() + b"\n" + line + b"\n" + json.dumps(ROW).encode()
    )
    samples = open_samples(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{reason}"):
        samples[1]
    assert len(samples[2].videos()) == 1


def test_deep_item_of_a_list_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[{}, " + deep() + b"]")
    with pytest.raises(DataError, match=r"a\.json: could not be read: item 1: .*recursion"):
        open_samples(tmp_path / "a.json")


def test_row_that_is_too_deep_to_be_shown_is_an_error():
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(DataError, match=r"^row 3: "):
        sample_of({"messages": value}, "row 3")


@pytest.mark.parametrize(
    "name", ["\0.jsonl", "\ud800.jsonl", "long" * 99 + ".jsonl", "~nobody-there/a.jsonl"]
)
def test_name_that_cannot_be_a_file_is_an_error(tmp_path, name):
    for path in name, tmp_path / name, str(tmp_path / f"*{name}"):
        with pytest.raises(DataError, match="No such data file"):
            open_samples(path)


def test_home_of_an_unknown_user_is_a_folder_name():
    row = {"video": "~nobody-there/a.mp4", "questions": [QUESTION]}
    assert sample_of(row, root=Path("/clips")).videos() == ["/clips/~nobody-there/a.mp4"]


def test_file_whose_name_is_not_utf8_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_text(json.dumps(ROW))
    assert open_samples(path)[0].origin == f"{path}:1"


def flipped(data: bytes, position: int, size: int = 1) -> bytes:
    return (
        data[:position]
        + bytes(255 - byte for byte in data[position : position + size])
        + data[position + size :]
    )


def damaged_parquet(path: Path, row_group: int) -> Path:
    """Write a file with 10 rows in a group, and damage its last group, which has this number."""
    rows = [{"video": f"{i}.mp4", "questions": [QUESTION]} for i in range(10 * (row_group + 1))]
    write_table(Table.from_pylist(rows), path, row_group_size=10)
    with ParquetFile(path) as file:
        page = file.metadata.row_group(row_group).column(0).data_page_offset
    path.write_bytes(flipped(path.read_bytes(), page, 30))
    return path


def test_damaged_row_group_is_named(tmp_path):
    path = damaged_parquet(tmp_path / "a.parquet", row_group=2)
    with pytest.raises(DataError, match=r"a\.parquet: could not be read: row group 2 \(rows 20 to 29\): "):
        open_samples(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table", None])
def test_file_that_is_no_parquet_is_an_error(tmp_path, content):
    whole = parquet(tmp_path / "whole.parquet", 2).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(DataError, match=r"a\.parquet: could not be read: "):
        open_samples(tmp_path / "a.parquet")


def test_damaged_offsets_of_a_saved_dataset_are_an_error(tmp_path):
    """Without validation, reading such a row ends the process with a segmentation fault."""
    rows = [{"video": f"{i}.mp4", "questions": [QUESTION]} for i in range(7)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    whole = path.read_bytes()
    offsets = b"".join((5 * n).to_bytes(4, "little") for n in range(8))  # of the paths
    assert whole.count(offsets) == 1
    path.write_bytes(flipped(whole, whole.index(offsets) + 12, 3))
    samples = open_samples(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved\[3\]: could not be read: "):
        samples[3]
    path.write_bytes(whole[:100])
    with pytest.raises(DataError, match="saved: could not be read: "):
        open_samples(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(DataError, match="saved: could not be read: "):
        open_samples(tmp_path / "saved")


def test_damaged_header_of_a_shard_is_an_error(tmp_path):
    """tarfile takes it for the end of the archive, and later samples would be lost silently."""
    row = json.dumps({"questions": [QUESTION], "image": "a"}).encode()
    whole = shard(tmp_path / "a.tar", x1__json=row, x2__json=row, x3__json=row).read_bytes()
    end = whole.rindex(row) // 512 * 512 + 512  # of the last member
    zeroed = whole[:1024] + bytes(512) + whole[1536:]  # as of a copy with a hole
    for damaged in flipped(whole, 1024 + 150), zeroed, whole[:1024], whole[:1300], whole[:end]:
        (tmp_path / "a.tar").write_bytes(damaged)
        at = end if damaged == whole[:end] else 1024
        with pytest.raises(
            DataError, match=rf"a\.tar: could not be read: .* at byte {at}, after {at // 1024} "
        ):
            open_samples(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole)
    assert len(open_samples(tmp_path / "a.tar")) == 3


def test_concatenated_shards_are_an_error(tmp_path):
    """tarfile ends at the zeros between them."""
    row = json.dumps({"questions": [QUESTION], "image": "a"}).encode()
    whole = shard(tmp_path / "a.tar", x1__json=row).read_bytes()
    (tmp_path / "a.tar").write_bytes(2 * whole)
    with pytest.raises(DataError, match="after 1 samples"):
        open_samples(tmp_path / "a.tar")


def test_a_block_of_rows_is_validated_once(tmp_path, monkeypatch):
    rows = [{"video": f"{i}.mp4", "questions": [QUESTION]} for i in range(30)]
    write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr("merv.data.sources.BLOCK_ROWS", 10)
    samples = open_samples(tmp_path / "a.parquet")
    for index in range(30):
        assert samples[index].videos() == [str(tmp_path / f"{index}.mp4")]
    assert samples.files[0].is_valid == {0: True, 1: True, 2: True}


def test_sparse_member_of_a_shard_is_an_error(tmp_path):
    with (tmp_path / "x1.mp4").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"1")
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", "x1.mp4"], cwd=tmp_path, check=True)
    with pytest.raises(DataError, match=r"a\.tar: .*x1\.mp4 .*sparse"):
        open_samples(tmp_path / "a.tar")


def test_damage_in_a_stream_is_named(tmp_path):
    path = damaged_parquet(tmp_path / "a.parquet", row_group=1)
    with pytest.raises(DataError, match=r"a\.parquet\[\d+\]: could not be read: "):
        list(stream_samples(path))
