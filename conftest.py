"""Doctests of merv/ and encoders/ see torch and numpy by name."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # spinning threads crawl on a busy machine

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def names_in_doctests(doctest_namespace: dict) -> None:
    """`torch` and `np`, so that examples need no import lines."""
    doctest_namespace.update(torch=torch, np=np)
