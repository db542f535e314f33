"""The layer under torch.compile and torch.export, with a backend's kernels as one operator.

The kernels are Numba's; gpu/test_gpu_operator.py takes three of these tests for the GPU's.
"""

from __future__ import annotations

import functools
import os
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from bnlib import functional, operator
from bnlib.kernels import load

BACKEND = "gpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"
KERNELS = load(BACKEND)
HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
# Inductor's own imports warn that torch.jit is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"),
            pytest.mark.skipif(
                " " in torch.__file__, reason="Inductor does not quote torch's path"
            ),
        ],
    ),
]
FUSED = [(False, None), (True, "relu"), (True, None), (False, "relu")]
# Inductor compiles what is around the operator, which the two extremes show.
EACH = [pytest.param("aot_eager", *fused) for fused in FUSED]
EACH += [pytest.param("inductor", *fused, marks=COMPILERS[1].marks) for fused in FUSED[:2]]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Inductor's, which does not notice that an operator's outputs have changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(shape, seed=0, dtype=torch.float32, channels_last=False):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * 2 + 1).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


class Layer(torch.nn.BatchNorm2d):
    """torch's module, computed by a backend of ours."""

    backend = BACKEND

    def forward(self, x, residual=None, activation=None):
        return functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.25,
            self.eps,
            residual=residual,
            activation=activation,
            backend=self.backend,
        )


def layer(channels, training=True, dtype=torch.float32, backend=BACKEND):
    new = Layer(channels, dtype=dtype).train(training)
    new.backend = backend
    with torch.no_grad():
        new.weight.copy_(draw((channels,), 11))
        new.bias.copy_(draw((channels,), 12))
        new.running_mean.copy_(draw((channels,), 13))
        new.running_var.copy_(draw((channels,), 14).abs() + 0.5)
    return new


