"""bnlib.functional against torch's batch norm: values, derivatives, transforms, fusion."""

import functools
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from bnlib.functional import batch_norm
from bnlib.kernels import Kernels, choose
from bnlib.kernels.tensors import pack_mask, unpack_mask

torch_batch_norm = torch.nn.functional.batch_norm
SHAPES = [(6, 3), (2, 1), (4, 3, 5), (2, 5, 4, 3), (9, 17, 7, 7), (2, 3, 2, 4, 3), (3, 2, 1, 1)]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


def case(shape, dtype=torch.float64, seed=0, param_dtype=None):
    """Input, weight, bias, running mean, running var, and a gradient."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 1
    dy = torch.randn(shape, generator=g, dtype=torch.float64)
    per_channel = torch.rand(4, shape[1], generator=g, dtype=torch.float64) + 0.5
    return x.to(dtype), *per_channel.to(param_dtype or dtype).unbind(), dy.to(dtype)


def run(fn, x, weight, bias, running_mean, running_var, dy, training, **kwargs):
    """Output, gradients of x, weight, bias, and the buffers after one step."""
    # Not clones, which have no gaps and no strides of 0.
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    buffers = [t if t is None else t.clone() for t in (running_mean, running_var)]
    y = fn(leaves[0], *buffers, leaves[1], leaves[2], training, 0.3, 1e-3, **kwargs)
    y.backward(dy)
    return [y.detach(), *(None if t is None else t.grad for t in leaves), *buffers]


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_in_float64(shape, training, backend):
    args = case(shape)
    ours = run(batch_norm, *args, training, backend=backend)
    assert_same(ours, run(torch_batch_norm, *args, training), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("absent", ["weight", "bias", "affine", "running", "all"])
def test_absent_parameters(absent, training, backend):
    x, weight, bias, running_mean, running_var, dy = case((4, 3, 5))
    if absent in ("weight", "affine", "all"):
        weight = None
    if absent in ("bias", "affine", "all"):
        bias = None
    if absent in ("running", "all") and training:
        running_mean = running_var = None
    args = (x, weight, bias, running_mean, running_var, dy, training)
    ours = run(batch_norm, *args, backend=backend)
    assert_same(ours, run(torch_batch_norm, *args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_with_float32_statistics(dtype, training):
    args = case((8, 5, 9, 6), dtype, param_dtype=torch.float32)
    ours = run(batch_norm, *args, training)
    assert [t.dtype for t in ours] == [dtype, dtype] + [torch.float32] * 4
    exact = [t.double() for t in args]
    # One rounding to the input's dtype at the end; the sums add some in float32.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    truth = run(torch_batch_norm, *exact, training)
    assert_same([t.double() for t in ours[:2]], truth[:2], **tolerance)
    assert_same([t.double() for t in ours[2:]], truth[2:], rtol=3e-5, atol=3e-5)


def test_statistics_survive_a_large_mean(backend):
    x, weight, bias, running_mean, running_var, dy = case((16, 3, 8, 8), torch.float32)
    x = x + 1e4
    args = [t.double() for t in (x, weight, bias, running_mean, running_var, dy)]
    truth = run(torch_batch_norm, *args, True)
    args = (x, weight, bias, running_mean, running_var, dy)
    ours = run(batch_norm, *args, True, backend=backend)
    # The mean is kept in float32, half a unit in the last place at 1e4 is 5e-4.
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(ours[5].double(), truth[5], rtol=1e-5, atol=0)


def layouts(x):
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    yield "contiguous", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=last)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "sliced", x.repeat_interleave(2, -1)[..., ::2]
    yield "batch inside", x.movedim(0, -1).contiguous().movedim(-1, 0)
    yield "expanded", x[:, :, :1].expand(x.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 6, 8), (3, 4, 2, 5, 3)], ids=str)
def test_any_strides_and_the_memory_format_stays(shape, training, backend):
    x, *rest, dy = case(shape)
    for name, x_laid in layouts(x):
        for _, dy_laid in layouts(dy):
            theirs = run(torch_batch_norm, x_laid, *rest, dy_laid, training)
            ours = run(batch_norm, x_laid, *rest, dy_laid, training, backend=backend)
            assert_same(ours, theirs, rtol=1e-12, atol=1e-12)
            if name in ("contiguous", "channels_last"):
                assert ours[0].stride() == theirs[0].stride() == x_laid.stride(), name
                assert ours[1].stride() == x_laid.stride(), name


ODD = {
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "a negative view": lambda t: torch._neg_view(-t),
    "an imaginary part": lambda t: torch.complex(t, -t).conj().imag,
    "a subclass": lambda t: t.as_subclass(Own),
}


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("odd", ODD)
def test_tensors_whose_memory_does_not_hold_their_numbers(odd, training, activation, backend):
    """torch resolves them, so its result for their plain copies is right."""
    x, *rest, dy = case((4, 3, 5))
    residual = case((4, 3, 5), seed=1)[0]
    given = [x, *rest, dy, residual]
    for which in range(len(given)):
        # The kernels move no statistics that they cannot write to, and take no subclass.
        takes = "auto" if odd == "a subclass" or which in (3, 4) else backend
        if odd == "zeros without memory" and which in (3, 4):
            continue  # nothing can be written to them
        mixed = [ODD[odd](t) if i == which else t for i, t in enumerate(given)]
        results = []
        for layer in (batch_norm, None):
            # The copy of a zero tensor is a plain one.
            values = mixed if layer else [t.clone().as_subclass(torch.Tensor) for t in mixed]
            *args, residual = values

            def call(*args, layer=layer, residual=residual, takes=takes):
                if layer:
                    options = {"residual": residual, "activation": activation}
                    return batch_norm(*args, **options, backend=takes)
                y = torch_batch_norm(*args) + residual
                return torch.relu(y) if activation else y

            results.append(run(call, *args, training))
        for ours, theirs in zip(*results, strict=True):
            ours = ours.as_subclass(torch.Tensor)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=str(which))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_of_running_statistics_in_evaluation(activation, recorded, backend):
    """torch refuses; a result without these gradients would be silently wrong."""
    x, weight, bias, running_mean, running_var, dy = case((4, 3, 5))
    statistics = [t.requires_grad_() for t in (running_mean, running_var)]
    layer = functools.partial(batch_norm, activation=activation, backend=backend)
    if recorded:
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(layer(x, *statistics, weight, bias), statistics, dy)
    mean, var = (t.view(1, -1, 1) for t in statistics)
    y = (x - mean) / (var + 1e-5).sqrt() * weight.view(1, -1, 1) + bias.view(1, -1, 1)
    y = torch.relu(y) if activation else y
    assert_same(got, torch.autograd.grad(y, statistics, dy), rtol=1e-12, atol=1e-12)


def test_expanded_gradient(backend):
    x, weight, bias, *_ = case((4, 3, 5))
    x.requires_grad_()
    y = batch_norm(x, None, None, weight, bias, True, backend=backend)
    y.sum().backward()  # dy is one number with strides of 0
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty_batch_as_torch(shape, training, backend):
    args = case(shape)
    ours = run(batch_norm, *args, training, backend=backend)
    theirs = run(torch_batch_norm, *args, training)
    assert_same(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(ours[4], args[3], rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_no_channels(training, backend):
    none = torch.zeros(0)
    for shape in [(4, 0), (4, 0, 3), (0, 0)]:
        x = torch.zeros(shape, requires_grad=True)
        y = batch_norm(x, none, none, none, none, training, activation="relu", backend=backend)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("size", [1e15, 1e17])
def test_variances_whose_sum_is_beyond_float32(size, backend):
    """torch's own are not right here."""
    x = torch.full((64, 3, 40, 40), size)
    x[::2] *= -1
    running = [torch.zeros(3), torch.ones(3)]
    y = batch_norm(x.requires_grad_(), *running, training=True, momentum=1.0, backend=backend)
    torch.testing.assert_close(y, x.sign(), rtol=1e-6, atol=0)
    m = x.numel() / 3
    torch.testing.assert_close(running[1], torch.full((3,), size**2 * m / (m - 1)))
    dy = case(x.shape, torch.float32)[-1]
    y.backward(dy)
    dx = dy - dy.mean((0, 2, 3), keepdim=True)
    dx = dx - y * (dy * y).mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(x.grad * size, dx.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_buffers_after_1_2_and_10_steps(dtype, momentum, backend):
    ours = [torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)]
    theirs = [t.clone() for t in ours]
    versions = [t._version for t in ours]
    for step in range(1, 11):
        x = case((4, 5, 3, 3), dtype, seed=step)[0]
        batch_norm(x, *ours, training=True, momentum=momentum, backend=backend)
        torch_batch_norm(x, *theirs, training=True, momentum=momentum)
        if step in (1, 2, 10):
            tight = 1e-13 if dtype == torch.float64 else 1e-6
            assert_same(ours, theirs, rtol=tight, atol=tight)
    assert all(t._version > old for t, old in zip(ours, versions, strict=True))


