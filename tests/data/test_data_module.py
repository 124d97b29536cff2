"""ChatData: files of samples as batches and as a list of videos."""

import json

import pytest

from merv.data.module import ChatData
from merv.data.sources import open_samples
from merv.errors import DataError

ROW = {
    "video": "clips/a.mp4",
    "questions": [
        {"question": "Who?", "answer": "cat", "kind": "first"},
        {"question": "How many?", "answer": "two"},
    ],
}
MESSAGES = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Hm?"}]},
        {"role": "assistant", "content": "Ah."},
    ]
}


def write(path, *rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_questions_become_conversations_about_one_video(tmp_path):
    (sample,) = open_samples(write(tmp_path / "a.jsonl", ROW))
    assert sample.kinds == ("first", "")
    assert sample.videos() == [str(tmp_path / "clips/a.mp4")] * 2
    assert [conversation[-1]["content"] for conversation in sample.conversations] == ["cat", "two"]


def test_messages_get_absolute_paths(tmp_path):
    (sample,) = open_samples(write(tmp_path / "a.jsonl", MESSAGES))
    assert sample.conversations[0][0]["content"][0]["image"] == str(tmp_path / "b.png")
    assert sample.conversations[0][1] == MESSAGES["messages"][1]


@pytest.mark.parametrize(
    "line",
    [
        '{"video": "a.mp4", "questions": []}',
        '{"video": "a.mp4", "questions": [{"question": "How many?", "answer": 3}]}',
        '{"messages": [{"role": "user", "content": "Who?"}]}',
        '{"messages": [{"content": "Who?"}]}',
        '{"messages": "Who?"}',
        "{",
        "[]",
        '{"video": "a.mp4"}',
        '{"video": "a.mp4", "questions": [{"question": "Who?"}]}',
    ],
)
def test_malformed_line_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", ROW, line)
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        list(open_samples(path))


def test_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        open_samples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        open_samples(write(tmp_path / "empty.jsonl", ""))


def test_same_seed_gives_same_batches(tmp_path):
    rows = [{**ROW, "video": f"{i}.mp4"} for i in range(10)]

    def order(seed: int) -> list[str]:
        data = ChatData(write(tmp_path / "a.jsonl", *rows), batch_size=2, seed=seed)
        data.setup()
        return [
            group[0][0]["content"][0]["video"] for batch in data.train_dataloader() for group in batch.groups
        ]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_max_questions_limits_conversations_per_sample(tmp_path):
    data = ChatData(write(tmp_path / "a.jsonl", ROW), max_questions=1)
    data.setup()
    assert [len(group) for batch in data.train_dataloader() for group in batch.groups] == [1]


def test_videos_are_listed_once_with_their_first_row(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, MESSAGES, ROW)
    data = ChatData(path, path)
    data.setup()
    assert list(data.videos()) == [
        (f"{path}:1", str(tmp_path / "clips/a.mp4")),
        (f"{path}:2", str(tmp_path / "b.png")),
    ]
