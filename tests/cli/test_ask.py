"""`merv ask`: its arguments, several questions, sampling, Ctrl-C, and its warning about slow bfloat16."""

import pytest
import torch

from merv import MultiEncoder, VideoLLM
from merv.cli.main import main
from merv.encoders.fake import Fake
from merv.models.llm import load_llm
from merv.testing import make_video, tiny_llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and two clips."""
    folder = tmp_path_factory.mktemp("ask")
    tiny_llm(folder / "llm")
    vision = MultiEncoder(["fake"], grid=(1, 1, 1), output_dim=32)
    VideoLLM(*load_llm(folder / "llm"), vision).save_pretrained(folder / "model")
    for name in "ab":
        make_video(folder / f"{name}.mp4", frames=8 if name == "a" else 12)
    return folder


@pytest.fixture
def ask(folder, monkeypatch, capsys):
    """Run `merv ask` beside the clips; return its exit status, what it printed, and its errors."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["ask", *arguments, "--model", "model"])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def streamed(monkeypatch):
    """Replace `VideoLLM.stream` by a recorder; return the conversations and options that it got."""
    calls = []

    def stream(self, conversation, **options):
        *videos, question = conversation[0]["content"]
        calls.append(([part["video"] for part in videos], question["text"], options))
        yield "An answer."

    monkeypatch.setattr(VideoLLM, "stream", stream)
    return calls


# Videos and questions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "videos", "questions"),
    [
        (["a.mp4", "Who?"], ["a.mp4"], ["Who?"]),
        (["a.mp4", "b.mp4", "Who?"], ["a.mp4", "b.mp4"], ["Who?"]),
        (["", "Who?"], [], ["Who?"]),
        (["a.mp4", "--max-new-tokens", "9", "Who?"], ["a.mp4"], ["Who?"]),
        (["a.mp4", "b.mp4", "--question", "Who?"], ["a.mp4", "b.mp4"], ["Who?"]),
        (["--question", "Who?", "--question", "Why?", "a.mp4"], ["a.mp4"], ["Who?", "Why?"]),
        (["--question", "Who?"], [], ["Who?"]),
    ],
)
def test_every_question_is_asked_about_all_videos(ask, streamed, arguments, videos, questions):
    status, _, _ = ask(*arguments)
    assert status == 0
    assert [call[:2] for call in streamed] == [(videos, question) for question in questions]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a.mp4", "b.mp4"], "'b.mp4'"),
        (["a.mp4", "none.MOV"], "'none.MOV'"),
        (["a.mp4", "model"], "'model'"),
        (["a.mp4", "--question", "b.mp4"], "'b.mp4'"),
        (["Who?", "a.mp4"], "'a.mp4'"),
        (["a.mp4"], "a.mp4"),
        (["none.mp4", "Who?"], "'none.mp4'"),
        (["a.mp4", "Who?", "--question", "Why?"], "'Who?'"),
        ([], "question"),
    ],
)
def test_path_as_question_or_question_as_video_is_an_error_that_names_it(ask, streamed, arguments, named):
    status, _, error = ask(*arguments)
    assert (status, streamed) == (2, [])
    assert named in error
    assert "--question" in error


def test_answers_are_printed_with_their_questions(ask, streamed):
    assert ask("a.mp4", "Who?")[1] == "An answer.\n"
    _, out, _ = ask("a.mp4", "--question", "Who?", "--question", "Why?")
    assert out == "Q: Who?\nA: An answer.\nQ: Why?\nA: An answer.\n"


def test_encoders_run_once_for_all_questions(ask, monkeypatch):
    encode, calls = Fake.encode, []
    monkeypatch.setattr(Fake, "encode", lambda self, pixels: calls.append(1) or encode(self, pixels))
    assert ask("a.mp4", "Who?", "--max-new-tokens", "1")[0] == 0
    once = len(calls)
    questions = ["--question", "Who?", "--question", "Why?", "--question", "When?"]
    status, out, _ = ask("a.mp4", *questions, "--max-new-tokens", "1", "--mix-weights")
    assert (status, len(calls)) == (0, 2 * once)
    assert out.count("mix_weights: fake 100%") == 3


