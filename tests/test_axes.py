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
from bnlib import per_channel, reduction_axes, split_groups
from bnlib.axes import checked_axes, expand


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


@pytest.mark.parametrize(
    ("norm", "ndim", "channel_axis", "axes"),
    [
        ("batch", 4, 1, (0, 2, 3)),
        ("layer", 4, 1, (1, 2, 3)),
        ("layer", 4, -1, (1, 2, 3)),
        ("layer", 2, 1, (1,)),
        ("instance", 4, 1, (2, 3)),
        ("instance", 4, -1, (1, 2)),
        ("instance", 3, 2, (1,)),
        ("instance", 5, 2, (1, 3, 4)),
    ],
)
def test_axes_of_the_siblings(norm, ndim, channel_axis, axes):
    assert reduction_axes(ndim, channel_axis, norm) == axes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, "group"), "norm to be one of ('batch', 'layer', 'instance'), got 'group'"),
        ((4, 0, "layer"), "expected samples on axis 0 for norm='layer', got channel_axis 0"),
        ((4, -4, "instance"), "expected samples on axis 0 for norm='instance', got channel_axis 0"),
        ((2, 1, "instance"), "expected ndim >= 3 (samples, channels, positions), got ndim 2"),
    ],
)
def test_norms_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError) as caught:
        reduction_axes(*arguments)
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray, array_api_strict.asarray])
@pytest.mark.parametrize(
    ("shape", "groups", "channel_axis", "expected"),
    [
        ((2, 6, 4, 5), 3, 1, (2, 3, 2, 4, 5)),
        ((2, 6), 6, 1, (2, 6, 1)),
        ((2, 4, 5, 6), 2, -1, (2, 4, 5, 2, 3)),
        ((0, 4, 3), np.int64(1), 1, (0, 1, 4, 3)),
    ],
)
def test_groups_are_neighbouring_channels(asarray, shape, groups, channel_axis, expected):
    x = np.arange(np.prod(shape)).reshape(shape)
    got = split_groups(asarray(x), groups, channel_axis)
    assert tuple(got.shape) == expected
    each = shape[channel_axis] // groups
    channels, axis = np.moveaxis(x, channel_axis, 0), channel_axis % len(shape)
    for g, group in enumerate(np.moveaxis(np.from_dlpack(got), (axis, axis + 1), (0, 1))):
        np.testing.assert_array_equal(group, channels[g * each : (g + 1) * each])


def test_split_groups_takes_any_layout_and_is_a_view_where_it_can():
    x = np.arange(24).reshape(2, 4, 3)
    assert np.shares_memory(split_groups(x, 2), x)
    back_to_front = x[::-1].swapaxes(0, 2)
    np.testing.assert_array_equal(
        split_groups(back_to_front, 2).reshape(back_to_front.shape), back_to_front
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 6)), 4), ValueError, "expected groups that divide 6 channels, got 4"),
        ((np.ones((2, 6)), 0), ValueError, "expected groups that divide 6 channels, got 0"),
        ((np.ones((2, 6)), -3), ValueError, "expected groups that divide 6 channels, got -3"),
        ((np.ones((2, 6)), 2.0), TypeError, "'float' object cannot be interpreted"),
        ((np.ones((2, 6)), 2, 2), ValueError, "expected channel_axis in -2..1 for ndim 2, got 2"),
        ((np.ones(6), 2), ValueError, "expected ndim >= 2 .samples and channels., got ndim 1"),
        (([[1.0, 2.0]], 2), TypeError, "list is not a supported array type"),
    ],
)
def test_groups_that_make_no_sense(arguments, error, message):
    with pytest.raises(error, match=message):
        split_groups(*arguments)


def test_what_was_reduced_broadcasts_back():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    for axes in ((0, 2, 3), (1,), (3,), (2, 3), (0, 1, 2, 3)):
        expected = np.broadcast_to(x.sum(axis=axes, keepdims=True), x.shape)
        np.testing.assert_array_equal(
            np.broadcast_to(expand(x.sum(axis=axes), axes), x.shape), expected
        )


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (1, (1,)),
        (-1, (3,)),
        (np.int64(2), (2,)),
        ((-1, 0), (0, 3)),
        ([2, 3], (2, 3)),
        (np.array([3, 1]), (1, 3)),
    ],
)
def test_one_axis_or_several(axes, expected):
    assert checked_axes(axes, 4) == expected


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ((), ValueError, r"expected different axes, at least one, got \(\)"),
        ((1, -3), ValueError, r"expected different axes, at least one, got \(1, -3\)"),
        (4, ValueError, "expected axes in -4..3 for ndim 4, got 4"),
        ((0, -5), ValueError, r"expected axes in -4..3 for ndim 4, got \(0, -5\)"),
        (1.0, TypeError, "'float' object is not iterable"),
        ("NH", TypeError, "'str' object cannot be interpreted as an integer"),
        (None, TypeError, "'NoneType' object is not iterable"),
    ],
)
def test_axes_that_are_none(axes, error, message):
    with pytest.raises(error, match=message):
        checked_axes(axes, 4)


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
