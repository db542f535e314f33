"""Each chapter's questions are well formed, their numbers are right, and anyone can open them."""

from __future__ import annotations

import copy
import math
import re

import nbformat
import numpy as np
import pytest
import torch
from test_book import CHAPTERS
from test_pages import MODES, Visit, inaccessible_in_some_mode, overflow
from torch import nn

import bnlib
from bnlib.book.datasets import photo_patches
from bnlib.fold import fold_batch_norm, fold_conv_bn, fold_linear_bn
from bnlib.recalibration import recalibrate

# --- Form -----------------------------------------------------------------------------------------

QUESTION = re.compile(r"^\d+\. (.+?)\n\n(.*?)(?=^\d+\. |\Z)", re.MULTILINE | re.DOTALL)
OPTION = re.compile(
    r"^   :::\{dropdown\} (?P<text>.+)\n"
    r"(?P<right>   :class-container: quiz-right\n)?"
    r"\n   \*\*(?P<verdict>Right|No):\*\* (?P<why>.+)\n\n   :::\n?",
    re.MULTILINE,
)


def quiz(nb):
    """The chapter's questions, as (question, its options); an option is a match of OPTION."""
    (source,) = [c.source for c in nb.cells if c.source.startswith("## Check yourself\n")]
    return [(m[1], list(OPTION.finditer(m[2] + "\n"))) for m in QUESTION.finditer(source)]


def form(nb):
    """What is wrong with a chapter's questions."""
    asked, problems = quiz(nb), []
    if not 3 <= len(asked) <= 5:
        problems.append(f"expected 3 to 5 questions, got {len(asked)}")
    (source,) = [c.source for c in nb.cells if c.source.startswith("## Check yourself\n")]
    read = sum(len(options) for _, options in asked)
    if read != source.count("{dropdown}"):
        problems.append(f"{source.count('{dropdown}')} answers, {read} of them well formed")
    for question, options in asked:
        right = [o for o in options if o["verdict"] == "Right"]
        if len(right) != 1:
            problems.append(f"{question!r}: expected one right answer, got {len(right)}")
        if len(options) - len(right) < 2:
            problems.append(f"{question!r}: expected two wrong answers or more")
        if len({o["text"] for o in options}) != len(options):
            problems.append(f"{question!r}: an answer is given twice")
        for o in options:
            if (o["verdict"] == "Right") != bool(o["right"]):
                problems.append(f"{o['text']!r}: the verdict and the colour differ")
            if len(o["why"]) < 40:
                problems.append(f"{o['text']!r}: expected a reason, got {o['why']!r}")
            if not re.search(r"\{(eq|numref)\}`[\w-]+`|\]\(#[\w-]+\)", o["why"]):
                problems.append(f"{o['text']!r}: does not say where the chapter derives it")
    return problems


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_questions(path):
    assert form(nbformat.read(path, as_version=4)) == []


def cut(pattern, by=""):
    return lambda source: re.sub(pattern, by, source, count=1, flags=re.DOTALL)


@pytest.mark.parametrize(
    "spoil",
    [
        cut(r"\n\n3\. .*"),
        cut(r"\Z", "\n\n6. Once more?\n\n7. And once more?\n"),
        cut(r"\*\*Right:", "**No:"),
        cut(r"\*\*No:", "**Right:"),
        cut(r"   :class-container: quiz-right\n"),
        cut(r"\*\*No:\*\* [^\n]*", "**No:** see {eq}`eq-axes-count`."),
        cut(r"\*\*No:\*\* [^\n]*", ""),
        cut(r"\*\*No:\*\* [^\n]*", "**No:** because it is wrong, for some reason or other."),
        cut(r"(   :::\{dropdown\} [^\n]*)(.*?)   :::\{dropdown\} [^\n]*", r"\1\2\1"),
        cut(r"(1\. [^\n]*\n\n)   :::\{dropdown\}.*?:::\n\n   :::\{dropdown\}.*?:::\n\n", r"\1"),
    ],
)
def test_form_finds_a_spoilt_quiz(spoil):
    (path,) = [p for p in CHAPTERS if p.stem == "which-axes"]
    nb = nbformat.read(path, as_version=4)
    (cell,) = [c for c in nb.cells if c.id == "quiz"]
    assert form(nb) == []
    before = copy.copy(cell.source)
    cell.source = spoil(before)
    assert cell.source != before
    assert form(nb)


