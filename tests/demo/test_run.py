"""`merv demo` runs all its steps with tiny parts."""

import json
import re

import pytest

from merv.cli.fit import NOISE
from merv.cli.main import main
from merv.demo import clips, material
from merv.demo.run import without_video
from merv.testing import tiny_llm

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{re.escape(words)}.*") for words in NOISE]
pytestmark.append(
    pytest.mark.filterwarnings("ignore:Glyph")
)  # an untrained LLM generates arbitrary characters


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The demo with photographs only, few clips, a tiny LLM and the fake encoders."""
    tiny_llm(tmp_path / "llm")
    monkeypatch.setattr(material, "things", material.photographs)
    monkeypatch.setattr("merv.cli.demo.COUNTS", {"train": 4, "held_out": 8, "unseen": 2})
    monkeypatch.setattr(clips, "FRAMES", (64, 72))
    monkeypatch.chdir(tmp_path)
    return [
        *("demo", "--out", "out", "--clips", "4", "--fit", "--trainer.max_epochs=1"),
        f"--model.llm={tmp_path / 'llm'}",
        "--model.encoders=[fake,fake/video]",
        "--model.num_frames=null",
        "--model.dtype=fp32",
        "--trainer.enable_progress_bar=false",
    ]


def test_demo_runs_all_steps(tiny, tmp_path, capsys):
    assert main(tiny) == 0
    output = capsys.readouterr().out
    assert all(f"[{step}/4]" in output for step in (1, 2, 3, 4))
    assert "What is shown first?" in output
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {"count", "first", "last"} <= set(results["held_out"])
    assert results["machine"]
    for name in ("clip.png", "loss.png", "model/model.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_only_data_stops_before_training(tiny, tmp_path):
    assert main([*tiny[: tiny.index("--fit")], "--only-data"]) == 0
    assert (tmp_path / "out/train.jsonl").read_text().count("\n") == 4
    assert not (tmp_path / "out/model").exists()


def test_without_video_keeps_only_text():
    conversation = [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "cat"},
    ]
    (text_only,) = without_video([conversation])
    assert text_only == [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, conversation[1]]
    assert len(conversation[0]["content"]) == 2