def step(call, module, x, residual, activation, dy, dynamic=False):
    """The output, every gradient, and the buffers after a step."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, residual)]
    if dynamic:
        torch._dynamo.mark_dynamic(leaves[0], 0)
    y = call(*leaves, activation)
    wanted = [t for t in (*leaves, module.weight, module.bias) if t is not None]
    buffers = (module.running_mean, module.running_var)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy), *(b.clone() for b in buffers)]


def assert_close(ours, theirs, tolerance=2e-5):
    for one, other in zip(ours, theirs, strict=True):
        scale = other.abs().max().clamp_min(1)
        torch.testing.assert_close(
            one.double() / scale, other.double() / scale, rtol=0, atol=tolerance
        )


def doubles(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("compiler", "with_residual", "activation"), EACH)
def test_equals_float64(compiler, with_residual, activation, training):
    channels_last = with_residual  # both layouts, among the four cases
    x = draw((4, 3, 5, 7), channels_last=channels_last)
    residual = draw(x.shape, 1, channels_last=not channels_last) if with_residual else None
    dy = draw(x.shape, 2, channels_last=not channels_last)
    ours, exact = (layer(3, training, t) for t in (torch.float32, torch.float64))
    exact.backend = "reference"
    call = torch.compile(ours, fullgraph=True, backend=compiler)
    got = step(call, ours, x, residual, activation, dy)
    assert_close(got, step(exact, exact, *doubles(x, residual), activation, dy.double()))
    assert got[0].stride() == got[1].stride() == x.stride()


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 2, 4, 3), (3, 2, 1, 1), (9, 1, 4)])
def test_ranks_and_strides(shape):
    """Also inputs with gaps, which the kernels copy."""
    exact = functools.partial(functional.batch_norm, training=True, backend="reference")
    ours = functools.partial(functional.batch_norm, training=True, backend=BACKEND)
    ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    wide = draw((2 * shape[0], *shape[1:]))
    for x in (wide[: shape[0]], wide[::2], wide.movedim(1, -1).contiguous().movedim(-1, 1)[::2]):
        results = []
        for call, leaf in ((ours, x.detach()), (exact, x.detach().double())):
            leaf.requires_grad_()
            y = call(leaf, None, None, activation="relu", residual=leaf)
            results.append([y.detach(), *torch.autograd.grad(y, leaf, draw(shape, 3).to(y.dtype))])
        assert_close(*results)


def test_the_kernels_run_and_the_graph_has_one_operator(monkeypatch):
    calls, nodes = [], []

    def count(name):
        kernel = getattr(KERNELS, name)

        def counted(*args, **kwargs):
            calls.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(KERNELS, name, counted)

    count("moments_and_normalize")
    count("grad_sums_and_input")

    def look(graph, inputs):
        nodes.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph)

    module, x = layer(3), draw((4, 3, 5, 7))
    compiler = aot_autograd(fw_compiler=look, bw_compiler=look)
    call = torch.compile(module, fullgraph=True, backend=compiler)
    step(call, module, x, x, "relu", x)
    assert calls == ["moments_and_normalize", "grad_sums_and_input"]
    ours = [name for name in nodes if name.startswith("bnlib.")]
    assert ours == ["bnlib.batch_norm.default", "bnlib.batch_norm_backward.default"]
    assert not any("native_batch_norm" in name for name in nodes)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_running_statistics_after_ten_steps(compiler):
    ours, exact = layer(3), layer(3, dtype=torch.float64, backend="reference")
    call = torch.compile(ours, fullgraph=True, backend=compiler)
    for i in range(1, 11):
        x = draw((4, 3, 5, 7), seed=i) * i
        call(x)
        exact(x.double())
        if i in (1, 2, 10):
            for name, buffer in ours.named_buffers():
                assert_close([buffer], [exact.get_buffer(name)], 1e-6)
    before = ours.running_var.clone()
    call.eval()
    y = call(x)
    torch.testing.assert_close(y, ours(x))
    assert torch.equal(ours.running_var, before)


def test_parameters_and_buffers_of_sixteen_bits():
    x, dy = (draw((8, 3, 5, 2), seed, torch.bfloat16) for seed in range(2))
    results = []
    for compiled in (True, False):
        module = layer(3, dtype=torch.bfloat16)
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        results.append(step(call, module, x, x, "relu", dy))
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other)


def test_batches_of_any_size_share_a_graph():
    counter = CompileCounterWithBackend("aot_eager")
    ours, exact = layer(3), layer(3, dtype=torch.float64, backend="reference")
    call = torch.compile(ours, fullgraph=True, backend=counter)
    for n in (4, 5, 8, 3, 16, 7, 2, 24):
        x, dy = draw((n, 3, 5, 7), n), draw((n, 3, 5, 7), n + 1)
        got = step(call, ours, x, None, "relu", dy, dynamic=True)
        assert_close(got, step(exact, exact, *doubles(x, None), "relu", dy.double()))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), layer(4, training)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                z = self.conv(x)
                return self.norm(z, z, "relu")

    results = []
    for compiled in (True, False):
        net, x = Net(), draw((4, 3, 7, 7)).requires_grad_()
        call = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        y = call(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        grads = [p.grad for p in net.parameters()]
        assert all(g.dtype == torch.float32 for g in grads)
        results.append([y.detach(), x.grad, *grads, *net.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def operands(training, with_grad, relu, channels_last=False):
    x = draw((4, 3, 5, 7), channels_last=channels_last)
    w, b, mean = draw((3, 3), 1).unbind()
    running = (None, None) if training else (mean.clone(), w.abs() + 0.5)
    leaves = [t.clone().requires_grad_(with_grad) for t in (x, w, b, draw(x.shape, 2))]
    options = (training, 1e-5, relu, relu and with_grad, BACKEND)
    return (leaves[0], *running, *leaves[1:], *options)


@pytest.mark.parametrize(
    ("training", "with_grad", "relu", "channels_last"),
    [
        (True, True, True, False),
        (True, True, False, True),
        (False, True, True, True),
        (False, False, True, True),
        (False, False, False, False),
    ],
)
def test_opcheck(training, with_grad, relu, channels_last):
    arguments = operands(training, with_grad, relu, channels_last)
    torch.library.opcheck(operator.forward, arguments)
    x, _, _, w = (t if t is None else t.detach() for t in arguments[:4])
    _, statistics, mask = operator.forward(*(a for a in arguments))
    mask = mask.detach() if relu and with_grad else None
    masked = mask is not None
    for needs in ((True, True, masked), (True, False, False), (False, True, masked)):
        torch.library.opcheck(
            operator.backward,
            (draw(x.shape, 5), x, w, statistics.detach(), mask, training, *needs, BACKEND),
        )


def test_gradients_of_some_inputs_only():
    x, dy = draw((4, 3, 5, 7)), draw((4, 3, 5, 7), 1)
    module, exact = layer(3), layer(3, dtype=torch.float64, backend="reference")
    for needed in ("x", "weight", "residual"):
        results = []
        for call, m, t in (
            (torch.compile(module, fullgraph=True, backend="aot_eager"), module, torch.float32),
            (exact, exact, torch.float64),
        ):
            m.requires_grad_(needed == "weight")
            leaf, residual = x.detach().to(t), x.detach().flip(0).to(t)
            wanted = {"x": leaf, "residual": residual, "weight": m.weight}[needed].requires_grad_()
            y = call(leaf, residual, "relu")
            results.append(torch.autograd.grad(y, wanted, dy.to(t)))
        assert_close(*results)


def test_without_a_gradient_no_mask_is_kept(monkeypatch):
    kept = []
    make = KERNELS.empty_mask
    monkeypatch.setattr(KERNELS, "empty_mask", lambda x: kept.append(x.shape) or make(x))
    module, x = layer(3), draw((4, 3, 5, 7))
    call = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = call(x, x, "relu")
    assert not kept and (y == 0).any()
    call(x, x, "relu")
    assert kept


@pytest.mark.parametrize("compiler", COMPILERS)
def test_an_empty_batch(compiler):
    module = layer(3)
    before = module.running_mean.clone()
    call = torch.compile(module, fullgraph=True, backend=compiler)
    x = torch.empty(0, 3, 5, 7, requires_grad=True)
    y = call(x, x, "relu")
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(module.running_mean, before)


@pytest.mark.parametrize("training", [True, False])
def test_export_holds_the_operator(training):
    module, x = layer(3, training), draw((4, 3, 5, 7))
    with torch.no_grad():
        program = torch.export.export(module, (x, x, "relu"))
    assert "bnlib.batch_norm.default" in str(program.graph)
    exported = program.module()
    y = exported(x, x, "relu")
    torch.testing.assert_close(y, layer(3, training)(x, x, "relu").detach())
    fresh = layer(3, training)
    fresh(x)
    torch.testing.assert_close(exported.get_buffer("running_var"), fresh.running_var)


def test_transforms_inside_a_graph_take_torchs_operator():
    def loss(x, backend):
        return functional.batch_norm(x, None, None, training=True, backend=backend).pow(3).sum()

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def gradient(x):
        return torch.func.grad(functools.partial(loss, backend=BACKEND))(x)

    x = draw((4, 3, 5))
    expected = torch.func.grad(functools.partial(loss, backend="reference"))(x.double())
    assert_close([gradient(x)], [expected])


def test_dispatch_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for backend, name in (
        (BACKEND, "bnlib.batch_norm.default"),
        ("auto", "aten.native_batch_norm.default"),
    ):
        seen = []
        with Record():
            y = functional.batch_norm(draw((4, 3, 5)), None, None, training=True, backend=backend)
        assert name in seen or (backend == "auto" and any("batch_norm" in s for s in seen)), seen
        torch.testing.assert_close(
            y, torch.nn.functional.batch_norm(draw((4, 3, 5)), None, None, training=True)
        )


def test_the_operators_refuse_misfits():
    """They are public names of torch.ops: kernels would read past the end of what is too small."""
    x, v, short = draw((6, 5, 4, 4)), torch.ones(5), torch.ones(4)
    rows, mask = torch.ones(3, 5), torch.zeros(7, dtype=torch.uint8)
    forward, backward = torch.ops.bnlib.batch_norm, torch.ops.bnlib.batch_norm_backward
    how = (True, 1e-5, True, True, BACKEND)
    for call in (
        lambda: forward(x, None, None, short, None, None, *how),
        lambda: forward(x, None, None, None, short, None, *how),
        lambda: forward(x, short, v, None, None, None, *how),
        lambda: forward(x, v, None, None, None, None, *how),
        lambda: forward(x, None, None, None, None, x[:1], *how),
        lambda: forward(x, None, None, None, None, x.double(), *how),
        lambda: forward(x[0, 0, 0], None, None, None, None, None, *how),
        lambda: forward(x[:1, :, :1, :1], None, None, None, None, None, *how),
        lambda: forward(x, None, None, None, None, None, False, *how[1:]),
        lambda: forward(x, None, None, None, None, None, *how[:-1], "auto"),
        lambda: backward(x[:2], x, None, rows, None, True, True, True, False, BACKEND),
        lambda: backward(x[..., :1], x, None, rows, None, False, True, True, False, BACKEND),
        lambda: backward(v, v, None, rows, None, True, True, True, False, BACKEND),
        lambda: backward(x, x, short, rows, None, True, True, True, False, BACKEND),
        lambda: backward(x, x, None, rows[:, :4], None, True, True, True, False, BACKEND),
        lambda: backward(x, x, None, rows[:2], None, True, True, True, False, BACKEND),
        lambda: backward(x, x, None, rows, mask, True, True, True, False, BACKEND),
    ):
        with pytest.raises((TypeError, ValueError), match=r"expected .* got"):
            call()
    none = torch.ones(4, 0, 3)
    dx, sums, _ = backward(none, none, None, rows[:, :0], None, True, True, True, False, BACKEND)
    assert dx.shape == none.shape and sums.shape == (2, 0)


def test_the_operators_gradient_reads_the_mask_in_the_layout_it_was_filled_in():
    x, dy = draw((4, 5, 4, 3)).to(memory_format=torch.channels_last), draw((4, 5, 4, 3))
    how = (None, None, None, None, None, True, 1e-5, True, True, BACKEND)
    _, rows, mask = torch.ops.bnlib.batch_norm(x, *how)
    found = [
        torch.ops.bnlib.batch_norm_backward(
            dy, again, None, rows, mask, True, need_x, True, need_x, BACKEND
        )[: 2 if need_x else None]
        for need_x in (True, False)
        for again in (x, x.contiguous())
    ]
    for kept, lost in (found[:2], found[2:]):
        for a, b in zip(kept, lost, strict=True):
            torch.testing.assert_close(a, b)