def test_nan_and_infinity_stay_in_their_channel(backend):
    x, *_ = case((4, 3, 5), torch.float32)
    x[1, 0, 2], x[2, 1, 3] = float("nan"), float("inf")
    y = batch_norm(x, None, None, training=True, backend=backend)
    assert y[:, 0].isnan().all() and y[:, 1].isnan().all() and y[:, 2].isfinite().all()


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_and_gradgradcheck(training, fused, backend):
    x, weight, bias, running_mean, running_var, _ = case((4, 2, 3))
    residual = case((4, 2, 3), seed=1)[0]
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]

    def layer(x, weight, bias, residual):
        buffers = running_mean.clone(), running_var.clone()
        options = {"residual": residual, "activation": "relu"} if fused else {}
        args = (*buffers, weight, bias, training)
        return batch_norm(x, *args, eps=0.1, backend=backend, **options)

    leaves = leaves if fused else leaves[:3]
    layer_ = layer if fused else lambda x, w, b: layer(x, w, b, None)
    assert torch.autograd.gradcheck(layer_, leaves)
    assert torch.autograd.gradgradcheck(layer_, leaves)


def written_out(x, weight, bias, eps):
    """Batch norm from primitives, for derivatives of any order."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * weight.view(shape) + bias.view(shape)


def test_third_and_fourth_derivative(backend):
    # pytorch#186256: torch's own are wrong from the third on, without an error.
    x, weight, bias, *_, direction = case((5, 2, 3))
    w = case((5, 2, 3), seed=3)[0]

    def derivatives(layer):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value, out = (layer(x + t * direction) * w).sum(), []
        for _ in range(4):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
            out.append(value.detach())
        return torch.stack(out)

    ours = derivatives(
        lambda x: batch_norm(x, None, None, weight, bias, True, eps=0.1, backend=backend)
    )
    theirs = derivatives(lambda x: written_out(x, weight, bias, 0.1))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_nested_forward_mode():
    # pytorch#196699, the same fault in forward mode
    x, weight, bias, *_, v = case((5, 2, 3))

    def second(layer):
        def first(x):
            return torch.func.jvp(layer, (x,), (v,))[1]

        return torch.func.jvp(first, (x,), (v,))[1]

    ours = second(lambda x: batch_norm(x, None, None, weight, bias, True, eps=0.1))
    torch.testing.assert_close(ours, second(lambda x: written_out(x, weight, bias, 0.1)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_leaves_the_buffers_plain():
    x, weight, bias, running_mean, running_var, v = case((5, 2, 3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        y = batch_norm(dual, running_mean, running_var, weight, bias, True, eps=0.1)
        tangent = forward_ad.unpack_dual(y).tangent
        assert forward_ad.unpack_dual(running_mean).tangent is None
    _, expected = torch.func.jvp(lambda x: written_out(x, weight, bias, 0.1), (x,), (v,))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_through_a_backward_pass_recorded_before(training, activation, backend):
    x, weight, bias, running_mean, running_var, dy = case((5, 2, 3))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    options = {"eps": 0.1, "activation": activation, "backend": backend}
    y = batch_norm(x, running_mean, running_var, weight, bias, training, **options)
    direction = torch.flip(dy, (0,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dy, direction)
        grads = torch.autograd.grad(y, leaves, dual, retain_graph=True)
        tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
    assert_same(tangents, torch.autograd.grad(y, leaves, direction))  # linear in dy


def test_torch_func_grad_and_vmap(backend):
    x, weight, bias, *_, dy = case((5, 2, 3))

    def loss(x, weight, layer):
        return (layer(x, weight) * dy).sum()

    def ours(x, weight):
        return batch_norm(x, None, None, weight, bias, True, eps=0.1, backend=backend)

    def theirs(x, weight):
        return written_out(x, weight, bias, 0.1)

    assert_same(
        torch.func.grad(loss, argnums=(0, 1))(x, weight, ours),
        torch.func.grad(loss, argnums=(0, 1))(x, weight, theirs),
    )
    xs, weights = torch.stack([x, 2 * x, x * x]), torch.stack([weight, weight + 1, weight])
    assert_same([torch.func.vmap(ours)(xs, weights)], [torch.func.vmap(theirs)(xs, weights)])
    both = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None))
    assert_same([both(xs, weights, ours)], [both(xs, weights, theirs)])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_batches_of_gradients(training, backend):
    x, weight, bias, running_mean, running_var, dy = case((5, 2, 3))
    dys = torch.stack([dy, 2 * dy, dy * dy])

    def layer(x):
        options = {"residual": x, "activation": "relu", "backend": backend}
        return batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, 0.1, **options)

    x.requires_grad_()
    y = layer(x)
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(dys)
    single = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in dys]
    torch.testing.assert_close(batched, torch.stack(single))
    torch.testing.assert_close(mapped, torch.stack(single))
    hessian = functools.partial(torch.autograd.functional.hessian, lambda x: layer(x).pow(2).sum())
    torch.testing.assert_close(hessian(x, vectorize=True), hessian(x))


def test_vmap_with_running_statistics_is_refused_in_training_only():
    x, _, _, running_mean, running_var, _ = case((5, 2, 3))
    xs = torch.stack([x, 2 * x])
    y = torch.func.vmap(lambda x: batch_norm(x, running_mean, running_var))(xs)
    torch.testing.assert_close(y[1], torch_batch_norm(2 * x, running_mean, running_var))
    with pytest.raises(RuntimeError, match="running statistics"):
        torch.func.vmap(lambda x: batch_norm(x, running_mean, running_var, training=True))(xs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, backend):
    x, weight, bias, _, _, dy = case((5, 2, 3))
    plain, saved = x.clone().requires_grad_(), x.clone().requires_grad_()

    def layer(x):
        return batch_norm(x, None, None, weight, bias, True, activation="relu", backend=backend)

    layer(plain).backward(dy)
    checkpoint(layer, saved, use_reentrant=reentrant).backward(dy)
    torch.testing.assert_close(saved.grad, plain.grad, rtol=0, atol=0)


def test_inference_mode(backend):
    x, weight, bias, running_mean, running_var, _ = case((5, 2, 3))
    with torch.inference_mode():
        y = batch_norm(x, running_mean, running_var, weight, bias, backend=backend)
    torch.testing.assert_close(y, torch_batch_norm(x, running_mean, running_var, weight, bias))


def test_input_changed_before_backward_is_an_error(backend):
    x, weight, bias, *_ = case((5, 2, 3))
    weight.requires_grad_()
    y = batch_norm(x, None, None, weight, bias, True, backend=backend)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- residual and ReLU ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "shape"),
    [
        (torch.bfloat16, torch.float32, (4, 3, 5)),  # as under autocast
        (torch.float32, torch.float16, (4, 3, 5)),
        (torch.float32, torch.float64, (4, 3, 5)),
        (torch.float64, torch.float64, (1, 3, 1)),
        (torch.float64, torch.float64, (5,)),
        (torch.float64, torch.float64, ()),
        (torch.float64, torch.float64, (2, 4, 3, 5)),
    ],
    ids=str,
)
def test_unlike_residuals_by_torchs_rules(dtype, residual_dtype, shape, training, backend):
    x, *statistics, _ = case((4, 3, 5), dtype, param_dtype=torch.float64)
    statistics = [t.to(torch.promote_types(dtype, torch.float32)) for t in statistics]
    weight, bias, running_mean, running_var = statistics
    results = []
    for fused in (True, False):
        g = torch.Generator().manual_seed(1)
        residual = torch.randn(shape, generator=g, dtype=torch.float64).to(residual_dtype)
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        args = (leaves[0], running_mean.clone(), running_var.clone(), weight, bias, training)
        if fused:
            y = batch_norm(*args, residual=leaves[1], activation="relu", backend=backend)
        else:
            y = torch.relu(torch_batch_norm(*args) + leaves[1])
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        results.append([y.detach(), *(t.grad for t in leaves)])
    tolerance = 4 * torch.finfo(dtype).eps
    assert_same(*results, rtol=max(tolerance, 1e-12), atol=max(tolerance, 1e-12))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (16, 4, 3, 5), (8, 16, 1, 1)], ids=str)
def test_fused(shape, training, with_residual, activation, memory_format, backend):
    x, *rest, dy = (
        t if t.dim() < 4 else t.contiguous(memory_format=memory_format) for t in case(shape)
    )
    leaves = [case(shape, seed=1)[0].requires_grad_() for _ in range(2)]

    def fused(*args):
        residual = leaves[0] if with_residual else None
        return batch_norm(*args, residual=residual, activation=activation, backend=backend)

    def apart(*args):
        y = torch_batch_norm(*args)
        y = y + leaves[1] if with_residual else y
        return torch.relu(y) if activation else y

    ours, theirs = run(fused, x, *rest, dy, training), run(apart, x, *rest, dy, training)
    assert_same(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_same([leaves[0].grad], [leaves[1].grad], rtol=1e-12, atol=1e-12)
    assert ours[0].stride() == x.stride()


@pytest.mark.parametrize("needs", ["x", "weight", "residual", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_fused_with_one_gradient_alone(training, needs, backend):
    x, weight, bias, running_mean, running_var, dy = case((4, 3, 5))
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": case((4, 3, 5), seed=1)[0]}

    def grad(backend):
        given = {k: t.clone().requires_grad_(k == needs) for k, t in tensors.items()}
        stats = (running_mean.clone(), running_var.clone())
        y = batch_norm(
            given.pop("x") if needs != "x" else given["x"],
            *stats,
            given["weight"],
            given["bias"],
            training,
            residual=given["residual"],
            activation="relu",
            backend=backend,
        )
        y.backward(dy)
        return given[needs].grad

    with_mask = grad(backend)
    y = torch_batch_norm(x, running_mean, running_var, weight, bias, training)
    dy_masked = dy * (y + tensors["residual"] > 0)
    if needs == "residual":
        torch.testing.assert_close(with_mask, dy_masked)
    elif needs == "bias":
        torch.testing.assert_close(with_mask, dy_masked.sum((0, 2)))
    else:
        torch.testing.assert_close(with_mask, grad("reference"))


@pytest.mark.parametrize("shape", [(32, 4, 7, 7), (5, 3, 3, 3)], ids=str)
def test_fused_keeps_x_and_at_most_a_bit_per_element(shape, backend):
    x, weight, bias, *_, dy = case(shape, torch.float32)
    residual = case(shape, torch.float32, seed=1)[0].requires_grad_()
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = batch_norm(
            x.requires_grad_(),
            None,
            None,
            weight,
            bias,
            True,
            residual=residual,
            activation="relu",
            backend=backend,
        )
    large = [t for t in kept if t.numel() > shape[1]]
    assert sum(t.data_ptr() == x.data_ptr() for t in large) == 1
    mask_bytes = sum(t.nbytes for t in large if t.data_ptr() != x.data_ptr())
    assert mask_bytes <= x.numel() / 8 + shape[1]  # padded to a byte per channel
    y.backward(dy)


class Tagged(torch.Tensor):
    pass


UNPACKED = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "with gaps": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "negative view": lambda t: torch._neg_view(-t) if t.dim() == 4 else t,
    "subclass": lambda t: t.as_subclass(Tagged),
}


@pytest.mark.parametrize("unpack", UNPACKED.values(), ids=UNPACKED)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_hook_unpacks_the_input_in_another_form(unpack, channels_last, backend):
    x, weight, bias, *_, dy = case((4, 6, 5, 3), torch.float32)
    residual = case(x.shape, torch.float32, seed=1)[0]
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def grads(unpack):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            fused = {"residual": residual, "activation": "relu", "backend": backend}
            y = batch_norm(x, None, None, weight, bias, True, **fused)
        return torch.autograd.grad(y, leaves, dy)

    assert_same(grads(unpack), grads(lambda t: t), rtol=1e-4, atol=1e-5)


def test_numbers_in_tensors_are_read_at_every_call(backend):
    x, *_, mean, var, _ = case((6, 3))
    momentum, eps = torch.tensor(0.25), torch.tensor(1e-3)
    for value in (0.25, 0.5):
        momentum.fill_(value), eps.fill_(value)
        ours, theirs = [mean.clone(), var.clone()], [mean.clone(), var.clone()]
        y = batch_norm(x, *ours, training=True, momentum=momentum, eps=eps, backend=backend)
        expected = torch_batch_norm(x, *theirs, training=True, momentum=value, eps=value)
        assert_same([y, *ours], [expected, *theirs], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["input", "weight", "bias", "residual", "running_mean", "dy"])
def test_a_tensor_whose_storage_has_been_freed(which):
    """As torch's batch norm; torch's simpler operations, so the reference, crash."""
    x, weight, bias, running_mean, running_var, dy = case((6, 3), torch.float32)
    given = {"input": x, "weight": weight.clone(), "bias": bias.clone(), "residual": x.clone()}
    given |= {"running_mean": running_mean.clone(), "running_var": running_var.clone()}
    (given | {"dy": dy})[which].untyped_storage().resize_(0)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="storage has been freed"):
        batch_norm(**given, training=True, activation="relu", backend="cpu").backward(dy)


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_training_refuses_statistics_that_require_grad(which, backend):
    x = case((6, 3))[0]
    statistics = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    statistics[which].requires_grad_()
    with pytest.raises(ValueError, match="require no gradient"):
        batch_norm(x, **statistics, training=True, backend=backend)
    with torch.no_grad():
        batch_norm(x, **statistics, training=True, backend=backend)


@pytest.mark.parametrize("which", ["input", "weight", "residual"])
def test_what_a_transform_has_left_behind(which):
    x, weight, *_, residual = case((4, 3, 5), torch.float32)
    given = {"input": x, "weight": weight, "residual": residual}

    def run_layer(given):
        tensors = (given["input"], None, None, given["weight"], None, True)
        return batch_norm(*tensors, residual=given["residual"])

    left = []
    torch.func.grad(lambda t: [left.append(t * 1), t.sum()][1])(given[which])
    assert torch._C._functorch.is_dead_tensor_wrapper(left[0])
    torch.testing.assert_close(run_layer(given | {which: left[0]}), run_layer(given))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_mask_where_no_gradient_will_be(mode, backend, monkeypatch):
    x, weight, bias, *_ = case((5, 2, 3))
    weight.requires_grad_()
    masks = []
    monkeypatch.setattr(Kernels, "empty_mask", lambda self, x: masks.append(x))
    with mode():
        y = batch_norm(x, None, None, weight, bias, True, activation="relu", backend=backend)
    assert not masks and not y.requires_grad
    torch.testing.assert_close(y, torch_batch_norm(x, None, None, weight, bias, True).relu())


def test_mask_round_trip():
    for shape in [(3, 5, 7, 7), (1, 2), (9, 3), (8, 3, 4), (16, 2, 3, 1), (0, 3, 2), (2, 0, 3)]:
        positive = torch.rand(shape) > 0.5
        assert torch.equal(unpack_mask(pack_mask(positive, positive), positive), positive)
        positive = positive.movedim(1, -1).contiguous().movedim(-1, 1)
        assert torch.equal(unpack_mask(pack_mask(positive, positive), positive), positive)


def test_relu_passes_nan_as_torch(backend):
    x, *_, dy = case((4, 3, 5), torch.float32)
    x[1, 0, 2] = float("nan")
    x.requires_grad_()
    y = batch_norm(x, None, None, training=True, activation="relu", backend=backend)
    assert y[:, 0].isnan().all()
    y.backward(dy)
    assert x.grad[:, 0].isnan().all() and x.grad[:, 1:].isfinite().all()


# --- tools that record the calls ------------------------------------------------------------------


def test_compile_fullgraph_updates_the_buffers():
    x, weight, bias, running_mean, running_var, dy = case((4, 3, 5), torch.float32)
    residual = case((4, 3, 5), torch.float32, seed=1)[0]

    def layer(x, *args):
        return batch_norm(x, *args, residual=residual, activation="relu")

    args = (x, weight, bias, running_mean, running_var, dy, True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, *args), run(layer, *args), rtol=1e-5, atol=1e-5)


def test_export_holds_torchs_operator():
    class Layer(torch.nn.Module):
        def forward(self, x, mean, var):
            return batch_norm(x, mean, var, activation="relu")

    x, _, _, running_mean, running_var, _ = case((4, 3, 5), torch.float32)
    program = torch.export.export(Layer(), (x, running_mean, running_var))
    assert "batch_norm" in str(program.graph)
    y = program.module()(x, running_mean, running_var)
    torch.testing.assert_close(y, torch_batch_norm(x, running_mean, running_var).relu())


def test_dispatch_modes_see_torchs_operators():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias, *_ = case((4, 3, 5), torch.float32)
    with FlopCounterMode(display=False):
        y = batch_norm(x, None, None, weight, bias, True)
    torch.testing.assert_close(y, torch_batch_norm(x, None, None, weight, bias, True))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "torch.Tensor, got list", {"input": [1.0]}),
        (TypeError, "real floating dtype, got torch.int64", {"input": torch.ones(4, 3).long()}),
        (TypeError, "torch.complex64", {"input": torch.ones(4, 3, dtype=torch.complex64)}),
        (ValueError, r"rank >= 2 .* shape \(4,\)", {"input": torch.ones(4)}),
        (ValueError, r"weight of shape \(3,\).* shape \(2,\)", {"weight": torch.ones(2)}),
        (ValueError, r"bias of shape \(3,\).* shape \(3, 1\)", {"bias": torch.ones(3, 1)}),
        (ValueError, r"running_mean of shape \(3,\)", {"running_mean": torch.ones(4)}),
        (ValueError, "running_var=None with training=True", {"running_var": None}),
        (
            ValueError,
            "training=False",
            {"running_mean": None, "running_var": None, "training": False},
        ),
        (ValueError, "eps > 0 in training, got 0", {"eps": 0.0}),
        (ValueError, "eps >= 0, got -1", {"eps": -1.0, "training": False}),
        (ValueError, r"broadcasts with \(4, 3\), got \(4, 2\)", {"residual": torch.ones(4, 2)}),
        (
            TypeError,
            "residual .* floating dtype, got torch.int64",
            {"residual": torch.ones(3).long()},
        ),
        (ValueError, "weight on cpu, .* on meta", {"weight": torch.ones(3, device="meta")}),
        (ValueError, "residual on cpu, .* meta", {"residual": torch.ones(4, 3, device="meta")}),
        (TypeError, "weight to be a torch.Tensor, got list", {"weight": [1.0, 1.0, 1.0]}),
        (TypeError, "bias with a real floating dtype, got torch.int64", {"bias": torch.arange(3)}),
        (ValueError, "activation None or 'relu', got 'gelu'", {"activation": "gelu"}),
        (ValueError, "expected backend in .* got 'cuda'", {"backend": "cuda"}),
        (ValueError, "more than 1 value per channel", {"input": torch.ones(1, 3)}),
        (
            TypeError,
            "float16 on the CPU for backend='cpu', got torch.float8_e5m2",
            {"input": torch.ones(4, 3).to(torch.float8_e5m2), "backend": "cpu"},
        ),
    ],
)
def test_errors_name_what_arrived(error, message, change):
    arguments = {
        "input": torch.ones(4, 3),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "training": True,
    }
    with pytest.raises(error, match=message):
        batch_norm(**(arguments | change))


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_without_numba_the_reference_serves_and_says_so_once(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "numba":
                raise error("libllvmlite.so: cannot open shared object file")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    for name in [name for name in sys.modules if name.startswith("bnlib.kernels.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    forget = (choose.load.cache_clear, choose._installed.cache_clear)
    [clear() for clear in forget]
    x = case((4, 3, 5), torch.float32)[0]
    try:
        with pytest.warns(
            UserWarning, match="bnlib computes batch norm with its reference"
        ) as seen:
            y = batch_norm(x, None, None, training=True)
            batch_norm(x, None, None, training=True)
        assert len(seen) == 1
        torch.testing.assert_close(y, torch_batch_norm(x, None, None, training=True))
        with pytest.raises(error, match="libllvmlite"):
            batch_norm(x, None, None, training=True, backend="cpu")
    finally:
        [clear() for clear in forget]
