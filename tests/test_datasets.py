"""The images: what they are, that they never change, and that the parts do not overlap."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnlib.book import datasets
from bnlib.book.datasets import Images, digits, photo_patches, photographs

CROP, STRIDE = 16, 4


@pytest.mark.parametrize(
    ("load", "train", "test", "classes"),
    [
        (digits, (1437, 1, 8, 8), (360, 1, 8, 8), tuple("0123456789")),
        (
            photo_patches,
            (2400, 3, 16, 16),
            (600, 3, 16, 16),
            ("cat", "coffee", "retina", "rocket", "hubble", "astronaut", "china", "flower"),
        ),
    ],
)
def test_shapes_types_and_ranges(load, train, test, classes):
    images = load()
    assert images.classes == classes
    for x, y, shape in (
        (images.train_x, images.train_y, train),
        (images.test_x, images.test_y, test),
    ):
        assert (x.shape, x.dtype) == (shape, np.float32)
        assert (y.shape, y.dtype) == (shape[:1], np.int64)
        assert x.flags.c_contiguous
        assert x.min() >= 0
        assert 0.9 < x.max() <= 1
        assert set(y.tolist()) == set(range(len(classes)))


def test_digits_are_the_ones_of_scikit_learn():
    images = digits()
    train, test = np.bincount(images.train_y), np.bincount(images.test_y)
    assert train.tolist() == [136, 154, 151, 135, 143, 143, 151, 153, 138, 133]
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.unique(images.train_x * 16).tolist() == list(range(17))
    assert round(float(images.train_x.mean()), 3) == 0.305


def test_patches_are_balanced():
    images = photo_patches()
    assert np.bincount(images.train_y).tolist() == [300] * 8
    assert np.bincount(images.test_y).tolist() == [75] * 8
    # A decoder of JPEG may differ by a unit of 255 from another; a mean hardly notices.
    np.testing.assert_allclose(images.train_x.mean((0, 2, 3)), [0.443, 0.330, 0.283], atol=0.005)


def test_patches_are_shuffled():
    assert np.count_nonzero(np.diff(photo_patches().train_y)) > 1000


def test_flat_patches_are_dropped():
    images = photo_patches()
    # Rounded to float32 after the choice, hence not exactly 8 of 255.
    assert images.train_x.std((1, 2, 3), dtype=np.float64).min() >= 7.999 / 255


def test_photographs():
    photos = photographs()
    assert tuple(photos) == photo_patches().classes
    for photo in photos.values():
        assert photo.dtype == np.float32
        assert photo.shape[0] == 3
        assert min(photo.shape[1:]) == 256
        assert photo.min() >= 0
        assert 0.9 < photo.max() <= 1


# --- no pixel is in both parts --------------------------------------------------------------------


def covered(photo: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Which pixels of ``photo`` the crops show; a crop that looks like several shows them all."""
    places: dict[bytes, list[tuple[int, int]]] = {}
    for top in range(0, photo.shape[1] - CROP + 1, STRIDE):
        for left in range(0, photo.shape[2] - CROP + 1, STRIDE):
            window = photo[:, top : top + CROP, left : left + CROP]
            places.setdefault(window.tobytes(), []).append((top, left))
    mask = np.zeros(photo.shape[1:], bool)
    for crop in crops:
        for top, left in places[crop.tobytes()]:
            mask[top : top + CROP, left : left + CROP] = True
    return mask


@pytest.mark.parametrize("label", range(8))
def test_no_test_pixel_is_seen_in_training(label):
    images = photo_patches()
    photo = photographs()[images.classes[label]]
    train = covered(photo, images.train_x[images.train_y == label])
    test = covered(photo, images.test_x[images.test_y == label])
    assert train.sum() > 10_000
    assert test.sum() > 5_000
    assert not (train & test).any()


def test_a_random_split_would_share_pixels():
    images = photo_patches()
    crops = images.train_x[images.train_y == 0]
    photo = photographs()["cat"]
    assert (covered(photo, crops[::2]) & covered(photo, crops[1::2])).any()


@pytest.mark.parametrize("load", [digits, photo_patches])
def test_no_test_image_is_a_training_image(load):
    images = load()
    train = {x.tobytes() for x in images.train_x}
    assert not any(x.tobytes() in train for x in images.test_x)


# --- always the same, without a network -----------------------------------------------------------


def flat(images: Images | dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(images.values()) if isinstance(images, dict) else list(images[:4])


@pytest.mark.parametrize("load", [digits, photographs, photo_patches])
def test_what_a_caller_writes_does_not_reach_the_next_one(load):
    before = flat(load())
    for part in flat(load()):
        part[...] = 7
    for part, again in zip(before, flat(load()), strict=True):
        np.testing.assert_array_equal(part, again)


def checksum() -> str:
    parts = [*flat(digits()), *flat(photographs()), *flat(photo_patches())]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_another_process_without_network_or_home_gets_the_same_bytes(tmp_path):
    code = """
import socket
class Refused(socket.socket):
    def __init__(self, *args, **kwargs):
        raise OSError("the data must not need a network")
socket.socket = Refused
import test_datasets
print(test_datasets.checksum())
"""
    homes = ("HOME", "XDG_CACHE_HOME", "SKIMAGE_DATADIR", "SCIKIT_LEARN_DATA")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {name: str(tmp_path / name) for name in homes},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == checksum(), done.stderr


@pytest.mark.parametrize("load", [digits, photographs, photo_patches])
def test_credits_are_in_the_docstring(load):
    assert "Source:" in load.__doc__


@pytest.mark.parametrize(
    "credit", ["CC0", "public domain", "danielbuechele, CC BY 2.0", "vultilion, CC BY 2.0"]
)
def test_every_photograph_is_credited(credit):
    text = " ".join(datasets.photographs.__doc__.split())
    assert credit in text
    assert all(f"*{name}*" in text for name in photographs())
