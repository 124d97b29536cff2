"""Appending to a file past the page cache."""

import errno
import os

import numpy as np
import pytest

from merv.features import direct
from merv.features.direct import BLOCK, Appender

SIZES = (1, 4095, 4096, 4097, 8, 20_000, 12_288)


def pieces(size: int, seed: int) -> list[np.ndarray]:
    """Some bytes in two pieces."""
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return [data[: size // 3], data[size // 3 :]]


@pytest.fixture(params=["direct", "not on this file system", "not on this system", "refused later"])
def appender(request, tmp_path, monkeypatch):
    """An appender of each kind, which starts at the second block, and its file."""
    if request.param == "not on this system":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif request.param == "not on this file system":
        monkeypatch.setattr(direct, "_open_direct", lambda path: None)
    with (tmp_path / "file").open("x+b", buffering=0) as file:
        made = Appender(tmp_path / "file", file.fileno())
        if request.param == "refused later" and made._direct is not None:
            pwrite, refused = os.pwrite, made._direct

            def refusing(number, data, offset):
                if number == refused:
                    raise OSError(errno.EINVAL, "Invalid argument")
                return pwrite(number, data, offset)

            monkeypatch.setattr(os, "pwrite", refusing)
        yield made, file
        made.close()


def test_what_was_appended_is_in_the_file(appender):
    made, file = appender
    expected = b""
    for seed, size in enumerate(SIZES):
        made.append(pieces(size, seed), BLOCK + len(expected))
        expected += np.concatenate(pieces(size, seed)).tobytes()
        assert os.pread(file.fileno(), len(expected), BLOCK) == expected


def test_what_was_appended_last_can_be_replaced(appender):
    made, file = appender
    made.append(pieces(5000, 0), BLOCK)
    made.append(pieces(7000, 1), BLOCK + 5000)
    made.append(pieces(3000, 2), BLOCK + 5000)
    expected = np.concatenate([*pieces(5000, 0), *pieces(3000, 2)]).tobytes()
    assert os.pread(file.fileno(), 8000, BLOCK) == expected


def test_full_disk_is_an_error_and_the_write_can_be_repeated(appender, monkeypatch):
    made, file = appender
    made.append(pieces(5000, 0), BLOCK)
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda number, data, offset: pwrite(number, data[:100], offset) and 0)
        with pytest.raises(OSError, match="No space"):
            made.append(pieces(9000, 1), BLOCK + 5000)
    made.append(pieces(9000, 1), BLOCK + 5000)
    expected = np.concatenate([*pieces(5000, 0), *pieces(9000, 1)]).tobytes()
    assert os.pread(file.fileno(), 14_000, BLOCK) == expected