# --- Numbers --------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)


def features_as_positions():
    x = RNG.normal(size=(64, 100)) * RNG.uniform(1, 9, size=100)
    order = RNG.permutation(100)

    def as_image(x):
        return bnlib.batch_norm_forward(x.reshape(64, 1, 10, 10))[0].reshape(64, 100)

    assert np.allclose(as_image(x[:, order]), as_image(x)[:, order])
    assert not np.allclose(as_image(x), bnlib.batch_norm_forward(x)[0])
    image, each = bnlib.moments(x.reshape(64, 1, 10, 10)), bnlib.moments(x)
    return (
        f"it has {image.mean.size} mean of {image.count} values, "
        f"not {each.mean.size} means of {each.count}; the output is permuted alike"
    )


def shuffled_positions():
    x = RNG.normal(size=(8, 3, 36))
    orders = RNG.permuted(np.tile(np.arange(36), (8, 1)), axis=1)[:, None, :]
    shuffled = np.take_along_axis(bnlib.batch_norm_forward(x)[0], orders, axis=2)
    after = bnlib.batch_norm_forward(np.take_along_axis(x, orders, axis=2))[0]
    assert np.abs(after - shuffled).max() < 1e-12 < np.abs(x - shuffled).max()
    return "what came out before, shuffled in the same way"


def mean_of_everything():
    x = RNG.normal(size=(4, 3, 5, 3)) + np.arange(3).reshape(3, 1, 1)
    centred = x - x.mean(axis=(0, 2, 3))
    assert abs(centred.mean()) < 1e-12 < np.abs(centred.mean(axis=(0, 2, 3))).min()
    return "no: each mean is subtracted as often as it should be, from the wrong numbers"


def whitened_by_a_convolution():
    mixed = RNG.normal(size=(8, 2, 4, 4))
    mixed[:, 1] += mixed[:, 0]
    y = torch.from_numpy(bnlib.batch_norm_forward(mixed)[0])
    rows = y.transpose(0, 1).flatten(1)
    values, directions = torch.linalg.eigh(torch.cov(rows))
    weight = directions / values.sqrt() @ directions.T
    white = nn.functional.conv2d(y, weight[:, :, None, None]).transpose(0, 1).flatten(1)
    assert torch.cov(rows)[0, 1] > 0.5
    assert torch.allclose(torch.cov(white), torch.eye(2, dtype=torch.float64))
    return "yes, a 1 × 1 convolution with the right weights"


def rules_that_agree():
    noise = RNG.normal(size=(8, 3, 4, 4))
    noise -= noise.mean(axis=(0, 2, 3), keepdims=True)
    noise /= noise.std(axis=(0, 2, 3), keepdims=True)
    mixed = noise.copy()
    mixed[:, 1] = mixed[:, 0]  # as correlated as can be
    scales, offsets = np.array([1, 2, 3]).reshape(3, 1, 1), np.array([0, 1, 2]).reshape(3, 1, 1)

    def joint(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5)

    agree = {
        "if they have equal means and equal variances": mixed,
        "if the three channels have equal means": noise * scales,
        "if they are uncorrelated": noise * scales + offsets,
    }
    (only,) = [k for k, x in agree.items() if np.allclose(joint(x), bnlib.batch_norm_forward(x)[0])]
    return only


