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


def text(words: str) -> dict:
    return {"type": "text", "text": words}


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
def test_files_stand_where_they_are_marked_or_first(row, content):
    assert first_content(row) == content


@pytest.mark.parametrize("url", ["b.png", {"url": "b.png", "detail": "low"}])
def test_a_part_in_the_style_of_servers_is_an_image(url):
    row = {"messages": [{**USER, "content": [{"type": "image_url", "image_url": url}]}, ASSISTANT]}
    assert first_content(row) == [IMAGE]


def test_turns_go_on_and_the_system_comes_first():
    row = llava("<image>\nWhat?", "x", "And?", "y", image="b.png")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    (talk,) = sample_of(row).conversations
    assert [turn["role"] for turn in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert talk[3] == {"role": "user", "content": "And?"}


def test_relative_paths_begin_at_the_root_and_others_stay(tmp_path):
    row = llava("<image><image>", "x", image=["b.png", "/c.png"])
    assert sample_of(row, root=tmp_path).videos() == [str(tmp_path / "b.png"), "/c.png"]


def test_what_holds_bytes_is_taken_before_its_path():
    files = [{"bytes": b"mp4", "path": "a.mp4"}, {"bytes": None, "path": "a.mp4"}]
    assert sample_of(llava("<video><video>", "x", videos=files)).videos() == [b"mp4", "a.mp4"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "a row is a JSON object"),
        ({"video": "a.mp4"}, r"wanted 'messages', 'conversations' or 'questions'; got \['video'\]"),
        ({"messages": []}, "'messages' is a list of one object or more"),
        ({"messages": [USER, "Ah."]}, "'messages' is a list of one object or more"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": [USER]}, "roles are user and assistant in turns"),
        ({"messages": [USER, USER, ASSISTANT]}, r"got \['user', 'user', 'assistant'\]"),
        ({"messages": [ASSISTANT, USER]}, "roles are user and assistant in turns"),
        ({"messages": [{"role": "system", "content": "x"}]}, "roles are user and assistant in turns"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "the assistant says nothing"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "the content of a turn is a text"),
        ({"messages": [USER, {"role": "assistant", "content": [IMAGE]}]}, "belong into turns of the user"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "audio"}]}]}, "a part of a content"),
        ({"messages": [{**USER, "content": "\ue000"}, ASSISTANT]}, "U\\+E000"),
        ({"messages": [USER, ASSISTANT], "kind": 3}, "'kind' is a text; got 3"),
        ({"messages": [{**USER, "content": [VIDEO]}, ASSISTANT], "video": "b.mp4"}, "files both in"),
        (llava("<image>", "x"), "1 places for videos and images, but 0 files"),
        (llava("<image>", "x", image=["b.png", "c.png"]), "1 places for videos and images, but 2 files"),
        (llava("<image><image>", "x", image="b.png", video="a.mp4"), "the files are"),
        (llava("<image>", "x", image="https://host/b.png"), "only local files are read"),
        (llava("<image>", "x", image=3), "a video or image is a path; got 3"),
        ({"video": "a.mp4", "questions": []}, "'questions' is a list"),
        ({"video": "a.mp4", "questions": [{"question": "?"}]}, "each of 'questions' has a text as 'answer'"),
        ({"questions": [{"question": "?", "answer": "!"}]}, "no 'video' or 'image'"),
    ],
)
def test_a_wrong_row_is_named_with_its_reason(row, reason):
    with pytest.raises(DataError, match=f"^a.jsonl:3: .*{reason}"):
        sample_of(row, "a.jsonl:3")


@pytest.mark.parametrize(
    "row",
    [
        {"video": "a.mp4", "questions": [{"question": q, "answer": "!", "kind": q} for q in "ab"]},
        {"messages": [{**USER, "content": [IMAGE, text("?")]}, ASSISTANT], "kind": "x"},
        llava("<image>\nWhat?", "x", "And?", "y", image="b.png"),
    ],
)
def test_a_sample_written_as_a_row_is_read_as_the_same(row):
    sample = sample_of(row)
    assert sample_of(row_of(sample)) == sample
