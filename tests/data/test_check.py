"""A set with every damage we could think of, among sound rows of every form: each is told, alone."""

import io
import json
import os
import re
import tarfile
import wave
import zlib
from dataclasses import dataclass
from pathlib import Path

import media
import numpy as np
import pytest
from datasets import Dataset, Image, Video, config
from PIL import Image as Picture

from merv.cli import main as cli
from merv.cli.data import write_clean
from merv.data.check import Report, check_data
from merv.data.sources import open_samples
from merv.testing import make_video, tiny_llm

A, B = "a.mp4", "b.mp4"


def ours(name: str, video, answer="Yes.", **more) -> dict:
    return {"video": video, "questions": [{"question": f"{name}?", "answer": answer, **more}]}


def talk(*turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def llava(name: str, *values, **files) -> dict:
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"id": name, "conversations": turns, **files}


def seen(name: str, part) -> dict:
    return talk(("user", [part, {"type": "text", "text": name}]), ("assistant", "Yes."))


# name: (a row, or a line as it is; kind and reason of what should be found)
DAMAGE = {
    "missing video": (ours("1", "none.mp4"), "media", "No such file"),
    "missing image": (llava("2", "<image>2?", "Yes.", image="none.png"), "media", "No such file"),
    "absolute path of another machine": (ours("3", "/data/none/a.mp4"), "media", "No such file"),
    "dangling link": (ours("4", "link.mp4"), "media", "No such file"),
    "empty folder": (ours("5", "folder"), "media", "the folder holds no images"),
    "pipe": (ours("6", "pipe.mp4"), "media", "a pipe or a device"),
    "empty video": (ours("7", "empty.mp4"), "media", "the file is empty"),
    "video cut off": (ours("8", "cut.mp4"), "media", "no video that can be decoded|too damaged"),
    "video with a hole": (ours("9", "hole.mp4"), "media", "of the 8 wanted frames could be decoded"),
    "video of zeros": (ours("10", "zeros.mp4"), "media", "not a video or image"),
    "video of noise": (ours("11", "noise.mp4"), "media", "not a video or image"),
    "text as video": (ours("12", "text.mp4"), "media", "not a video|no video"),
    "sound only": (ours("13", "sound.mp4"), "media", "no video that can be decoded"),
    "playlist": (ours("14", "list.m3u8"), "media", "playlist|not a video"),
    "one frame": (ours("15", "frame.mp4"), "media", "a video of one frame"),
    "one pixel": (llava("16", "<image>?", "Yes.", image="pixel.png"), "media", "1×1 pixels show nothing"),
    "image cut off": (llava("17", "<image>17", "Yes.", image="cut.jpg"), "media", "truncated|frames could"),
    "page of an error as image": (llava("18", "<image>", "Yes.", image="page.jpg"), "media", "not a video"),
    "image too large": (llava("19", "<image>19", "Yes.", image="huge.png"), "media", "max_pixels"),
    "address": (ours("20", "https://host/a.mp4"), "row", "only local files"),
    "data address": (
        seen("21", {"type": "image_url", "image_url": "data:image/png;base64,"}),
        "row",
        "local",
    ),
    "path is a number": (ours("22", 3), "row", "a video or image is a path; got 3"),
    "path is empty": (ours("23", ""), "row", "a video or image is a path; got ''"),
    "no JSON": ('{"video": "a.mp4", ', "row", "no JSON in UTF-8"),
    "two objects on a line": ("{}{}", "row", "no JSON in UTF-8: Extra data"),
    "not an object": ("[1, 2]", "row", "a row is a JSON object"),
    "wrong encoding": ('{"video": "\udce4.mp4"}', "row", "utf-8"),
    "NaN": ('{"video": "a.mp4", "questions": NaN}', "row", "NaN is no JSON"),
    "no known key": ({"path": A, "caption": "Yes."}, "row", "wanted 'messages'"),
    "no video": ({"questions": [{"question": "?", "answer": "!"}]}, "row", "has no 'video' or 'image'"),
    "no questions": ({"video": A, "questions": []}, "row", "'questions' is a list of one object"),
    "questions are a text": ({"video": A, "questions": "Why?"}, "row", "'questions' is a list of one object"),
    "question without answer": ({"video": A, "questions": [{"question": "?"}]}, "row", "a text as 'answer'"),
    "null answer": (ours("33", A, None), "row", "a text as 'answer'; got None"),
    "answer is a number": (ours("34", A, 3), "row", "a text as 'answer'; got 3"),
    "empty answer": (ours("35", A, ""), "row", "the assistant says nothing"),
    "answer of spaces": (ours("36", A, " \n"), "row", "the assistant says nothing"),
    "kind is a list": (ours("37", A, kind=["count"]), "row", "'kind' is a text"),
    "no messages": ({"messages": []}, "row", "'messages' is a list of one object"),
    "messages are texts": ({"messages": ["Hm?", "Ah."]}, "row", "'messages' is a list of one object"),
    "no role": ({"messages": [{"content": "Hm?"}]}, "row", "unknown role None"),
    "unknown role": (talk(("user", "?"), ("tool", "x")), "row", "unknown role 'tool'"),
    "two users in a row": (talk(("user", "?"), ("user", "?"), ("assistant", "x")), "row", "in turns"),
    "ends with the user": (talk(("user", "?"), ("assistant", "x"), ("user", "?")), "row", "in turns"),
    "begins with the assistant": (talk(("assistant", "x"), ("user", "?")), "row", "in turns"),
    "only a system": (talk(("system", "Be brief.")), "row", "in turns"),
    "user says nothing": (talk(("user", ""), ("assistant", "x")), "row", "the user says nothing"),
    "content is null": (
        talk(("user", None), ("assistant", "x")),
        "row",
        "a text or a list of parts; got None",
    ),
    "content is an object": (talk(("user", {"text": "?"}), ("assistant", "x")), "row", "or a list of parts"),
    "text of a part is a list": (seen("50", {"type": "text", "text": ["?"]}), "row", "a part of a content"),
    "unknown type of part": (seen("51", {"type": "audio", "audio": "a.wav"}), "row", "a part of a content"),
    "video in an answer": (
        talk(("user", "?"), ("assistant", [{"type": "video", "video": A}])),
        "row",
        "belong",
    ),
    "place without a file": (llava("53", "<image>?", "Yes."), "row", "1 places .* 0 files"),
    "more places than files": (
        llava("54", "<image><image>", "x", image="a.png"),
        "row",
        "2 places .* 1 files",
    ),
    "more files than places": (
        llava("55", "<image>", "x", image=["a.png"] * 2),
        "row",
        "1 places .* 2 files",
    ),
    "a place of the wrong kind": (
        llava("56", "<image><image>", "x", image="a.png", video=A),
        "row",
        "the places",
    ),
    "files in two ways": (
        {**seen("57", {"type": "video", "video": A}), "video": B},
        "row",
        "both in the content",
    ),
    "private character": (ours("\ue000", A), "row", "U\\+E000"),
    "too long": (talk(("user", "word " * 2000), ("assistant", "x")), "length", "2500 tokens, over 2000"),
    "twice": (ours("sound", A), "duplicate", r"is at sound\.jsonl:1 already"),
    "twice, of a copy": (ours("sound", "copy.mp4"), "duplicate", r"is at sound\.jsonl:1 already"),
    "video of evaluation": (ours("62", "test_copy.mp4"), "leak", r"is evaluated on, at test\.jsonl:1"),
    "text of evaluation": (talk(("user", "What is 2 + 2?"), ("assistant", "4")), "leak", r"at test\.jsonl:2"),
}
FILES = {
    "none.jsonl": "no such file",
    "empty.jsonl": "is empty",
    "cut.json": "cannot be read",
    "a.csv": "wanted .jsonl",
    "cut.parquet": "cannot be read",
    "packed.tar": "cannot be read",
    "cut.tar": "cannot be read",
}
SOUND = {
    "sound.jsonl": [
        ours("sound", A),
        ours("more", B, kind="why"),
        ours("copied", "copy.mp4"),
        seen("image", {"type": "image", "image": "a.png"}),
        seen("frames", {"type": "video", "video": "frames"}),
        talk(
            ("system", "Be brief."),
            ("user", "Hm?"),
            ("assistant", "Ah."),
            ("user", "And?"),
            ("assistant", "So."),
        ),
        talk(("user", "What is it?"), ("assistant", "A cat.")),
        seen("gif", {"type": "video", "video": "a.gif"}),
    ],
    "sound.json": [llava("a", "<image>\nWhat?", "Ä.", image="a.png"), llava("b", "Why?", "So.", video=A)],
}