def scale_in_evaluation():
    x = RNG.normal(size=(8, 3, 4, 4))
    brighter = x.copy()
    brighter[:, 0] *= 10
    stored = {"running_mean": np.ones(3), "running_var": np.full(3, 2.0), "training": False}
    y, z = (bnlib.batch_norm_forward(batch, **stored)[0] for batch in (x, brighter))
    shift = z[:, 0] - 10 * y[:, 0]
    assert np.allclose(shift, shift.flat[0]) and (y == z)[:, 1:].all()
    return "red comes out ten times as strong, up to a shift, and nothing else changes"


def groups_across_branches():
    x = torch.from_numpy(RNG.normal(size=(8, 96, 4, 4)) * RNG.uniform(0.1, 10, size=(96, 1, 1)))
    branches = x[:, :64], x[:, 64:]

    def agree(behind, *each):
        joined = nn.functional.group_norm(x, behind)
        pairs = zip(branches, each, strict=True)
        parts = [nn.functional.group_norm(part, groups) for part, groups in pairs]
        return torch.allclose(torch.cat(parts, dim=1), joined, rtol=0, atol=1e-12)

    assert agree(96, 64, 32) and agree(12, 8, 4) and not agree(4, 4, 4)
    whole, first, second = (part.shape[1] // 4 for part in (x, *branches))
    return f"no: behind it a group has {whole} channels, in the branches {first} and {second}"


def momentum_of_one():
    x = torch.randn(4, 3, dtype=torch.float64)
    layer = nn.BatchNorm1d(3, eps=1e-12, momentum=1.0, dtype=torch.float64)
    layer(x)
    variance = layer.eval()(x).var(dim=0, correction=0)
    assert torch.allclose(variance, torch.tensor(0.75, dtype=torch.float64))
    return "3/4"


def weak_channel_doubled():
    x = np.array([[-0.001], [0.001]])
    once, twice = (bnlib.batch_norm_forward(k * x, eps=1e-5)[0].std() for k in (1, 2))
    assert f"{once:.2f}" == "0.30"
    return f"about {twice:.2f}"


def the_other_part():
    x = RNG.normal(size=(100, 1)) + np.arange(100)[:, None]
    whole, first = bnlib.moments(x), bnlib.moments(x[:60])
    mean = (100 * whole.mean - 60 * first.mean) / 40
    m2 = whole.m2 - first.m2 - (mean - first.mean) ** 2 * 60 * 40 / 100
    assert np.allclose(m2 / 40, x[60:].var(), rtol=1e-12)
    return "yes, exactly, up to rounding"


def evaluation_after_pairs():
    x = torch.tensor(photo_patches().train_x, dtype=torch.float64)
    layer = nn.BatchNorm2d(3, momentum=None, affine=False, dtype=torch.float64)
    for pair in torch.randint(len(x), (3000, 2)):
        layer(x[pair])
    variance = layer.eval()(x).var(dim=(0, 2, 3), correction=0)
    assert (variance > 1.5).all()
    return "clearly more than 1"


def longer_average():
    x = photo_patches().train_x[:, 1:2].astype(np.float64)
    rng = np.random.default_rng(0)
    pairs = [bnlib.moments(x[rng.integers(0, len(x), 2)]) for _ in range(6000)]
    settled = {}
    for alpha in (0.1, 0.01):
        run, kept = (np.zeros(1), x.var(keepdims=True).ravel() * 0.6), []
        for moments in pairs:
            run = bnlib.update_running_stats(*run, moments, alpha)
            kept.append(run[1][0] / x.var())
        settled[alpha] = np.mean(kept[500:]), np.std(kept[500:])
    assert np.allclose([mean for mean, _ in settled.values()], 0.605, atol=0.03)
    assert settled[0.01][1] < settled[0.1][1] / 2
    return "nothing, but the value wobbles less"


def vectors_of_four():
    layer = nn.BatchNorm1d(200, momentum=None, dtype=torch.float64)
    for x in torch.randn(2000, 4, 200, dtype=torch.float64):
        layer(x)
    return f"at {layer.running_var.mean().item():.0f}"


def images_without_a_mean():
    kernel = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    x = torch.randn(500, 1, 8, 8, dtype=torch.float64)
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    x = nn.functional.conv2d(padded, kernel - kernel.mean())
    layer = nn.BatchNorm2d(1, momentum=None, dtype=torch.float64)
    for image in x.split(1):
        layer(image)
    ratio = layer.running_var.item() / x.var(correction=0).item()
    assert math.isclose(ratio, 64 / 63)
    return "64/63"


def recalibrated_by_sorted_batches():
    images = photo_patches()
    x = torch.from_numpy(images.train_x).double()
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    recalibrate(layer, [x[images.train_y == k] for k in range(8)])
    whole = x.var((0, 2, 3))
    assert torch.allclose(layer.running_var, whole, rtol=1e-12)
    return "not at all"


def gradient_without_a_share_in_the_loss():
    x, dy = RNG.normal(size=(2, 4, 1, 3, 3))
    dy[2] = 0
    x_hat, cache = bnlib.batch_norm_forward(x, np.array([1.7]), np.zeros(1))
    dx, dgamma, dbeta = bnlib.batch_norm_backward(dy, cache)
    r, others = (x.var() + 1e-5) ** -0.5, [0, 1, 3]
    x_hat = (x - x.mean()) * r
    assert np.allclose([dgamma[0], dbeta[0]], [(dy * x_hat)[others].sum(), dy[others].sum()])
    assert np.allclose(dx[2], -1.7 * r / x.size * (dbeta + x_hat[2] * dgamma))
    answer = r"$-\frac{\gamma\,r}{m}(\mathrm{d}\beta + \hat x_i\,\mathrm{d}\gamma)$"
    return answer + ", with the sums over the other photographs"


def bias_removed_from_the_file():
    layer = nn.BatchNorm1d(1, eps=0).eval()
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.running_var, 1 / 0.5**2)
    nn.init.constant_(layer.running_mean, 5.0 + 0.3)
    x = torch.randn(4, 1)
    (change,) = (layer(x) - layer(x + 5.0)).mean(dim=0).tolist()
    return f"by {change:.0f}".replace("-", "−")


