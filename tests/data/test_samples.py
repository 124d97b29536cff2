"""Rows in all forms as samples, and samples as rows."""

import pytest

from merv.data.samples import row_of, sample_of
from merv.errors import DataError

ASKED = {"from": "human", "value": "What?"}
SAID = {"from": "gpt", "value": "A square."}
VIDEO = {"type": "video", "video": "a.mp4"}
IMAGE = {"type": "image", "image": "b.png"}
USER, ASSISTANT = {"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Ah."}


def llava(*values: str, **files) -> dict:
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"id": 7, "conversations": turns, **files}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def first_content(row: dict) -> list:
    return sample_of(row).conversations[0][0]["content"]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        (llava("<image>\nWhat?", "x", image="b.png"), [IMAGE, text("What?")]),
        (llava("What?\n<video>", "x", video="a.mp4"), [text("What?"), VIDEO]),
        (llava("Is <image> it?", "x", image="b.png"), [text("Is "), IMAGE, text(" it?")]),
        (llava("<image>What?", "x", video="a.mp4"), [VIDEO, text("What?")]),
        (llava("What?", "x", video="a.mp4"), [VIDEO, text("What?")]),
        (llava("<video><image>Same?", "x", image="b.png", video="a.mp4"), [VIDEO, IMAGE, text("Same?")]),
        (llava("<image> <image>", "x", image=["b.png", "b.png"]), [IMAGE, text(" "), IMAGE]),
        (llava("What?", "x"), "What?"),
        (llava("What?", "x", image=None), "What?"),
        ({"messages": [USER, ASSISTANT], "videos": ["a.mp4"]}, [VIDEO, text("Hm?")]),
        ({"messages": [{**USER, "content": [{"type": "video"}]}, ASSISTANT], "video": "a.mp4"}, [VIDEO]),
        ({"messages": [{**USER, "content": [IMAGE, text("?")]}, ASSISTANT]}, [IMAGE, text("?")]),
        ({"messages": [{**USER, "content": "a <video> tag"}, ASSISTANT]}, "a <video> tag"),
        ({"image": "b.png", "questions": [{"question": "?", "answer": "!"}]}, [IMAGE, text("?")]),
    ],
)
def test_files_replace_placeholders_or_come_first(row, content):
    assert first_content(row) == content


@pytest.mark.parametrize("url", ["b.png", {"url": "b.png", "detail": "low"}])
def test_image_url_part_is_an_image(url):
    row = {"messages": [{**USER, "content": [{"type": "image_url", "image_url": url}]}, ASSISTANT]}
    assert first_content(row) == [IMAGE]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "path": "a.mp4"},
        {"type": "video", "url": "a.mp4"},
        {"type": "video", "video": "a.mp4", "text": None, "path": None},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
    ],
)
def test_part_names_its_file_as_in_transformers(part):
    assert first_content({"messages": [{**USER, "content": [part]}, ASSISTANT]}) == [VIDEO]


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({**VIDEO, "fps": 2}, "'fps'"),
        ({**VIDEO, "path": "b.mp4"}, "several files"),
        ({**text("?"), "cache": 1}, "'cache'"),
        ("video", "'video'"),
        ({"type": "image", "path": "https://host/b.png"}, "https://host/b.png"),
    ],
)
def test_key_of_a_part_that_is_not_read_is_an_error(part, named):
    with pytest.raises(DataError, match=named):
        sample_of({"messages": [{**USER, "content": [part]}, ASSISTANT]})


def test_part_may_name_its_file_by_a_file_url():
    messages = [{**USER, "content": [{"type": "image", "url": "file:///a%20b.png"}]}, ASSISTANT]
    assert sample_of({"messages": messages}).videos() == ["/a b.png"]


def test_index_of_a_placeholder_is_its_position():
    def row(*indices):
        content = [{"type": "image", "index": index, "text": None} for index in indices]
        return {"messages": [{**USER, "content": content}, ASSISTANT], "images": ["b.png", "b.png"]}

    assert first_content(row(0, 1)) == [IMAGE, IMAGE]
    with pytest.raises(DataError, match=r"'index' .*\[1, 0\]"):
        sample_of(row(1, 0))


def test_conversation_has_system_and_several_turns():
    row = llava("<image>\nWhat?", "x", "And?", "y", image="b.png")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    (messages,) = sample_of(row).conversations
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3] == {"role": "user", "content": "And?"}


def test_relative_paths_start_at_the_root(tmp_path):
    row = llava("<image><image>", "x", image=["b.png", "/c.png"])
    assert sample_of(row, root=tmp_path).videos() == [str(tmp_path / "b.png"), "/c.png"]


def test_bytes_are_preferred_to_a_path():
    files = [{"bytes": b"mp4", "path": "a.mp4"}, {"bytes": None, "path": "a.mp4"}]
    assert sample_of(llava("<video><video>", "x", videos=files)).videos() == [b"mp4", "a.mp4"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], r"\[\]"),
        ({"video": "a.mp4"}, r"'messages', 'conversations' and 'questions'; .*\['video'\]"),
        ({"video": "a.mp4", "question": "?", "answer": "!"}, "a list, 'questions'"),
        ({"messages": []}, r"'messages' .*\[\]"),
        ({"messages": [USER, "Ah."]}, "'messages' .*'Ah"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "'tool'"),
        ({"messages": [USER]}, r"got \['user'\]"),
        ({"messages": [USER, USER, ASSISTANT]}, r"got \['user', 'user', 'assistant'\]"),
        ({"messages": [ASSISTANT, USER]}, r"got \['assistant', 'user'\]"),
        ({"messages": [{"role": "system", "content": "x"}]}, r"got \['system'\]"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"assistant .*' \\n'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "'content' .*None"),
        ({"messages": [USER, {"role": "assistant", "content": [IMAGE]}]}, "assistant"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "audio"}]}]}, "'audio'"),
        ({"messages": [{**USER, "content": "\ue000"}, ASSISTANT]}, "U\\+E000"),
        ({"messages": [USER, ASSISTANT], "kind": 3}, "'kind' .*3"),
        (
            {"messages": [{**USER, "content": [VIDEO]}, ASSISTANT], "video": "b.mp4"},
            "'content' and under 'video'",
        ),
        (llava("<image>", "x"), "1 placeholder.* 0 file"),
        (llava("<image>", "x", image=["b.png", "c.png"]), "1 placeholder.* 2 file"),
        (llava("<image><image>", "x", image="b.png", video="a.mp4"), "'video': 1"),
        (llava("<image>", "x", image="https://host/b.png"), "https://host/b.png"),
        (llava("<image>", "x", image=3), "got 3"),
        ({"video": "a.mp4", "questions": []}, r"'questions' .*\[\]"),
        ({"video": "a.mp4", "questions": [{"question": "?"}]}, "'questions' .*'answer'"),
        ({"questions": [{"question": "?", "answer": "!"}]}, "'video' or an 'image'"),
    ],
)
def test_malformed_row_is_named_with_its_reason(row, reason):
    with pytest.raises(DataError, match=rf"^a\.jsonl:3: .*{reason}"):
        sample_of(row, "a.jsonl:3")


@pytest.mark.parametrize(
    "row",
    [
        {"video": "a.mp4", "questions": [{"question": q, "answer": "!", "kind": q} for q in "ab"]},
        {"messages": [{**USER, "content": [IMAGE, text("?")]}, ASSISTANT], "kind": "x"},
        llava("<image>\nWhat?", "x", "And?", "y", image="b.png"),
    ],
)
def test_sample_survives_a_round_trip_through_a_row(row):
    sample = sample_of(row)
    assert sample_of(row_of(sample)) == sample