@dataclass
class Made:
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
    """One sound sample in a shard, a Parquet file and a saved dataset each, and broken ones of these."""
    turns = llava("", "<video>\nIn a table?", "Yes.")["conversations"]
    with tarfile.open(folder / "sound.tar", "w") as tar:
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
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / "sound.parquet")
    rows = [{"video": str(folder / A), "conversations": llava("", "Saved?", "Yes.")["conversations"]}]
    Dataset.from_list(rows).cast_column("video", Video()).save_to_disk(folder / "saved")
    for name in "sound.parquet", "sound.tar":
        (folder / name.replace("sound", "cut")).write_bytes((folder / name).read_bytes()[:900])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("set")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(config, "HF_DATASETS_CACHE", folder / "cache")
        make_media(folder)
        make_tables(folder)
        lines = [row if isinstance(row, str) else json.dumps(row) for row, *_ in DAMAGE.values()]
        Path("damaged.jsonl").write_text("\n".join(lines), "utf-8", errors="surrogateescape")
        Path("sound.jsonl").write_text("\n".join(map(json.dumps, SOUND["sound.jsonl"])))
        Path("sound.json").write_text(json.dumps(SOUND["sound.json"], indent=1))
        Path("empty.jsonl").touch()
        Path("cut.json").write_text('[{"video": ')
        Path("a.csv").write_text("a,b")
        known = ours("test", "test.mp4"), talk(("user", "what is 2 + 2? "), ("assistant", "4"))
        Path("test.jsonl").write_text("\n".join(map(json.dumps, known)))
        files = ["sound.jsonl", "sound.json", "sound.tar", "sound.parquet", "saved", "damaged.jsonl", *FILES]
        report = check_data(files, media="decode", max_tokens=2000, against=["test.jsonl"])
    origins = {name: f"damaged.jsonl:{n}" for n, name in enumerate(DAMAGE, start=1)}
    return Made(folder, report, {**origins, **dict(zip(FILES, FILES, strict=True))})


