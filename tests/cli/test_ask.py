"""`merv ask`: what it takes."""

import pytest

from merv.cli.main import main


def test_a_precision_that_changes_the_fingerprint_is_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ask", "a.mp4", "What?", "--model", "folder", "--dtype", "fp16"])
    assert "invalid choice: 'fp16'" in capsys.readouterr().err
