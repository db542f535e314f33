"""bnlib.kernels.cpu: equal to the reference, the same bits on any number of threads."""

import concurrent.futures
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bnlib import reference
from bnlib.functional import batch_norm
from bnlib.kernels import load
from bnlib.kernels.cpu import compiling, launch
from bnlib.kernels.tensors import empty_mask, unpack_mask

cpu = load("cpu")

# Rows, short rows, neighbouring channels; many and few channels and samples; awkward lengths.
SHAPES = [
    (2, 3),
    (1023, 7),
    (5, 1100),
    (3, 40, 1, 1),
    (8, 3, 31),
    (16, 37, 7, 7),
    (5, 37, 7, 7),
    (1, 2, 1023),
    (3, 1, 17, 19),
    (9, 2, 300),
    (8, 20, 17, 19),
    (2, 5, 3, 4, 5),
]
LARGE = [
    (8, 64, 9, 9),
    (40, 20, 9, 9),
    (7, 3, 40, 40),
    (16, 2, 600),
    (3000, 11),
    (4, 1100, 3, 3),
    (133, 1160),
    (70, 2064, 1, 2),
]


def neighbours(t):
    """The same values with the channels side by side in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def tensors(shape, dtype=torch.float64, lanes=False):
    g = torch.Generator().manual_seed(sum(shape))
    made = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
    x, dy, residual = (neighbours(t) if lanes else t for t in made)
    weight, bias = torch.rand(2, shape[1], generator=g, dtype=torch.float64) + 0.5
    return [t.to(dtype) for t in (x * 3 + 5, dy, residual, weight, bias)]


def everything(x, dy, residual, weight, bias):
    """All that the kernels compute for one input."""
    y, m, inv_std = cpu.moments_and_normalize(x, weight, bias, 1e-5)
    mask = empty_mask(x)
    fused = cpu.normalize(x, m.mean, inv_std, weight, bias, residual=residual, relu=True, mask=mask)
    rest = (dy, x, m.mean, inv_std)
    dx, *sums = cpu.grad_sums_and_input(*rest, weight, m.count)
    dresidual = cpu.empty_like(x)
    masked_dx, *masked_sums = cpu.grad_sums_and_input(
        *rest, weight, m.count, mask=mask, dresidual=dresidual
    )
    return [y, m.mean, m.m2, inv_std, fused, dx, *sums, masked_dx, *masked_sums, dresidual], mask


@pytest.mark.parametrize("lanes", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_equals_the_reference(shape, lanes):
    x, dy, residual, weight, bias = given = tensors(shape, lanes=lanes)
    ours, mask = everything(*given)
    m = reference.moments(x)
    inv_std = 1 / torch.sqrt(m.var() + 1e-5)
    y = reference.normalize(x, m.mean, inv_std, weight, bias)
    fused = torch.relu(y + residual)
    rest = (x, m.mean, inv_std)
    expected = [y, m.mean, m.m2, inv_std, fused]
    for g in (dy, dy * (fused > 0)):
        sums = reference.grad_sums(g, *rest)
        expected += [reference.grad_input(g, *rest, weight, *sums, m.count), *sums]
    expected.append(dy * (fused > 0))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert torch.equal(unpack_mask(mask, x), fused > 0)
    # The primitives one by one, as the synchronised layer calls them: the same numbers.
    mean, inv_std = ours[1], ours[3]
    apart = [*cpu.moments(x)[1:], cpu.normalize(x, mean, inv_std, weight, bias)]
    sums = cpu.grad_sums(dy, x, mean, inv_std)
    apart += [*sums, cpu.grad_input(dy, x, mean, inv_std, weight, *sums, m.count)]
    for a, b in zip(apart, [*ours[1:3], ours[0], *ours[6:8], ours[5]], strict=True):
        assert torch.equal(a, b)


def test_channel_axis():
    x, dy, _, weight, bias = tensors((6, 5, 3, 4))
    last = [t.movedim(1, -1) for t in (x, dy)]
    m, last_m = cpu.moments(x), cpu.moments(last[0], -1)
    assert torch.equal(m.mean, last_m.mean) and torch.equal(m.m2, last_m.m2)
    inv_std = 1 / torch.sqrt(m.var() + 1e-5)
    y = cpu.normalize(last[0], m.mean, inv_std, weight, bias, -1)
    assert torch.equal(y.movedim(-1, 1), cpu.normalize(x, m.mean, inv_std, weight, bias))
    sums = cpu.grad_sums(last[1], last[0], m.mean, inv_std, -1)
    dx = cpu.grad_input(last[1], last[0], m.mean, inv_std, weight, *sums, m.count, -1)
    expected = reference.grad_input(dy, x, m.mean, inv_std, weight, *sums, m.count)
    torch.testing.assert_close(dx.movedim(-1, 1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0), (2, 0, 3), (0, 8, 5, 5)], ids=str)
def test_nothing_at_all(shape):
    x, v = torch.empty(shape), torch.ones(shape[1])
    ours, theirs = cpu.moments(x), reference.moments(x)
    assert ours.count == theirs.count
    assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.m2, theirs.m2)
    assert cpu.normalize(x, v, v).shape == x.shape
    assert all(torch.equal(s, torch.zeros_like(v)) for s in cpu.grad_sums(x, x, v, v))
    assert cpu.grad_input(x, x, v, v, None, v, v, 1).shape == x.shape


@pytest.mark.parametrize("scale", [1e4, 1e7])
@pytest.mark.parametrize("lanes", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_where_the_mean_or_the_first_value_is_large(dtype, lanes, scale):
    for outlier in (False, True):
        x = tensors((16, 6, 15, 15), dtype, lanes)[0]
        if outlier:
            x[0, :, 0, 0] = scale  # the value from which the kernels measure distances
        else:
            x += scale
        exact = reference.moments(x.double())
        m = cpu.moments(x)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12 * (100 if outlier else scale)
        torch.testing.assert_close(m.m2.double(), exact.m2, rtol=tolerance, atol=0)
        # An error of the mean is small or not beside what it is subtracted from.
        error = (m.mean.double() - exact.mean).abs()
        assert (error <= 1e-7 * (exact.mean.abs() + exact.var().sqrt())).all()


@pytest.mark.parametrize("lanes", [False, True], ids=["contiguous", "channels_last"])
def test_constant_channel_gives_the_bias(lanes):
    x, _, _, weight, bias = tensors((8, 6, 5, 5), torch.float32, lanes)
    x.copy_(torch.arange(6.0).view(1, 6, 1, 1) * 1000.1)
    y, m, _ = cpu.moments_and_normalize(x, weight, bias, 1e-5)
    assert torch.equal(m.m2, torch.zeros(6))
    assert torch.equal(y, bias.view(1, 6, 1, 1).expand(x.shape))


@pytest.mark.parametrize("lanes", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_same_bits_on_any_number_of_threads(shape, lanes, monkeypatch):
    given = tensors(shape, torch.float32, lanes)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            results.append(everything(*given))
        monkeypatch.setattr(launch, "_openmp", None)  # where torch has no OpenMP that we can call
        results.append(everything(*given))
    finally:
        torch.set_num_threads(before)
    for arrays, mask in results[1:]:
        assert torch.equal(mask, results[0][1])
        for a, b in zip(arrays, results[0][0], strict=True):
            assert torch.equal(a, b)


# Large outputs go past the caches where their rows are whole cache lines.
STREAMED = [
    ((9, 16, 8, 8), torch.float32, False),
    ((9, 16, 8, 8), torch.float32, True),
    ((5, 2064, 4, 4), torch.float32, True),
    ((9, 16, 8, 8), torch.bfloat16, False),
    ((9, 8, 8, 8), torch.float64, True),
    ((9, 16, 7, 9), torch.float32, False),
    ((9, 17, 7, 8), torch.float32, True),
]


@pytest.mark.parametrize(("shape", "dtype", "lanes"), STREAMED, ids=str)
def test_large_outputs_are_what_small_ones_are(shape, dtype, lanes, monkeypatch):
    given = tensors(shape, dtype, lanes)
    small, mask = everything(*given)
    monkeypatch.setattr(launch, "_STREAM_FROM", 1)
    large, large_mask = everything(*given)
    assert torch.equal(mask, large_mask)
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


def test_a_large_output_may_begin_anywhere(monkeypatch):
    monkeypatch.setattr(launch, "_STREAM_FROM", 1)
    x, dy, _, weight, _ = tensors((9, 16, 8, 8), torch.float32)
    m = cpu.moments(x)
    mask = empty_mask(x)
    rest = (x, m.mean, torch.rsqrt(m.var()))
    y = cpu.normalize(*rest, weight, relu=True, mask=mask)
    odd = torch.empty(x.numel() + 1)[1:].view(x.shape)
    sums = cpu.grad_sums(dy, *rest, mask=mask)
    options = {"mask": mask, "dresidual": odd}
    cpu.grad_input(dy, *rest, weight, *sums, m.count, **options)
    assert torch.equal(odd, dy * (y > 0))


def test_several_python_threads_at_once():
    given = [tensors(shape, torch.float32) for shape in LARGE]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone = [everything(*t)[0] for t in given]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda t: everything(*t)[0], given * 8))
    finally:
        torch.set_num_threads(before)
    for i, arrays in enumerate(together):
        for a, b in zip(arrays, alone[i % len(given)], strict=True):
            assert torch.equal(a, b)


class Normalized(torch.utils.data.Dataset):
    """Runs the kernels where a DataLoader runs its data set."""

    def __init__(self):
        self.x = [tensors((8, 64, 9, 9), torch.float32)[0] + i for i in range(4)]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        # More than a worker's one thread; torch's own operations on many elements would hang now.
        torch.set_num_threads(2)
        y = batch_norm(self.x[i], None, None, training=True, backend="cpu")
        return y.numpy().tobytes()


def test_in_forked_data_loader_workers():
    data = Normalized()
    before = torch.get_num_threads()
    try:
        expected = [data[i] for i in range(4)]  # the parent's threads run before it forks
    finally:
        torch.set_num_threads(before)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert list(loader) == expected


@pytest.mark.parametrize("backward", [False, True])
def test_another_process_finds_what_was_compiled(backward):
    """Numba's key for a closure is what it closes over, which must not differ from run to run."""
    launch._compiled(torch.float32, backward, True, False)
    code = (
        "import torch\nfrom bnlib.kernels.cpu import launch\n"
        f"kernel, *_ = launch._compiled(torch.float32, {backward}, True, False)\n"
        "print(kernel.cache_hits)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_an_edited_loop_is_compiled_again(tmp_path):
    """Numba's cache would look only at the file that defines a kernel, not at its loops."""
    kernel = launch.make_kernel(*launch._STORED[torch.float32], False, False, False, 7)
    assert inspect.getclosurevars(kernel).nonlocals["sources"] == 7  # and so it is in the key
    package = Path(launch.__file__).parents[2]
    copy = shutil.copytree(
        package, tmp_path / "bnlib", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = "from bnlib.kernels.cpu import launch; print(launch._SOURCES)"

    def sources():
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert sources() == launch._SOURCES
    with (copy / "kernels" / "cpu" / "loops.py").open("a") as file:
        file.write("# edited\n")
    assert sources() != launch._SOURCES


def test_a_late_thread_finds_the_work_done():
    """Of a team of 16 on fewer cores, some threads begin when nothing is left to do."""
    x, dy, _, weight, bias = tensors((64, 40, 9, 9), torch.float32, lanes=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 16):
            torch.set_num_threads(threads)
            for _ in range(20):
                y, m, inv_std = cpu.moments_and_normalize(x, weight, bias, 1e-5)
                dx, *_ = cpu.grad_sums_and_input(dy, x, m.mean, inv_std, weight, m.count)
                results.append((y, dx))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_a_mode_leaves_nothing_behind():
    x = torch.randn(5, 1234)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(TypeError, match="no mode in which a new tensor is a FakeTensor"),
    ):
        cpu.moments(x)
    torch.testing.assert_close(cpu.moments(x), reference.moments(x), rtol=1e-6, atol=1e-6)


def test_works_where_nothing_can_be_cached():
    def decorate(cache):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return "compiled"

    assert compiling.cached(decorate) == "compiled"


class Own(torch.Tensor):
    """A subclass, whose numbers may lie anywhere."""


def test_supports():
    x = torch.ones(2, 3)
    assert all(cpu.supports(x.to(t)) for t in (torch.float32, torch.float64, torch.bfloat16))
    assert cpu.supports(torch.nn.Parameter(x))
    assert not cpu.supports(x.to("meta"))
    assert not cpu.supports(x.to_sparse())
    assert not cpu.supports(x.as_subclass(Own))
    assert not cpu.supports(x.long())


def test_another_default_device_does_not_reach_the_kernels():
    """Their buffers lie where the input lies; a buffer elsewhere would be a wild pointer."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    with torch.device("meta"):
        y = batch_norm(x, None, None, training=True, backend="cpu")
        y.sum().backward()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1), (3, 1, 0, 2), (2, 3, 0, 1)], ids=str)
def test_permuted_strides(order):
    base = tensors((6, 5, 4, 8))[0]
    found = []
    for backend in ("cpu", "reference"):
        x = base.permute(order).detach().requires_grad_()
        residual = (2 * base - 9).permute(order).detach().requires_grad_()
        options = {"residual": residual, "activation": "relu", "backend": backend}
        y = batch_norm(x, None, None, training=True, **options)
        dy = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)
        found.append((y, *torch.autograd.grad(y, (x, residual), dy)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("lanes", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(32, 5, 40, 40), (24, 64, 40, 40)], ids=str)
def test_sums_of_squares_beyond_float32(shape, lanes):
    x = torch.full(shape, 1e17)
    x[::2] *= -1
    x = neighbours(x) if lanes else x
    running = torch.full((2, shape[1]), 1e8)
    options = {"running_mean": running[0], "running_var": running[1], "momentum": 1.0}
    y, m, _ = cpu.moments_and_normalize(x, None, None, 1e-5, **options)
    torch.testing.assert_close(y, x.sign(), rtol=1e-6, atol=0)
    unbiased = 1e34 * m.count / (m.count - 1)
    torch.testing.assert_close(running[1], torch.full_like(running[1], unbiased))
    assert (running[0].abs() < 1e11).all()  # 0, to a rounding of 1e17


def test_momentum_of_one_forgets_the_old():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    running = torch.full((2, 2), 1e8)
    options = {"running_mean": running[0], "running_var": running[1], "momentum": 1.0}
    cpu.moments_and_normalize(x, None, None, 1e-5, **options)
    assert running.tolist() == [[2.0, 4.0], [2.0, 8.0]]


def test_misfits_are_refused():
    """What does not fit would be read, or written, beyond its end."""
    x, dy, residual, weight, bias = tensors((8, 5, 3, 3))
    m = cpu.moments(x)
    mask, short, wide = empty_mask(x), weight[:4], x.repeat(2, 1, 1, 1)
    norm = (x, m.mean, m.m2)
    sums, grad = (dy, *norm), (dy, *norm, weight, bias, bias, 72)
    for call in (
        lambda: cpu.moments(x.long()),
        lambda: cpu.moments(x.numpy()),
        lambda: cpu.moments(x[0, 0, 0]),
        lambda: cpu.normalize(x, short, m.m2),
        lambda: cpu.normalize(*norm, short),
        lambda: cpu.normalize(*norm, weight, bias, residual=wide),
        lambda: cpu.normalize(*norm, weight, bias, residual=residual.float()),
        lambda: cpu.normalize(*norm, relu=True, mask=mask[:4]),
        lambda: cpu.normalize(*norm, relu=True, mask=mask.bool()),
        lambda: cpu.grad_sums(wide, *norm),
        lambda: cpu.grad_sums(dy, x, m.mean, short),
        lambda: cpu.grad_sums(*sums, mask=mask[:, :-1]),
        lambda: cpu.grad_input(*sums, weight, short, bias, 72),
        lambda: cpu.grad_input(*sums, short, bias, bias, 72),
        lambda: cpu.grad_input(wide, *grad[1:]),
        lambda: cpu.grad_input(*grad, mask=mask, dresidual=wide),
        lambda: cpu.grad_input(*grad, mask=mask, dresidual=neighbours(x)),
        lambda: cpu.grad_input(*grad, mask=mask.cpu().T, dresidual=x),
        lambda: cpu.grad_input(*grad, mask=mask, dresidual=torch._neg_view(x)),
        lambda: cpu.moments_and_normalize(x, short, None, 1e-5),
        lambda: cpu.moments_and_normalize(x, weight, short, 1e-5),
        lambda: cpu.moments_and_normalize(x, weight, bias, 1e-5, residual=wide),
        lambda: cpu.moments_and_normalize(x, weight, bias, 1e-5, None, True, mask[:4]),
        lambda: cpu.moments_and_normalize(
            x, weight, bias, 1e-5, running_mean=short, running_var=weight
        ),
        lambda: cpu.moments_and_normalize(x, weight.to_sparse(), bias, 1e-5),
        lambda: cpu.moments_and_normalize(x, weight.as_subclass(Own), bias, 1e-5),
        lambda: cpu.grad_sums_and_input(wide, *norm, weight, 72),
        lambda: cpu.grad_sums_and_input(dy.to_sparse(), *norm, weight, 72),
        lambda: cpu.grad_sums_and_input(torch._efficientzerotensor(dy.shape), *norm, weight, 72),
        lambda: cpu.grad_sums_and_input(torch._neg_view(dy), *norm, weight, 72),
        lambda: cpu.moments(torch._neg_view(x)),
        lambda: cpu.normalize(x, torch._neg_view(m.mean), m.m2),
        lambda: cpu.grad_sums_and_input(dy, x, short, m.m2, weight, 72),
        lambda: cpu.grad_sums_and_input(dy, x, m.mean, short, weight, 72),
        lambda: cpu.grad_sums_and_input(*sums, short, 72),
        lambda: cpu.grad_sums_and_input(*sums, weight, 72, mask=mask[:4]),
        lambda: cpu.grad_sums_and_input(*sums, weight, 72, mask=mask, dresidual=wide),
    ):
        with pytest.raises((TypeError, ValueError), match=r"expected .* got"):
            call()