def mistake_that_stays_hidden():
    x = RNG.normal(size=(8, 1))
    x_hat, cache = bnlib.batch_norm_forward(x, np.ones(1), np.zeros(1), eps=1e-12)
    dy, r = x_hat**2, x.std() ** -1.0
    right = bnlib.batch_norm_backward(dy, cache).dx
    wrong = {
        "the path through the variance": r * (dy - dy.mean()),
        "the path through the mean": r * (dy - x_hat * (dy * x_hat).mean()),
        r"the forgotten $\gamma$": r * (dy - dy.mean() - x_hat * (dy * x_hat).mean()),
    }
    (hidden,) = [name for name, dx in wrong.items() if np.abs(dx - right).max() < 1e-9]
    return hidden


def share_of_a_step():
    convolutions, norms = 70 / 4, 30 / 2
    return f"{100 * norms / (convolutions + norms):.0f} %"


def without_affine():
    """The operations of one element, counted with and without, and the time of a made-up card."""

    class Counted(float):
        operations = 0

        def of(operation):
            def counting(self, other):
                Counted.operations += 1
                return Counted(operation(float(self), other))

            return counting

        __sub__, __mul__, __add__ = of(float.__sub__), of(float.__mul__), of(float.__add__)

    def operations(layer):
        Counted.operations = 0
        layer(Counted(3.0))
        return Counted.operations

    mean, r, gamma, beta = 1.0, 0.5, 2.0, 1.0
    scale = gamma * r  # once per channel
    normalised = [lambda x: (x - mean) * scale + beta, lambda x: (x - mean) * r]
    sums = 4  # centre, add, square, add
    counts = [sums + operations(layer) for layer in normalised]
    peak, bandwidth = 15.0, 1.0  # the corner
    times = {max(n / peak, 3 * 4 / bandwidth) for n in counts}
    assert counts[0] == 7 and len(times) == 1
    words = {1: "one", 2: "two"}
    return f"{words[counts[0] - counts[1]]} of seven operations, but hardly any time"