# Options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--temperature", "0.5"], {"temperature": 0.5}),
        (["--temperature", "0"], {"temperature": 0.0}),
        (["--top-p", "1"], {"top_p": 1.0}),
        (["--temperature", "2", "--top-p", "0.9"], {"temperature": 2.0, "top_p": 0.9}),
        (["--keep-thinking"], {"keep_thinking": True}),
        (["--max-new-tokens", "7"], {"max_new_tokens": 7}),
    ],
)
def test_options_of_generation_are_passed(ask, streamed, arguments, options):
    assert ask("a.mp4", "Who?", *arguments)[0] == 0
    passed = {name: value for name, value in streamed[0][2].items() if value is not None}
    assert passed == {"max_new_tokens": 64, "keep_thinking": False, **options}


def test_sampled_answers_differ_and_temperature_zero_is_greedy(ask):
    question = ["a.mp4", *["--question", "Who?"] * 4]

    def answers(*options: str) -> set[str]:
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(0)
            status, out, _ = ask(*question, "--max-new-tokens", "8", *options)
        assert status == 0
        return set(out.split("Q: Who?\nA: ")[1:])

    assert len(answers()) == 1
    assert answers("--temperature", "0") == answers()
    assert len(answers("--temperature", "5")) > 1
    assert len(answers("--top-p", "0.99")) > 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--encoder", "siglip"),
        ("--encoder", "siglip="),
        ("--encoder", "=folder"),
        ("--dtype", "fp16"),
        ("--temperature", "-1"),
        ("--temperature", "hot"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--max-new-tokens", "0"),
    ],
)
def test_invalid_value_is_an_error_that_names_the_option(ask, option, value):
    status, _, error = ask("a.mp4", "Who?", f"{option}={value}")
    assert status == 2
    assert f"argument {option}" in error
    assert repr(value) in error


def test_moved_weights_of_an_encoder_are_passed(ask, monkeypatch):
    loaded = []

    def from_pretrained(cls, folder, *, weights, **_):
        loaded.append(weights)
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoLLM, "from_pretrained", classmethod(from_pretrained))
    ask("a.mp4", "Who?", "--encoder", "a=/x=1", "--encoder", "b=c")
    assert loaded == [{"a": "/x=1", "b": "c"}]


def test_help_shows_both_forms(ask):
    status, out, _ = ask("--help")
    assert status == 0
    assert "merv ask VIDEO ... QUESTION" in out
    assert '--question "What is shown first?" --question' in out


# Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["generation", "printing"])
def test_interrupt_closes_the_stream_and_exits_with_130(ask, monkeypatch, place):
    events = []

    def stream(self, conversation, **_):
        try:
            yield "An "
            if place == "generation":
                raise KeyboardInterrupt
            yield "answer."
        finally:
            events.append("closed")

    def interrupted_print(*values, **options):
        if values == ("answer.",):
            raise KeyboardInterrupt
        print(*values, **options)

    monkeypatch.setattr(VideoLLM, "stream", stream)
    monkeypatch.setattr("merv.cli.ask.print", interrupted_print, raising=False)
    status, out, error = ask("a.mp4", "Who?")
    assert (status, out, error) == (130, "An \n", "")
    assert events == ["closed"]


# Device and dtype ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "warns"), [("bf16", True), ("fp32", False)])
def test_slow_bfloat16_is_a_warning(ask, monkeypatch, dtype: str, warns: bool) -> None:
    monkeypatch.setattr("merv.utils.torch_modules.bfloat16_is_slow", lambda: True)
    status, _, error = ask("", "Hello?", "--max-new-tokens", "1", "--dtype", dtype)
    assert status == 0
    assert ("--dtype fp32" in error) == warns
