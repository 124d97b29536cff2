"""Loading where it is hard: rows that only the tokenizer finds bad, several processes, shortened epochs."""

import json
from itertools import islice

import pytest
import tiny

from merv.data.module import ChatData
from merv.errors import DataError


def talk(*said: str) -> list[dict]:
    roles = ["system", "user", "assistant"][-len(said) :]
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]


@pytest.fixture
def rows(tmp_path):
    """Two rows that are sound and one that some chat templates reject."""
    talks = talk("1", "!"), talk("Be brief.", "2", "!"), talk("3", "!")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in talks))
    return str(tmp_path / "a.jsonl")


def chat(rows, model, **options) -> ChatData:
    data = ChatData(rows, val=rows, batch_size=3, **{"num_workers": 0, **options})
    data.setup()
    data.model = lambda: model  # as in a training
    return data


@pytest.fixture(scope="module")
def model():
    """With a chat template that knows no system, as gemma's."""
    model = tiny.build()
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model.tokenizer.chat_template = no_system + model.tokenizer.chat_template
    return model


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_the_chat_template_rejects_are_skipped(rows, model, workers):
    data = chat(rows, model, on_error="skip", num_workers=workers)
    for loader in data.train_dataloader(), data.val_dataloader():
        (batch,) = loader
        assert sorted(origin[-1] for origin in batch.origins) == ["1", "3"]
        assert [(origin[-1], "no system" in reason) for origin, reason in batch.skipped] == [("2", True)]


def test_a_row_that_the_chat_template_rejects_is_named(rows, model):
    with pytest.raises(DataError, match=r"a\.jsonl:2: PromptError: .*no system\. To pass over"):
        next(iter(chat(rows, model).train_dataloader()))


def test_each_process_goes_on_with_what_it_skipped_itself(rows, model, monkeypatch):
    def loaders() -> list:
        data = [chat(rows, model, on_error="skip", max_skipped=9) for _ in range(2)]
        for process, own in enumerate(data):
            own.rank_and_world_size = lambda process=process: (process, 2)
        return [own.train_dataloader() for own in data]

    before, values = loaders(), []
    for process, loader in enumerate(before):
        loader.skips.reasons = {f"a.jsonl:{process}": "bad"}
    monkeypatch.setattr("merv.data.loader.gathered", lambda value: [values.append(value)] and values)
    *_, state = [loader.state_dict() for loader in before]
    after = loaders()
    for loader in after:
        loader.load_state_dict(state)
    assert [loader.skips.reasons for loader in after] == [loader.skips.reasons for loader in before]


@pytest.mark.parametrize("after", [4, 6])
def test_a_stream_of_which_less_is_used_resumes_at_the_next_batch(tmp_path, monkeypatch, after):
    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for file in "ab":
        talks = [talk(f"{file}{i}", "!") for i in range(6)]
        Dataset.from_dict({"messages": talks}).to_parquet(tmp_path / f"{file}.parquet")

    def loader():
        data = ChatData(
            str(tmp_path / "*.parquet"),
            stream=True,
            batches_per_epoch=7,
            shuffle_buffer_size=4,
            batch_size=2,
            num_workers=2,
        )
        data.setup()
        return data.train_dataloader()

    def epochs(loader):
        """Of four batches each, on and on."""
        loader.limit = lambda: 4
        while True:
            yield from islice(loader, 4 if loader.begun else 4 - loader.position)

    def asked(loader, batches: int) -> list[str]:
        found = [batch.groups for batch in islice(epochs(loader), batches)]
        return [group[0][0]["content"] for groups in found for group in groups]

    whole, first, rest = loader(), loader(), loader()
    expected, seen = asked(whole, 9), asked(first, after)
    rest.load_state_dict(first.state_dict())
    seen += asked(rest, 9 - after)
    del whole, first, rest  # and so their workers, which a failing test would keep
    assert seen == expected
