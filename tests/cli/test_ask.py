"""`merv ask`: its options and its warning about slow bfloat16."""

import pytest

from merv import MultiEncoder, VideoLLM
from merv.cli.main import main
from merv.models.llm import load_llm
from merv.testing import tiny_llm


def test_fp16_is_not_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ask", "a.mp4", "What?", "--model", "folder", "--dtype", "fp16"])
    assert "'fp16'" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "warns"), [("bf16", True), ("fp32", False)])
def test_slow_bfloat16_is_a_warning(tmp_path, monkeypatch, capsys, dtype: str, warns: bool) -> None:
    tiny_llm(tmp_path / "llm")
    vision = MultiEncoder(["fake"], grid=(1, 1, 1), output_dim=32)
    VideoLLM(*load_llm(tmp_path / "llm"), vision).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("merv.utils.torch_modules.bfloat16_is_slow", lambda: True)
    options = ["--model", str(tmp_path / "model"), "--max-new-tokens", "1", "--dtype", dtype]
    assert main(["ask", "", "Hello?", *options]) == 0
    assert ("--dtype fp32" in capsys.readouterr().err) == warns
