"""The one definition of what is reduced, and of how a value per channel is broadcast back."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import array_api_strict
import numpy as np
import pytest
import torch

import bnlib
import bnlib.book
from bnlib import per_channel, reduction_axes


@pytest.mark.parametrize(
    ("ndim", "channel_axis", "axes"),
    [
        (2, 1, (0,)),
        (2, 0, (1,)),
        (3, 1, (0, 2)),
        (4, 1, (0, 2, 3)),
        (4, -1, (0, 1, 2)),
        (4, -4, (1, 2, 3)),
        (5, 1, (0, 2, 3, 4)),
        (5, np.int64(2), (0, 1, 3, 4)),
    ],
)
def test_every_axis_but_the_channel_axis_is_reduced(ndim, channel_axis, axes):
    assert reduction_axes(ndim, channel_axis) == axes


def test_axis_1_is_the_default():
    assert reduction_axes(4) == reduction_axes(4, 1)
    assert per_channel(np.zeros(3), 4).shape == per_channel(np.zeros(3), 4, 1).shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), ValueError, "expected ndim >= 2 (samples and channels), got ndim 1"),
        ((0,), ValueError, "expected ndim >= 2 (samples and channels), got ndim 0"),
        ((4, 4), ValueError, "expected channel_axis in -4..3 for ndim 4, got 4"),
        ((4, -5), ValueError, "expected channel_axis in -4..3 for ndim 4, got -5"),
        ((4, 1.0), TypeError, "'float' object cannot be interpreted as an integer"),
        (((2, 3, 4),), TypeError, "'tuple' object cannot be interpreted as an integer"),
    ],
)
def test_axes_that_make_no_sense(arguments, error, message):
    with pytest.raises(error) as caught:
        reduction_axes(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray, array_api_strict.asarray])
@pytest.mark.parametrize(
    ("ndim", "channel_axis", "shape"),
    [(2, 1, (1, 3)), (4, 1, (1, 3, 1, 1)), (4, -1, (1, 1, 1, 3)), (5, 0, (3, 1, 1, 1, 1))],
)
def test_per_channel_keeps_the_channel_axis_and_the_library(asarray, ndim, channel_axis, shape):
    v = asarray([1, 2, 3])
    shaped = per_channel(v, ndim, channel_axis)
    assert type(shaped) is type(v)
    assert tuple(shaped.shape) == shape


def test_per_channel_is_a_view():
    v = np.zeros(3)
    assert np.shares_memory(per_channel(v, 4), v)


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (np.zeros((1, 3)), ValueError, r"one value per channel, shape \(C,\), got shape \(1, 3\)"),
        (np.float64(1), ValueError, r"one value per channel, shape \(C,\), got shape \(\)"),
        ([1.0, 2.0], TypeError, "list is not a supported array type"),
    ],
)
def test_per_channel_refuses_what_is_not_a_vector(v, error, message):
    with pytest.raises(error, match=message):
        per_channel(v, 4)


FOLDERS = [(bnlib.__path__, ""), (bnlib.book.__path__, "book.")]
MODULES = [found.name for folder in FOLDERS for found in pkgutil.iter_modules(*folder)]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(f"bnlib.{name}")).failed == 0


@pytest.mark.parametrize("name", ["axes", "statistics", "reference", "book.datasets"])
def test_docstrings_have_examples(name):
    assert doctest.testmod(importlib.import_module(f"bnlib.{name}")).attempted > 0
