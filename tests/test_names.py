"""What `from merv import …` gives."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

import merv


@pytest.mark.parametrize("name", merv.__all__)
def test_a_name_is_there_and_hidden_by_no_module(name):
    assert find_spec(f"merv.{name}") is None
    assert callable(getattr(merv, name))


def test_importing_merv_imports_no_torch():
    code = "import merv, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = merv.nothing
