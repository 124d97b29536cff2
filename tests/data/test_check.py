"""A data set with many kinds of damage among valid rows of every form: each damage is one finding."""

import gzip
import io
import json
import os
import re
import signal
import sys
import tarfile
import wave
import zlib
from dataclasses import dataclass
from pathlib import Path

import media
import numpy as np
import pytest
from datasets import Dataset, Image, Video, config
from llama_tokenizer import write_llama_tokenizer
from PIL import Image as Picture
from pyarrow import Table
from pyarrow.parquet import ParquetFile, write_table

from merv.cli import main as cli
from merv.cli.data import write_clean
from merv.data.check import Report, check_data
from merv.data.sources import open_samples
from merv.errors import UnreadableVideo
from merv.testing import make_video, tiny_llm

A, B = "a.mp4", "b.mp4"


def ours(name: str, video, answer="Yes.", **more) -> dict:
    return {"video": video, "questions": [{"question": f"{name}?", "answer": answer, **more}]}


def messages(*turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def llava(name: str, *values, **files) -> dict:
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"id": name, "conversations": turns, **files}


def message_about(name: str, part) -> dict:
    return messages(("user", [part, {"type": "text", "text": name}]), ("assistant", "Yes."))


# name: (a row, or a line of text; kind of the finding; pattern of a value that its reason names)
DAMAGE = {
    "missing video": (ours("1", "none.mp4"), "media", r"none\.mp4"),
    "missing image": (llava("2", "<image>2?", "Yes.", image="none.png"), "media", r"none\.png"),
    "absolute path of another machine": (ours("3", "/data/none/a.mp4"), "media", "/data/none/a.mp4"),
    "dangling link": (ours("4", "link.mp4"), "media", r"link\.mp4"),
    "empty folder": (ours("5", "folder"), "media", "folder"),
    "pipe": (ours("6", "pipe.mp4"), "media", r"pipe\.mp4"),
    "empty video": (ours("7", "empty.mp4"), "media", r"empty\.mp4"),
    "video cut off": (ours("8", "cut.mp4"), "media", r"cut\.mp4"),
    "video with a hole": (ours("9", "hole.mp4"), "media", r"hole\.mp4: .* 8 "),
    "video of zeros": (ours("10", "zeros.mp4"), "media", r"zeros\.mp4"),
    "video of noise": (ours("11", "noise.mp4"), "media", r"noise\.mp4"),
    "text as video": (ours("12", "text.mp4"), "media", r"text\.mp4"),
    "sound only": (ours("13", "sound.mp4"), "media", r"sound\.mp4"),
    "playlist": (ours("14", "list.m3u8"), "media", r"list\.m3u8"),
    "one frame": (ours("15", "frame.mp4"), "media", r"frame\.mp4"),
    "one pixel": (llava("16", "<image>?", "Yes.", image="pixel.png"), "media", r"pixel\.png: 1×1"),
    "image cut off": (llava("17", "<image>17", "Yes.", image="cut.jpg"), "media", r"cut\.jpg"),
    "page of an error as image": (llava("18", "<image>", "Yes.", image="page.jpg"), "media", r"page\.jpg"),
    "image too large": (llava("19", "<image>19", "Yes.", image="huge.png"), "media", "max_pixels"),
    "URL": (ours("20", "https://host/a.mp4"), "row", "https://host/a.mp4"),
    "data URL": (
        message_about("21", {"type": "image_url", "image_url": "data:image/png;base64,"}),
        "row",
        "data:image/png;base64,",
    ),
    "path is a number": (ours("22", 3), "row", "got 3"),
    "path is empty": (ours("23", ""), "row", "got ''"),
    "no JSON": ('{"video": "a.mp4", ', "row", "JSON"),
    "two objects on a line": ("{}{}", "row", "JSON"),
    "not an object": ("[1, 2]", "row", r"\[1, 2\]"),
    "wrong encoding": ('{"video": "\udce4.mp4"}', "row", "utf-8"),
    "NaN": ('{"video": "a.mp4", "questions": NaN}', "row", "NaN"),
    "no known key": ({"path": A, "caption": "Yes."}, "row", r"\['caption', 'path'\]"),
    "no video": ({"questions": [{"question": "?", "answer": "!"}]}, "row", "'video' or an 'image'"),
    "no questions": ({"video": A, "questions": []}, "row", r"'questions' .*got \[\]"),
    "questions are a text": ({"video": A, "questions": "Why?"}, "row", "'questions' .*got 'Why"),
    "question without answer": ({"video": A, "questions": [{"question": "?"}]}, "row", "'answer'; got None"),
    "null answer": (ours("33", A, None), "row", "'answer'; got None"),
    "answer is a number": (ours("34", A, 3), "row", "'answer'; got 3"),
    "half of a surrogate pair": (ours("\ud83d", A), "row", r"\\ud83d"),
    "half of a surrogate pair in an answer": (ours("a", A, "\udc00 is it"), "row", r"\\udc00"),
    "half of a surrogate pair in a path": (ours("b", "\ud83d.mp4"), "row", r"\\ud83d"),
    "half of a surrogate pair in a kind": (ours("c", A, kind="\ud83d"), "row", r"\\ud83d"),
    "empty answer": (ours("35", A, ""), "row", "assistant .*''"),
    "answer of spaces": (ours("36", A, " \n"), "row", "assistant .*' "),
    "kind is a list": (ours("37", A, kind=["count"]), "row", r"'kind' .*\['count'\]"),
    "no messages": ({"messages": []}, "row", r"'messages' .*got \[\]"),
    "messages are texts": ({"messages": ["Hm?", "Ah."]}, "row", r"'messages' .*got \['Hm"),
    "no role": ({"messages": [{"content": "Hm?"}]}, "row", "role None"),
    "unknown role": (messages(("user", "?"), ("tool", "x")), "row", "role 'tool'"),
    "two users in a row": (
        messages(("user", "?"), ("user", "?"), ("assistant", "x")),
        "row",
        r"\['user', 'user', 'assistant'\]",
    ),
    "ends with the user": (
        messages(("user", "?"), ("assistant", "x"), ("user", "?")),
        "row",
        r"\['user', 'assistant', 'user'\]",
    ),
    "begins with the assistant": (
        messages(("assistant", "x"), ("user", "?")),
        "row",
        r"\['assistant', 'user'\]",
    ),
    "only a system": (messages(("system", "Be brief.")), "row", r"\['system'\]"),
    "empty question": (messages(("user", ""), ("assistant", "x")), "row", "user .*''"),
    "content is null": (messages(("user", None), ("assistant", "x")), "row", "'content' .*got None"),
    "content is an object": (
        messages(("user", {"text": "?"}), ("assistant", "x")),
        "row",
        "'content' .*got {'text'",
    ),
    "text of a part is a list": (message_about("50", {"type": "text", "text": ["?"]}), "row", r"\['\?'\]"),
    "unknown type of part": (message_about("51", {"type": "audio", "audio": "a.wav"}), "row", "'audio'"),
    "video in an answer": (
        messages(("user", "?"), ("assistant", [{"type": "video", "video": A}])),
        "row",
        "assistant",
    ),
    "placeholder without a file": (llava("53", "<image>?", "Yes."), "row", "1 placeholder.* 0 file"),
    "more placeholders than files": (
        llava("54", "<image><image>", "x", image="a.png"),
        "row",
        "2 placeholder.* 1 file",
    ),
    "more files than placeholders": (
        llava("55", "<image>", "x", image=["a.png"] * 2),
        "row",
        "1 placeholder.* 2 file",
    ),
    "a placeholder of the wrong kind": (
        llava("56", "<image><image>", "x", image="a.png", video=A),
        "row",
        r"\['image', 'image'\], .*'video': 1",
    ),
    "files in two ways": (
        {**message_about("57", {"type": "video", "video": A}), "video": B},
        "row",
        "'content' and under 'video'",
    ),
    "private character": (ours("\ue000", A), "row", "U\\+E000"),
    "too long": (messages(("user", "word " * 2000), ("assistant", "x")), "length", "2500 .*2000"),
    "twice": (ours("valid", A), "duplicate", r"valid\.jsonl:1"),
    "twice, of a copy": (ours("valid", "copy.mp4"), "duplicate", r"valid\.jsonl:1"),
    "video of evaluation": (ours("62", "test_copy.mp4"), "leak", r"test_copy\.mp4 .*test\.jsonl:1"),
    "text of evaluation": (
        messages(("user", "What is 2 + 2?"), ("assistant", "4")),
        "leak",
        r"test\.jsonl:2",
    ),
}
FILES = {
    "none.jsonl": r"none\.jsonl",
    "empty.jsonl": r"empty\.jsonl",
    "cut.json": r"cut\.json",
    "a.csv": r"a\.csv.*\.jsonl",
    "cut.parquet": r"cut\.parquet",
    "packed.tar": r"packed\.tar",
    "cut.tar": r"cut\.tar",
}
VALID = {
    "valid.jsonl": [
        ours("valid", A),
        ours("more", B, kind="why"),
        ours("copied", "copy.mp4"),
        message_about("image", {"type": "image", "image": "a.png"}),
        message_about("frames", {"type": "video", "video": "frames"}),
        messages(
            ("system", "Be brief."),
            ("user", "Hm?"),
            ("assistant", "Ah."),
            ("user", "And?"),
            ("assistant", "So."),
        ),
        messages(("user", "What is it?"), ("assistant", "A cat.")),
        message_about("gif", {"type": "video", "video": "a.gif"}),
    ],
    "valid.json": [llava("a", "<image>\nWhat?", "Ä.", image="a.png"), llava("b", "Why?", "So.", video=A)],
}