def layer_norm_backward():
    """The gradient of an image needs nothing of another one, so each is read once."""
    x, dy = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64).unbind()
    other = x.clone()
    other[1:] += 1
    gradients = []
    for batch in (x, other):
        batch.requires_grad_()
        y = nn.functional.group_norm(batch, 1, torch.arange(3.0).double())
        gradients.append(torch.autograd.grad(y, batch, dy)[0])
    assert torch.equal(gradients[0][0], gradients[1][0])
    read, written = ["dy", "x"], ["dx"]
    words = {3: "three", 5: "five"}
    count = words[len(read + written)]
    return f"{count}, since all that $\\mathrm{{d}}x$ depends on is in one image"


def blocks():
    x = torch.empty(32, 8, 56, 56).to(memory_format=torch.channels_last)
    count = {x.stride(3) * w * 2 // 32 for w in range(32)}
    assert x.stride(3) * 2 == 16
    return f"{len(count)}, one for every two numbers"


def digits_of_one_pass():
    errors = []
    for _ in range(20):
        x = (RNG.normal(size=100_000) + 1000).astype(np.float32)
        one_pass = (x * x).mean() - x.mean() ** 2
        errors.append(abs(one_pass / x.astype(np.float64).var() - 1))
    assert 0.01 < max(errors) < 1  # 4 digits would be 1e-4
    return "one, if any"


def squares_of_alternating_values():
    x = np.tile(np.float32([9999, 10_001]), 2048)[:, None]
    square, mean = x * x, x
    while len(mean) > 1:
        square, mean = square[::2] + square[1::2], mean[::2] + mean[1::2]
    found = float(square[0, 0] / 4096 - (mean[0, 0] / 4096) ** 2)
    assert x.astype(np.float64).var() == 1
    return f"{found:.0f}"


def variance_of_stored_values():
    x = torch.randn(100_000, dtype=torch.float64) + 100
    share = x.bfloat16().double().var() / x.var() - 1
    return f"about {100 * share:.0f} % too large"


def millimetres():
    ratios, nans = [], []
    x = (RNG.normal(size=(4096, 100)) * 0.001 + 0.5).astype(np.float32)
    for unit in (1, 1024):  # a power of two rounds alike
        y = x * np.float32(unit)
        one_pass = (y * y).mean(axis=0) - y.mean(axis=0) ** 2
        ratios.append(one_pass / y.astype(np.float64).var(axis=0))
        nans.append((one_pass + np.float32(1e-5) < 0).sum())
    assert np.allclose(*ratios, rtol=1e-6)
    assert nans[0] == 0 < nans[1]
    return "as many digits are lost, and NaN becomes more likely"


def threads_of_running_var():
    x = torch.randn(8, 16, 28, 28) + 10
    x = x.contiguous(memory_format=torch.channels_last)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            state = torch.zeros(16), torch.ones(16)
            nn.functional.batch_norm(x, *state, training=True)
            found.append(state[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    return "the number of threads"


def own_part_first():
    parts = RNG.normal(size=64).astype(np.float32)
    by_number, own_first = set(), set()
    for last in range(64):
        own_first.add(float(sum(np.delete(parts, last), parts[last])))
        by_number.add(float(sum(parts, np.float32(0))))
    assert len(by_number) == 1 < len(own_first)
    return "no: the order of the sum depends on which program comes last"


def splits_at_one_time():
    fits = [splits for splits in range(1, 20) if 64 * splits <= 4 * 132]
    return f"{max(fits)}"


def nan_before_a_relu():
    v = torch.tensor(math.nan)
    assert torch.where(v > 0, v, 0) == 0 and torch.relu(v).isnan()
    assert torch.where((v <= 0) == 0, v, 0).isnan()
    return "the kernel writes 0, PyTorch passes it on"


def padded_maps():
    """What is read of 8 x 8 numbers of which 7 x 7 exist: sectors of 32 bytes."""
    grown = []
    for bytes_each in (2, 4):
        sectors = {(8 * i + j) * bytes_each // 32 for i in range(7) for j in range(7)}
        grown.append(f"{32 * len(sectors) / (49 * bytes_each) - 1:.0%}".replace("%", " %"))
    assert grown[1] == "14 %"  # which the answer says of float32
    return f"it grows by {grown[0]}"


def the_same_images_everywhere():
    one = bnlib.moments(RNG.normal(size=(4, 3, 5, 5)))
    eight = bnlib.merge(*[one] * 8)
    assert np.allclose(eight.mean, one.mean) and np.allclose(eight.var(), one.var())
    assert (eight.var(correction=1) < one.var(correction=1)).all()
    return "only `running_var`, which is a little smaller"


def variance_of_uneven_shards():
    one_image = np.tile([-1.0, 1.0], 50)[:, None]  # mean 0, variance 1
    parts = [bnlib.moments(np.tile(one_image, (n, 1)) + mean) for n, mean in ((7, 2), (1, 10))]
    assert all(np.allclose(part.var(), 1) for part in parts)
    return f"{bnlib.merge(*parts).var()[0]:.0f}"


def gradients_that_ddp_averages():
    """Summed in the layer, γ and β are wrong by the number of ranks; dx is wrong if not summed."""
    x, dy = RNG.normal(size=(2, 12, 1))
    x_hat, cache = bnlib.batch_norm_forward(x, np.ones(1), np.zeros(1), eps=1e-12)
    whole = bnlib.batch_norm_backward(dy, cache)
    parts = [(dy * x_hat)[rows].sum() for rows in np.split(np.arange(12), 4)]
    right, summed = np.mean(parts), np.mean([sum(parts)] * 4)
    assert np.allclose([4 * right, summed], whole.dweight)
    rank, r = slice(0, 3), x.std() ** -1.0
    local = r * (dy - dy.sum() / 12 - x_hat * parts[0] / 12)[rank]
    exchanged = r * (dy - dy.sum() / 12 - x_hat * sum(parts) / 12)[rank]
    assert np.allclose(exchanged, whole.dx[rank]) and not np.allclose(local, whole.dx[rank])
    return r"those of $\gamma$ and $\beta$"


def folded_with_another_epsilon():
    errors = []
    for variance, scale in ((1.0, 1.0), (1.0, 5.0), (1e-4, 1.0)):
        norm = nn.BatchNorm1d(1).eval()
        nn.init.constant_(norm.running_var, variance)
        nn.init.constant_(norm.weight, scale)
        layer, other = nn.Linear(2, 1), copy.deepcopy(norm)
        other.eps = 1e-3
        ratio = fold_linear_bn(layer, other).weight / fold_linear_bn(layer, norm).weight
        errors.append(ratio.mean().item())
    assert 0.99 < errors[0] < 1 and abs(errors[1] - errors[0]) < 1e-6 and 0.3 < errors[2] < 0.34
    return "those with a small running variance, which come out too weak"


def slope_of_a_grouped_weight():
    layer, norm = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6).eval()
    assert layer.weight.shape == (4, 3, 3, 3)
    norm.weight.data = torch.arange(6.0)
    ratio = (fold_conv_bn(layer, norm).weight / layer.weight)[3, 1].mean().item()
    return f"$a_{round(ratio)}$"


def exact_at_the_border():
    x, conv = torch.rand(1, 2, 6, 6), nn.Conv2d(2, 3, 3, padding=1).double()
    found = []
    for name, beta in (
        ("for those with $\\beta = 0$", lambda a, mean: 0 * a),
        (
            r"for those with $\beta = a\,\mu_\mathrm{run}$ in every channel",
            lambda a, mean: a * mean,
        ),
    ):
        norm = nn.BatchNorm2d(2).double().eval()
        norm.running_mean.copy_(torch.tensor([0.3, -2.0]))
        a = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        norm.bias.data = beta(a, norm.running_mean).detach()
        b = norm.bias - a * norm.running_mean
        folded = copy.deepcopy(conv)
        folded.weight.data *= a[None, :, None, None]
        folded.bias.data += (conv.weight * b[None, :, None, None]).sum((1, 2, 3))
        if torch.allclose(folded(x.double()), conv(norm(x.double())), rtol=0, atol=1e-12):
            found.append(name)
    (only,) = found
    return only


def into_the_layer_after():
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    assert fold_batch_norm(nn.Sequential(*layers).eval()).fold_report.folded == {"2": "3"}
    return "into the second convolution"


def dead_filter_set_to_zero():
    conv = nn.Conv2d(2, 2, 3, groups=2)
    conv.weight.data[1] *= 1000
    x = torch.randn(4, 2, 6, 6)
    x[:, 1] = 0  # what a dead ReLU gives
    error = []
    for scale in (1, 0):
        model = copy.deepcopy(conv)
        model.weight.data[1] *= scale
        assert torch.equal(model(x), conv(x))
        step = model.weight.abs().max() / 127
        model.weight.data = (model.weight / step).round() * step
        error.append((model(x) - conv(x)).abs().max().item())
    assert error[1] < 0.1 * error[0]
    return "nothing in floating point; the 8-bit one recovers"


def half_of_the_data_by_itself():
    layer = nn.BatchNorm1d(1, affine=False, eps=1e-12).double()
    data = torch.from_numpy(RNG.normal(size=(2, 1000, 1)))
    data = (data - data.mean(1, keepdim=True)) / data.std(1, keepdim=True)
    data[1] += 4
    layer.momentum = 0.01
    for step in range(2000):
        layer(data[step % 2])
    out = layer.eval()(data[1])
    return f"mean {out.mean():.0f}, variance {out.var():.0f}"


def slope_of_two_variances():
    v = np.array([1.0, 4.0])
    return f"{(v**-0.5).mean() * v.mean() ** 0.5:.2f}"


NUMBERS = {
    "which-axes": {
        1: features_as_positions,
        2: shuffled_positions,
        3: mean_of_everything,
    },
    "channels": {
        1: rules_that_agree,
        2: whitened_by_a_convolution,
        3: scale_in_evaluation,
        4: groups_across_branches,
    },
    "forward": {
        1: momentum_of_one,
        2: weak_channel_doubled,
        3: the_other_part,
        4: evaluation_after_pairs,
    },
    "backward": {
        1: gradient_without_a_share_in_the_loss,
        2: bias_removed_from_the_file,
        3: mistake_that_stays_hidden,
    },
    "running": {
        1: longer_average,
        2: vectors_of_four,
        3: images_without_a_mean,
        4: recalibrated_by_sorted_batches,
    },
    "modes": {
        2: half_of_the_data_by_itself,
        3: slope_of_two_variances,
    },
    "memory": {
        1: share_of_a_step,
        2: layer_norm_backward,
        3: without_affine,
        4: blocks,
    },
    "variance": {
        1: squares_of_alternating_values,
        2: variance_of_stored_values,
        3: millimetres,
        4: threads_of_running_var,
    },
    "kernels": {
        1: digits_of_one_pass,
        2: own_part_first,
        3: splits_at_one_time,
        4: nan_before_a_relu,
        5: padded_maps,
    },
    "distributed": {
        1: the_same_images_everywhere,
        2: variance_of_uneven_shards,
        3: gradients_that_ddp_averages,
    },
    "folding": {
        1: folded_with_another_epsilon,
        2: slope_of_a_grouped_weight,
        3: exact_at_the_border,
        4: into_the_layer_after,
        5: dead_filter_set_to_zero,
    },
}


@pytest.mark.parametrize(
    ("chapter", "number"), [(name, n) for name, row in NUMBERS.items() for n in row]
)
def test_right_answer(chapter, number):
    torch.manual_seed(0)
    (path,) = [p for p in CHAPTERS if p.stem == chapter]
    _, options = quiz(nbformat.read(path, as_version=4))[number - 1]
    (right,) = [o["text"] for o in options if o["right"]]
    assert right == NUMBERS[chapter][number]()


# --- In a browser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_answers_open_by_keyboard(site, browser, path):
    page = site / "book" / path.parent.name / f"{path.stem}.html"
    asked = quiz(nbformat.read(path, as_version=4))
    with Visit(browser, page.as_uri()) as visit:
        section = visit.page.locator("#check-yourself")
        answers = section.locator("li > [role=group] > details")
        assert answers.count() == sum(len(options) for _, options in asked)
        for i, option in enumerate(o for _, options in asked for o in options):
            verdict = answers.nth(i).locator(f"strong:text-is('{option['verdict']}:')")
            assert not verdict.is_visible()
            answers.nth(i).locator("summary").focus()
            visit.page.keyboard.press("Enter" if i % 2 else "Space")
            assert verdict.is_visible()
        assert section.locator("details.quiz-right").count() == len(asked)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_answers_and_folds_are_told_apart_by_ear(site, reading, path):
    """Answers stand under their question, and folds say what they hold."""
    nb = nbformat.read(path, as_version=4)
    solutions = sum(c.source.count("{solution-start}") for c in nb.cells)
    page = site / "book" / path.parent.name / f"{path.stem}.html"
    with Visit(reading, page.as_uri()) as visit:
        session = visit.context.new_cdp_session(visit.page)
        tree = session.send("Accessibility.getFullAXTree")["nodes"]
    nodes = {node["nodeId"]: node for node in tree}

    def named(*roles):
        return [
            (node["nodeId"], node["name"]["value"].strip())
            for node in tree
            if node.get("role", {}).get("value") in roles and not node["ignored"]
        ]

    def questions_above(node):
        while node := nodes.get(node.get("parentId")):
            if (name := node.get("name", {}).get("value", "")).endswith("?"):
                yield name

    opening = named("DisclosureTriangle")
    other = ("Show the ", "Going deeper", "Sizes")  # of the explorer
    answers = [(at, name) for at, name in opening if not name.startswith(other)]
    asked = quiz(nb)
    assert len(answers) == sum(len(options) for _, options in asked)
    heard = [(next(questions_above(nodes[at])), name) for at, name in answers]
    assert len(set(heard)) == len(heard) and len({question for question, _ in heard}) == len(asked)
    assert not [name for pair in heard for name in pair if re.search(r"[\\{}$]", name)]

    folds = [name for _, name in named("button") if "Solution" in name]
    assert solutions >= 3 and len(set(folds)) == len(folds) == solutions
    assert all(re.match(r"Show Solution to Exercise \d+\.\d+ \(.+\)", name) for name in folds)
    assert not [name for _, name in named("button", "DisclosureTriangle") if "hidden" in name]


def test_open_answers_are_accessible(site, browser):
    page = site / "book" / "layer" / "forward.html"
    with Visit(browser, page.as_uri()) as visit:
        visit.page.evaluate(
            """for (const e of document.querySelectorAll("details")) e.open = true;
            for (const e of document.querySelectorAll("article section > section")) {
              if (e.id !== "check-yourself") e.remove();
            }"""
        )
        assert visit.page.locator("#check-yourself details[open]").count() > 10
        for mode in MODES:
            visit.show(*mode)
            assert overflow(visit) == []
        assert inaccessible_in_some_mode(visit) == []


def test_paper_shows_every_answer(site, browser):
    with Visit(browser, (site / "book" / "layer" / "forward.html").as_uri()) as visit:
        reasons = visit.page.locator(
            "#check-yourself details:not([open]) strong:text-matches(':$')"
        )
        shown = "all => all.filter(e => e.checkVisibility()).length"
        assert reasons.count() > 10 and reasons.evaluate_all(shown) == 0
        visit.page.emulate_media(media="print")
        assert reasons.evaluate_all(shown) == reasons.count()
