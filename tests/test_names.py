"""The public names of merv."""

from importlib.util import find_spec

import pytest

import merv


@pytest.mark.parametrize("name", merv.__all__)
def test_public_name_is_callable_and_not_shadowed_by_a_module(name):
    assert find_spec(f"merv.{name}") is None
    assert callable(getattr(merv, name))


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = merv.nothing