@dataclass
class Checked:
    folder: Path
    report: Report
    origins: dict[str, str]


def make_media(folder: Path) -> None:
    clips = {A: 16, B: 20, "test.mp4": 24, "frame.mp4": 1}
    data = {name: make_video(folder / name, frames=frames).read_bytes() for name, frames in clips.items()}
    image = io.BytesIO()
    Picture.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(image, "png")
    photo = io.BytesIO()
    Picture.open(image).save(photo, "jpeg", quality=95)
    huge = bytearray(image.getvalue())
    huge[16:24] = (10_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    written = {
        "copy.mp4": data[A],
        "test_copy.mp4": data["test.mp4"],
        "cut.mp4": data[A][:700],
        "empty.mp4": b"",
        "zeros.mp4": bytes(9000),
        "noise.mp4": np.random.default_rng(1).bytes(9000),
        "text.mp4": b"a cat\n" * 99,
        "list.m3u8": b"#EXTM3U\n#EXTINF:2\na.ts\n",
        "a.png": image.getvalue(),
        "cut.jpg": photo.getvalue()[:2000],
        "page.jpg": b"<html>404 Not Found</html>",
        "huge.png": bytes(huge),
    }
    for name, content in written.items():
        (folder / name).write_bytes(content)
    media.overwrite(media.make_video(folder / "hole.mp4", 80, options={"g": "10"}), 0.3, 0.6)
    media.make_gif(folder / "a.gif", [100, 100])
    media.make_folder(folder / "frames", ["1.png", "2.png"])
    Picture.new("RGB", (1, 1)).save(folder / "pixel.png")
    with wave.open(str(folder / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    (folder / "folder").mkdir()
    (folder / "link.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")


def make_tables(folder: Path) -> None:
    """Valid samples in a shard, a Parquet file and a saved dataset, and damaged copies of the files."""
    turns = llava("", "<video>\nIn a table?", "Yes.")["conversations"]
    with tarfile.open(folder / "valid.tar", "w") as tar:
        tar.add(folder / B, "x1.mp4")
        tar.add(folder / "a.png", "x2.png")
        for name, text in ("x1.json", json.dumps({"conversations": turns})), ("x2.txt", "Noise."):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    with tarfile.open(folder / "packed.tar", "w:gz") as tar:
        tar.add(folder / B, "x1.mp4")
    turns[0]["value"] = "<image>\nIn a table?"
    rows = [{"image": {"bytes": (folder / "a.png").read_bytes(), "path": None}, "conversations": turns}]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / "valid.parquet")
    rows = [{"video": str(folder / A), "conversations": llava("", "Saved?", "Yes.")["conversations"]}]
    Dataset.from_list(rows).cast_column("video", Video()).save_to_disk(folder / "saved")
    for name in "valid.parquet", "valid.tar":
        (folder / name.replace("valid", "cut")).write_bytes((folder / name).read_bytes()[:900])


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Checked:
    folder = tmp_path_factory.mktemp("set")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(config, "HF_DATASETS_CACHE", folder / "cache")
        make_media(folder)
        make_tables(folder)
        lines = [row if isinstance(row, str) else json.dumps(row) for row, *_ in DAMAGE.values()]
        Path("damaged.jsonl").write_text("\n".join(lines), "utf-8", errors="surrogateescape")
        Path("valid.jsonl").write_text("\n".join(map(json.dumps, VALID["valid.jsonl"])))
        Path("valid.json").write_text(json.dumps(VALID["valid.json"], indent=1))
        Path("empty.jsonl").touch()
        Path("cut.json").write_text('[{"video": ')
        Path("a.csv").write_text("a,b")
        evaluation = ours("test", "test.mp4"), messages(("user", "what is 2 + 2? "), ("assistant", "4"))
        Path("test.jsonl").write_text("\n".join(map(json.dumps, evaluation)))
        files = ["valid.jsonl", "valid.json", "valid.tar", "valid.parquet", "saved", "damaged.jsonl", *FILES]
        report = check_data(files, media="decode", max_tokens=2000, against=["test.jsonl"])
    origins = {name: f"damaged.jsonl:{n}" for n, name in enumerate(DAMAGE, start=1)}
    return Checked(folder, report, {**origins, **dict(zip(FILES, FILES, strict=True))})


EXPECTED = {name: (kind, reason) for name, (_, kind, reason) in DAMAGE.items()}
EXPECTED |= {name: ("file", reason) for name, reason in FILES.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_damage_is_one_finding_with_origin_and_reason(checked, name):
    kind, reason = EXPECTED[name]
    (finding,) = [finding for finding in checked.report.invalid if finding.origin == checked.origins[name]]
    assert finding.kind == kind
    assert re.search(reason, finding.reason), finding.reason


def test_valid_rows_of_every_form_have_no_finding(checked):
    assert {finding.origin for finding in checked.report.invalid} <= set(checked.origins.values())
    assert checked.report.valid == list(range(14))
    assert len(checked.report.samples) == 14 + len(DAMAGE)


def test_copies_are_notes_and_stay_valid(checked):
    reasons = [finding.reason for finding in checked.report.notes]
    assert any({"copy.mp4", "a.mp4"} <= set(reason.split()) for reason in reasons)
    assert len(reasons) == 3  # this, and the two files of the shard


def test_report_counts_rows_and_measures_media(checked):
    counts, numbers = checked.report.counts, checked.report.numbers
    assert counts["rows"] == {"valid": 14, "invalid": len(DAMAGE)}
    assert counts["rows by content"]["image"] >= 4
    assert max(numbers["duration_s"]) == 24 / 8
    assert max(numbers["turns"]) == 5


def test_clean_list_in_another_folder_has_only_valid_rows(checked, tmp_path, monkeypatch):
    monkeypatch.chdir(checked.folder)
    write_clean(checked.report, tmp_path / "new" / "clean.jsonl")
    again = check_data(tmp_path / "new" / "clean.jsonl", media="decode", against=["test.jsonl"])
    assert len(again.valid) == 14
    assert not again.invalid
    before = [checked.report.samples[i] for i in checked.report.valid]
    assert [s.kinds for s in open_samples(tmp_path / "new" / "clean.jsonl")] == [s.kinds for s in before]


def test_interrupted_copy_of_a_video_is_copied_again(checked, tmp_path, monkeypatch):
    def stop(source, out):
        out.write(source.read(9))
        raise KeyboardInterrupt

    monkeypatch.chdir(checked.folder)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfileobj", stop)
        with pytest.raises(KeyboardInterrupt):
            write_clean(checked.report, tmp_path / "clean.jsonl")
    write_clean(checked.report, tmp_path / "clean.jsonl")
    assert not check_data(tmp_path / "clean.jsonl", num_workers=0).invalid
    assert not list(tmp_path.glob("*/.*"))


def test_workers_give_the_same_report(checked, monkeypatch):
    monkeypatch.chdir(checked.folder)
    reports = [check_data(["valid.jsonl", "damaged.jsonl"], media="none", num_workers=n) for n in (0, 2)]
    assert reports[0].invalid == reports[1].invalid
    assert reports[0].numbers == reports[1].numbers


def write(path: Path, *rows: dict) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_tokenizer_measures_the_rendered_conversation(tmp_path):
    file = write(tmp_path / "a.jsonl", ours("Why", "none.mp4", "So."))
    report = check_data(file, media="none", tokenizer=tiny_llm()[1], visual_tokens=100)
    assert report.numbers["tokens"] == [
        100 + len(["<s>", "<|user|>", "</s>", "<|assistant|>", "</s>"]) + len("Why?So.")
    ]


def test_conversation_that_the_template_rejects_is_invalid(tmp_path):
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    report = check_data(
        write(tmp_path / "a.jsonl", messages(("user", "?"), ("assistant", "!"))), tokenizer=tokenizer
    )
    assert "no system, please" in report.invalid[0].reason


def test_evaluation_question_about_another_video_is_a_note(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", ours("Why", f"{name}.mp4")) for name in "ab"]
    report = check_data(files[0], media="none", against=files[1])
    assert report.valid == [0]
    assert [finding.kind for finding in report.notes] == ["leak"]


def test_question_repeated_in_its_row_is_a_note(tmp_path):
    row = ours("Why", "a.mp4")
    report = check_data(write(tmp_path / "a.jsonl", {**row, "questions": row["questions"] * 2}), media="none")
    assert (report.valid, len(report.notes)) == ([0], 1)


def turns_about(video: str, *texts: str) -> dict:
    return llava("", *texts, video=video)


def test_follow_up_questions_about_a_video_are_one_note(tmp_path):
    rows = [ours("Why", "a.mp4"), *(turns_about("a.mp4", f"{n}?", "Yes.", "And?", "No.") for n in range(3))]
    report = check_data(write(tmp_path / "a.jsonl", *rows), media="none")
    assert len(report.valid) == 4
    (note,) = report.notes
    assert (note.kind, note.origin) == ("row", f"{tmp_path}/a.jsonl:2")
    assert "3 of 4 rows" in note.reason
    assert "'questions'" in note.reason


def test_conversations_of_one_question_are_no_note(tmp_path):
    rows = [
        turns_about("a.mp4", "Why?", "So."),
        {
            **messages(("system", "Be brief."), ("user", "<video>Why?"), ("assistant", "So.")),
            "video": "b.mp4",
        },
        messages(("user", "Hm?"), ("assistant", "Ah."), ("user", "And?"), ("assistant", "So.")),  # no video
    ]
    assert not check_data(write(tmp_path / "a.jsonl", *rows), media="none").notes


def test_foreign_members_of_a_shard_are_one_note(tmp_path):
    row = json.dumps(messages(("user", "Why?"), ("assistant", "So."))).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in ("x1.json", row), ("._x1.json", b"\x00\x05"), (".DS_Store", b""):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    report = check_data(tmp_path / "a.tar")
    (note,) = report.notes
    assert (report.valid, report.invalid) == ([0], [])
    assert (note.origin, note.kind) == (f"{tmp_path}/a.tar", "file")
    assert "2 members" in note.reason
    assert "._x1.json, .DS_Store" in note.reason


@pytest.mark.skipif(os.name == "nt" or not os.getuid(), reason="root can read every file")
def test_video_without_read_permission_is_invalid(tmp_path):
    make_video(tmp_path / "a.mp4").chmod(0)
    report = check_data(write(tmp_path / "a.jsonl", ours("Why", "a.mp4")))
    assert "Permission denied" in report.invalid[0].reason


def test_command_prints_and_writes_reports_and_clean_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_video("a.mp4")
    tiny_llm("llm")
    many = [ours(f"{n}", "none.mp4") for n in range(30)]
    write(Path("a.jsonl"), ours("Why", "a.mp4"), *many)
    arguments = ["data", "check", "a.jsonl", "--num-workers", "0", "--report", "out", "--llm", "llm"]
    assert cli.main([*arguments, "--clean", "clean.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert "| rows | 30 invalid, 1 valid |" in printed
    assert printed.count("none.mp4: ") == 20
    assert "a.jsonl:2: none.mp4: " in printed
    assert "10 more" in printed
    assert Path("out/report.md").read_text().count("none.mp4: ") == 30
    assert len(json.loads(Path("out/report.json").read_text())["invalid"]) == 30
    assert cli.main(["data", "check", "clean.jsonl", "--num-workers", "0"]) == 0
    assert "| rows | 1 valid |" in capsys.readouterr().out


def test_lengths_are_those_of_the_tokenizer_file(tmp_path):
    file = write_llama_tokenizer(tmp_path)
    roles = ["user", "assistant", "user", "assistant"]
    row = messages(*zip(roles, "abcd", strict=True))
    write(tmp_path / "a.jsonl", row)
    arguments = ["data", "check", str(tmp_path / "a.jsonl"), "--num-workers", "0", "--llm", str(tmp_path)]
    assert cli.main([*arguments, "--report", str(tmp_path / "out")]) == 0
    text = "<s>In: a\nOut: b</s>In: c\nOut: d</s>"
    tokens = json.loads((tmp_path / "out/report.json").read_text())["quantiles"]["tokens"]
    assert tokens["max"] == len(file.encode(text, add_special_tokens=False).ids)


def test_folder_without_a_tokenizer_is_an_error(tmp_path, capsys):
    assert cli.main(["data", "check", "a.jsonl", "--llm", str(tmp_path)]) == 2
    assert f"tokenizer from {str(tmp_path)!r}" in capsys.readouterr().err


# Whatever happens in one file, the others are checked ----------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unexpected_error_is_a_finding(tmp_path, monkeypatch, num_workers):
    def open_video(source):
        if "b.mp4" in source:
            raise ZeroDivisionError("no frames")
        raise UnreadableVideo(f"{source}: not a video.")

    monkeypatch.setattr("merv.data.check.open_video", open_video)
    report = check_data(
        write(tmp_path / "a.jsonl", *(ours(n, f"{n}.mp4") for n in "abc")), num_workers=num_workers
    )
    assert ["ZeroDivisionError" in finding.reason for finding in report.invalid] == [False, True, False]
    assert "b.mp4" in report.invalid[1].reason


def test_killed_workers_are_findings_and_lose_nothing(tmp_path, monkeypatch):
    """Three of 40 videos end the process that reads them; all others get their own finding."""
    deadly = {"3": signal.SIGKILL, "4": signal.SIGUSR1, "38": signal.SIGKILL}

    def open_video(source):
        if number := deadly.get(Path(source).stem):
            os.kill(os.getpid(), number)
        raise UnreadableVideo(f"{source}: not a video.")

    monkeypatch.setattr("merv.data.check.open_video", open_video)
    file = write(tmp_path / "a.jsonl", *(ours(str(n), f"{n}.mp4") for n in range(40)))
    report = check_data(file, num_workers=2)
    assert [finding.origin for finding in report.invalid] == [f"{file}:{n}" for n in range(1, 41)]
    killed = {
        int(finding.origin.rpartition(":")[2]) - 1: finding.reason
        for finding in report.invalid
        if "the process that read it" in finding.reason
    }
    assert list(killed) == [3, 4, 38]
    for number, reason in killed.items():
        assert f"{number}.mp4: " in reason


NOT_UTF8 = os.fsdecode(b"\xff")


@pytest.fixture
def bad_files(tmp_path, monkeypatch) -> dict[str, str]:
    """A folder `data` with one damaged file of each kind and a valid one; name → pattern of its finding."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    row = ours("Why", "none.mp4")
    content = json.dumps(messages(("user", "Why?"), ("assistant", "So."))).encode()
    write_table(Table.from_pylist([row] * 20), folder / "whole", row_group_size=10)
    table = bytearray((folder / "whole").read_bytes())
    with ParquetFile(folder / "whole") as file:
        page = file.metadata.row_group(1).column(0).data_page_offset
    (folder / "whole").unlink()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as shard:
        for n in range(2):
            member = tarfile.TarInfo(f"{n}.json")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    Dataset.from_list([row] * 3).save_to_disk(folder / "saved")
    (arrow,) = (folder / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    (folder / "plain").mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    deep = b"[" * 100_000 + b"]" * 100_000
    files = {
        "valid.jsonl": content,
        f"{NOT_UTF8}.jsonl": b"{",
        "deep.jsonl": deep,
        "deep.json": b"[" + deep + b"]",
        "digits.jsonl": b"1" * 5000,
        "bytes.jsonl": b"\xff",
        "list.jsonl": b"[]\n[1]",
        "surrogate.jsonl": json.dumps(ours("Why", "\ud800.mp4")).encode(),
        "null.jsonl": json.dumps(ours("Why", "\0.mp4")).encode(),
        "long.jsonl": json.dumps(ours("Why", "long" * 99)).encode(),
        "empty.parquet": b"",
        "noise.parquet": b"PAR1" + bytes(999),
        "cut.parquet": table[:-50],
        "page.parquet": table[:page]
        + bytes(255 - byte for byte in table[page : page + 30])
        + table[page + 30 :],
        "header.tar": tar.getvalue()[:1100] + b"x" + tar.getvalue()[1101:],
        "cut.tar": tar.getvalue()[:1024],
        "packed.tar": gzip.compress(tar.getvalue()),
        "a.jsonl.gz": gzip.compress(content),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    reasons = {
        "page.parquet": "row group 1 ",
        "header.tar": "at byte 1024",
        "pipe.jsonl": "pipe",
        "saved": "",
        "plain": "",
    }
    reasons |= {
        "surrogate.jsonl": "ud800",
        "null.jsonl": "null",
        "long.jsonl": "too long",
        "digits.jsonl": "5000 digits",
    }
    return {name: "" for name in files if name != "valid.jsonl"} | reasons


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_folder_of_damaged_files_ends_with_a_report_that_lists_each(bad_files, num_workers, capsys):
    arguments = [
        "data",
        "check",
        "data/*",
        "none.jsonl",
        "\ud800.jsonl",
        "\0.jsonl",
        "x" * 300,
        "--num-workers",
        num_workers,
    ]
    assert cli.main([*arguments, "--report", "out", "--clean", "clean.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert "Wrote report.md and report.json to out." in printed
    assert "Wrote 1 of " in printed
    content = json.loads(Path("out/report.json").read_text("utf-8"))
    found = {finding["origin"]: finding["reason"] for finding in content["invalid"]}
    for name, reason in bad_files.items():
        (origin,) = [
            origin for origin in found if re.fullmatch(re.escape(f"data/{name}") + r"(:1|\[0\])?", origin)
        ]
        assert re.search(reason, found[origin]), (name, found[origin])
    assert {"none.jsonl", "\ud800.jsonl", "\0.jsonl", "x" * 300} <= set(found)
    assert "data/valid.jsonl:1" not in found
    assert r"data/\udcff.jsonl:1: " in Path("out/report.md").read_text("utf-8")


def test_report_that_cannot_be_written_is_an_error_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("merv.data.check.check_data", None)
    Path("file").touch()
    for option in ["--report", "file/out"], ["--report", "file"], ["--clean", "file/clean.jsonl"]:
        assert cli.main(["data", "check", "a.jsonl", *option]) == 2
        assert "file" in capsys.readouterr().err


def test_names_are_escaped_on_a_terminal_without_unicode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f"{NOT_UTF8}ä.jsonl").write_text("{")
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert cli.main(["data", "check", f"{NOT_UTF8}ä.jsonl", "--num-workers", "0"]) == 1
    sys.stdout.flush()
    assert rb"- \udcff\xe4.jsonl:1: " in out.getvalue()
