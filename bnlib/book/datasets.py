"""Real images that installed packages ship: one channel (digits) and three (photographs).

Nothing is downloaded, and every call returns the same values.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image


class Images(NamedTuple):
    """A labelled set of images, split in two.

    Attributes:
        train_x: float32 in 0..1, shape (N, C, H, W).
        train_y: int64 class numbers, shape (N,).
        test_x: like ``train_x``.
        test_y: like ``train_y``.
        classes: the name of every class number.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: tuple[str, ...]


def digits() -> Images:
    """Return the 1797 handwritten digits that scikit-learn ships: one channel, 8 x 8 pixels.

    Every fifth image is a test image. The 13 writers of this set are not recorded, so each of them
    is in both parts: the test tells how well a model reads *these* hands, not new ones.

    Returns:
        :class:`Images` of shapes (1437, 1, 8, 8) and (360, 1, 8, 8); the original's 0..16 is
        divided by 16.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (test part), UCI
    Machine Learning Repository, CC BY 4.0, as shipped by scikit-learn. Used in *One channel, three
    channels, many*.

    Examples:
        >>> digits().train_x.shape
        (1437, 1, 8, 8)
    """
    return _copy(_digits())


def photographs() -> dict[str, np.ndarray]:
    """Return eight photographs by name, their short side scaled to 256 pixels by a box filter.

    Returns:
        ``{name: float32 array in 0..1, shape (3, H, W)}``, channels red, green, blue.

    Source: six shipped by scikit-image: *cat* (S. van der Walt, CC0), *coffee* (R. Michetti,
    courtesy of Pikolo Espresso Bar, CC0), *retina* (M. Häggström, CC0), *rocket* (SpaceX, public
    domain), *hubble* (NASA, public domain), *astronaut* (NASA, public domain); two by
    scikit-learn: *china* (danielbuechele, CC BY 2.0), *flower* (vultilion, CC BY 2.0). Used in
    *Which axes?*

    Examples:
        >>> photographs()["cat"].shape
        (3, 256, 385)
    """
    return {name: _channels_first(pixels) for name, pixels in _photographs().items()}


def photo_patches() -> Images:
    """Return small RGB crops of eight photographs; the class is the photograph a crop is from.

    The photographs are cut into 32-pixel tiles; tile (i, j) is a test tile if (i + 2j) mod 4 = 0.
    The crops are 16 x 16 pixels at a stride of 4 inside one tile, so that no test pixel is ever
    seen in training. Nearly flat crops (standard deviation under 8 of 255) are dropped, and 300
    training and 75 test crops a photograph are drawn. The task is to name the photograph, which
    says nothing about recognising objects in new ones.

    Returns:
        :class:`Images` of shapes (2400, 3, 16, 16) and (600, 3, 16, 16), shuffled.

    Source: see :func:`photographs`. Used in *One channel, three channels, many*.

    Examples:
        >>> photo_patches().test_x.shape
        (600, 3, 16, 16)
    """
    return _copy(_photo_patches())


@functools.cache
def _digits() -> Images:
    bunch = sklearn.datasets.load_digits()
    x = (bunch.images / 16).astype(np.float32)[:, None]
    y = bunch.target.astype(np.int64)
    test = np.arange(len(y)) % 5 == 0
    return Images(x[~test], y[~test], x[test], y[test], tuple(str(digit) for digit in range(10)))


@functools.cache
def _photographs() -> dict[str, np.ndarray]:
    photos = {
        "cat": skimage.data.cat(),
        "coffee": skimage.data.coffee(),
        "retina": skimage.data.retina(),
        "rocket": skimage.data.rocket(),
        "hubble": skimage.data.hubble_deep_field(),
        "astronaut": skimage.data.astronaut(),
        "china": sklearn.datasets.load_sample_image("china.jpg"),
        "flower": sklearn.datasets.load_sample_image("flower.jpg"),
    }
    return {name: _shrink(pixels) for name, pixels in photos.items()}


def _shrink(pixels: np.ndarray, short_side: int = 256) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


@functools.cache
def _photo_patches(tile: int = 32, crop: int = 16, stride: int = 4) -> Images:
    rng = np.random.default_rng(0)
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    photos = _photographs()
    for pixels in photos.values():
        crops: dict[bool, list[np.ndarray]] = {False: [], True: []}
        for i in range(pixels.shape[0] // tile):
            for j in range(pixels.shape[1] // tile):
                for di in range(0, tile - crop + 1, stride):
                    for dj in range(0, tile - crop + 1, stride):
                        top, left = i * tile + di, j * tile + dj
                        patch = pixels[top : top + crop, left : left + crop]
                        if patch.std() >= 8:
                            crops[(i + 2 * j) % 4 == 0].append(_channels_first(patch))
        for is_test, how_many in ((False, 300), (True, 75)):
            chosen = rng.choice(len(crops[is_test]), how_many, replace=False)
            parts[is_test].append(np.stack([crops[is_test][k] for k in chosen]))

    def shuffled(is_test: bool) -> tuple[np.ndarray, np.ndarray]:
        x = np.concatenate(parts[is_test])
        y = np.repeat(np.arange(len(photos)), len(x) // len(photos))
        order = rng.permutation(len(x))
        return x[order], y[order].astype(np.int64)

    return Images(*shuffled(False), *shuffled(True), tuple(photos))


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 255


def _copy(images: Images) -> Images:
    """A copy, so that what a caller writes into it does not reach the next one."""
    train_x, train_y, test_x, test_y, classes = images
    return Images(train_x.copy(), train_y.copy(), test_x.copy(), test_y.copy(), classes)
