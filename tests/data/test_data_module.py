import json

import pytest

from merv.data.module import ChatData
from merv.data.sources import read_samples
from merv.errors import DataError

ROW = {
    "video": "clips/a.mp4",
    "questions": [
        {"question": "Who?", "answer": "cat", "kind": "first"},
        {"question": "How many?", "answer": "two"},
    ],
}
TALK = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Hm?"}]},
        {"role": "assistant", "content": "Ah."},
    ]
}


def write(path, *rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_questions_about_a_video_become_conversations_that_share_it(tmp_path):
    (sample,) = read_samples(write(tmp_path / "a.jsonl", ROW))
    assert sample.kinds == ("first", "")
    assert sample.videos() == [str(tmp_path / "clips/a.mp4")] * 2
    assert [talk[-1]["content"] for talk in sample.conversations] == ["cat", "two"]


def test_messages_keep_their_form_with_absolute_paths(tmp_path):
    (sample,) = read_samples(write(tmp_path / "a.jsonl", TALK))
    assert sample.conversations[0][0]["content"][0]["image"] == str(tmp_path / "b.png")
    assert sample.conversations[0][1] == TALK["messages"][1]


@pytest.mark.parametrize(
    "broken",
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
def test_a_broken_line_is_named(tmp_path, broken):
    path = write(tmp_path / "a.jsonl", ROW, broken)
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        read_samples(path)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"No data at .*none\.jsonl: no such file"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is empty"):
        read_samples(write(tmp_path / "empty.jsonl", ""))


def test_batches_are_the_same_for_the_same_seed(tmp_path):
    rows = [{**ROW, "video": f"{i}.mp4"} for i in range(10)]

    def order(seed: int) -> list[str]:
        data = ChatData(write(tmp_path / "a.jsonl", *rows), batch_size=2, seed=seed)
        data.setup()
        return [
            group[0][0]["content"][0]["video"] for batch in data.train_dataloader() for group in batch.groups
        ]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_at_most_so_many_questions_of_a_video_are_asked_at_once(tmp_path):
    data = ChatData(write(tmp_path / "a.jsonl", ROW), max_questions=1)
    data.setup()
    assert [len(group) for batch in data.train_dataloader() for group in batch.groups] == [1]


def test_every_video_is_listed_once_with_its_first_row(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, TALK, ROW)
    data = ChatData(path, path)
    data.setup()
    assert list(data.videos()) == [
        (f"{path}:1", str(tmp_path / "clips/a.mp4")),
        (f"{path}:2", str(tmp_path / "b.png")),
    ]