EXPECTED = {name: (kind, reason) for name, (_, kind, reason) in DAMAGE.items()}
EXPECTED |= {name: ("file", reason) for name, reason in FILES.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_damage_is_told_with_its_origin_and_reason(made, name):
    kind, reason = EXPECTED[name]
    (finding,) = [finding for finding in made.report.bad if finding.origin == made.origins[name]]
    assert finding.kind == kind
    assert re.search(reason, finding.reason), finding.reason


def test_sound_rows_of_every_form_are_good(made):
    assert {finding.origin for finding in made.report.bad} <= set(made.origins.values())
    assert made.report.good == list(range(14))
    assert len(made.report.samples) == 14 + len(DAMAGE)


def test_copies_are_noted_and_not_bad(made):
    reasons = [finding.reason for finding in made.report.notes]
    assert "copy.mp4 has the content of a.mp4" in reasons
    assert len(reasons) == 3  # this, and the two files of the shard


def test_what_was_read_is_counted(made):
    counts, numbers = made.report.counts, made.report.numbers
    assert counts["rows"] == {"sound": 14, "bad": len(DAMAGE)}
    assert counts["rows by content"]["image"] >= 4
    assert max(numbers["duration_s"]) == 24 / 8
    assert max(numbers["turns"]) == 5


def test_the_clean_list_is_clean_wherever_it_is(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made.folder)
    write_clean(made.report, tmp_path / "new" / "clean.jsonl")
    again = check_data(tmp_path / "new" / "clean.jsonl", media="decode", against=["test.jsonl"])
    assert len(again.good) == 14
    assert not again.bad
    before = [made.report.samples[i] for i in made.report.good]
    assert [s.kinds for s in open_samples(tmp_path / "new" / "clean.jsonl")] == [s.kinds for s in before]


def test_a_copy_that_was_interrupted_is_made_anew(made, tmp_path, monkeypatch):
    def stop(source, out):
        out.write(source.read(9))
        raise KeyboardInterrupt

    monkeypatch.chdir(made.folder)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfileobj", stop)
        with pytest.raises(KeyboardInterrupt):
            write_clean(made.report, tmp_path / "clean.jsonl")
    write_clean(made.report, tmp_path / "clean.jsonl")
    assert not check_data(tmp_path / "clean.jsonl", workers=0).bad
    assert not list(tmp_path.glob("*/*.new"))


def test_workers_find_the_same(made, monkeypatch):
    monkeypatch.chdir(made.folder)
    found = [check_data(["sound.jsonl", "damaged.jsonl"], media="none", workers=n) for n in (0, 2)]
    assert found[0].bad == found[1].bad
    assert found[0].numbers == found[1].numbers


def write(path: Path, *rows: dict) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_lengths_are_those_of_the_rendered_conversation(tmp_path):
    file = write(tmp_path / "a.jsonl", ours("Why", "none.mp4", "So."))
    report = check_data(file, media="none", tokenizer=tiny_llm()[1], visual_tokens=100)
    assert report.numbers["tokens"] == [
        100 + len(["<s>", "<|user|>", "</s>", "<|assistant|>", "</s>"]) + len("Why?So.")
    ]


def test_a_conversation_that_cannot_be_rendered_is_bad(tmp_path):
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    report = check_data(
        write(tmp_path / "a.jsonl", talk(("user", "?"), ("assistant", "!"))), tokenizer=tokenizer
    )
    assert "no system, please" in report.bad[0].reason


def test_a_question_of_evaluation_data_about_another_video_is_noted(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", ours("Why", f"{name}.mp4")) for name in "ab"]
    report = check_data(files[0], media="none", against=files[1])
    assert report.good == [0]
    assert [finding.kind for finding in report.notes] == ["leak"]


def test_a_row_that_repeats_one_of_its_questions_is_noted(tmp_path):
    row = ours("Why", "a.mp4")
    report = check_data(write(tmp_path / "a.jsonl", {**row, "questions": row["questions"] * 2}), media="none")
    assert (report.good, len(report.notes)) == ([0], 1)


@pytest.mark.skipif(os.name == "nt" or not os.getuid(), reason="root may read all")
def test_a_video_that_may_not_be_read_is_bad(tmp_path):
    make_video(tmp_path / "a.mp4").chmod(0)
    report = check_data(write(tmp_path / "a.jsonl", ours("Why", "a.mp4")))
    assert "Permission denied" in report.bad[0].reason


def test_the_command_reports_and_writes_what_was_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_video("a.mp4")
    tiny_llm("llm")
    many = [ours(f"{n}", "none.mp4") for n in range(30)]
    write(Path("a.jsonl"), ours("Why", "a.mp4"), *many)
    arguments = ["data", "check", "a.jsonl", "--workers", "0", "--report", "out", "--llm", "llm"]
    assert cli.main([*arguments, "--clean", "clean.jsonl"]) == 1
    said = capsys.readouterr().out
    assert "| rows | 30 bad, 1 sound |" in said
    assert "a.jsonl:2: none.mp4: No such file or directory" in said
    assert "… and 10 more" in said
    assert "by its tokenizer" in said
    assert Path("out/report.md").read_text().count("No such file") == 30
    assert len(json.loads(Path("out/report.json").read_text())["bad"]) == 30
    assert Path("out/report.png").stat().st_size > 1000
    assert cli.main(["data", "check", "clean.jsonl", "--workers", "0"]) == 0
    assert "Bad: nothing" in capsys.readouterr().out


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
    assert cli.main(["data", "check", "a.jsonl", "--llm", str(tmp_path)]) == 2
    assert "There is no tokenizer in" in capsys.readouterr().err
