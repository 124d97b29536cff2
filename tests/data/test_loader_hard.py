"""Hard cases of loading: rows that the chat template rejects, several processes, shortened epochs."""

import io
import json
import re
import tarfile
from itertools import islice

import pytest
import tiny

from merv.data.check import check_data
from merv.data.module import ChatData
from merv.errors import DataError


def messages(*texts: str) -> list[dict]:
    roles = ["system", "user", "assistant"][-len(texts) :]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


@pytest.fixture
def rows(tmp_path):
    """Two valid rows, and a row that some chat templates reject."""
    conversations = messages("1", "!"), messages("Be brief.", "2", "!"), messages("3", "!")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in conversations))
    return str(tmp_path / "a.jsonl")


def chat(rows, model, **options) -> ChatData:
    data = ChatData(rows, val=rows, batch_size=3, **{"num_workers": 0, **options})
    data.setup()
    data.model = lambda: model  # as in training
    return data


@pytest.fixture(scope="module")
def model():
    """A model whose chat template rejects system messages, like that of Gemma."""
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


def test_row_that_the_chat_template_rejects_is_named(rows, model):
    with pytest.raises(DataError, match=r"a\.jsonl:2: PromptError: .*no system(.|\n)*data\.on_error"):
        next(iter(chat(rows, model).train_dataloader()))


@pytest.mark.parametrize(
    ("answer", "reason"), [("\ud83d", r"\\ud83d"), ("", "assistant"), ("\n \n", "assistant")]
)
@pytest.mark.parametrize("with_llm", [True, False])
def test_answer_without_valid_text_is_bad_in_check_and_training(tmp_path, model, answer, reason, with_llm):
    file = str(tmp_path / "a.jsonl")
    rows = messages("1", "!"), messages("2", answer)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in rows))
    report = check_data(file, tokenizer=model.tokenizer if with_llm else None)
    (batch,) = chat(file, model, on_error="skip").train_dataloader()
    assert [finding.origin for finding in report.invalid] == [f"{file}:2"]
    assert [origin for origin, _ in batch.skipped] == [f"{file}:2"]
    assert re.search(reason, report.invalid[0].reason)
    assert re.search(reason, batch.skipped[0][1])


def test_line_breaks_before_an_answer_are_neither_counted_nor_learned(tmp_path, model):
    file = str(tmp_path / "a.jsonl")
    rows = messages("1", "\n\n\nA cat."), messages("1", "A cat.")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in rows))
    report = check_data(file, tokenizer=model.tokenizer)
    (batch,) = chat(file, model).val_dataloader()
    (first,), (second,) = (model.chat.training_prompts(conversation) for (conversation,) in batch.groups)
    assert report.valid == [0, 1]
    assert report.numbers["tokens"][0] == report.numbers["tokens"][1]
    assert first == second


def test_foreign_members_of_a_shard_are_logged_once(tmp_path, model, caplog):
    row = json.dumps({"messages": messages("1", "!")}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in "x1.json", "._x1.json":
            member = tarfile.TarInfo(name)
            member.size = len(row)
            tar.addfile(member, io.BytesIO(row))
    data = chat(str(tmp_path / "a.tar"), model)
    data.setup()
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert sum(len(batch.groups) for batch in batches) == 2
    assert [record.getMessage().count("._x1.json") for record in caplog.records] == [1]


def test_each_process_resumes_with_its_own_skipped_samples(rows, model, monkeypatch):
    def loaders() -> list:
        data = [chat(rows, model, on_error="skip", max_skipped=9) for _ in range(2)]
        for process, module in enumerate(data):
            module.rank_and_world_size = lambda process=process: (process, 2)
        return [module.train_dataloader() for module in data]

    before, values = loaders(), []
    for process, loader in enumerate(before):
        loader.policy.reasons = {f"a.jsonl:{process}": "bad"}
    monkeypatch.setattr("merv.data.loader.gathered", lambda value: [values.append(value)] and values)
    *_, state = [loader.state_dict() for loader in before]
    after = loaders()
    for loader in after:
        loader.load_state_dict(state)
    assert [loader.policy.reasons for loader in after] == [loader.policy.reasons for loader in before]


@pytest.mark.parametrize("after", [4, 6])
def test_stream_with_shortened_epochs_resumes_at_the_next_batch(tmp_path, monkeypatch, after):
    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for file in "ab":
        rows = [messages(f"{file}{i}", "!") for i in range(6)]
        Dataset.from_dict({"messages": rows}).to_parquet(tmp_path / f"{file}.parquet")

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
        """Epochs of four batches each, without end."""
        loader.limit = lambda: 4
        while True:
            yield from islice(loader, 4 if loader.started else 4 - loader.position)

    def questions(loader, batches: int) -> list[str]:
        read = [batch.groups for batch in islice(epochs(loader), batches)]
        return [group[0][0]["content"] for groups in read for group in groups]

    whole, first, rest = loader(), loader(), loader()
    expected, seen = questions(whole, 9), questions(first, after)
    rest.load_state_dict(first.state_dict())
    seen += questions(rest, 9 - after)
    del whole, first, rest  # and their workers, which a failing test would keep
    assert seen == expected
