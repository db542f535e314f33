"""bnlib.nn against torch.nn: the modules, and their exchange in a model."""

import copy
import inspect
import io

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bnlib.nn

PAIRS = {
    "BatchNorm1d": (4, 5, 6),
    "BatchNorm2d": (4, 5, 3, 6),
    "BatchNorm3d": (2, 5, 3, 2, 4),
    "SyncBatchNorm": (4, 5, 3, 6),
}
OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"eps": 1e-2, "momentum": 0.3, "dtype": torch.float64},
]
if "bias" in inspect.signature(torch.nn.BatchNorm2d).parameters:  # a newer torch than the lowest
    OPTIONS.append({"bias": False})


def pair(name, **options):
    """torch's module and ours, with the same parameters."""
    theirs = getattr(torch.nn, name)(5, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(0.5, 1.5)
    ours = getattr(bnlib.nn, name)(5, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_steps_like_torch(name, options):
    if name == "SyncBatchNorm":  # torch's takes no CPU tensors, BatchNorm2d does the same
        theirs, ours = pair("BatchNorm2d", **options)[0], pair(name, **options)[1]
        ours.load_state_dict(theirs.state_dict())
    else:
        theirs, ours = pair(name, **options)
    dtype = options.get("dtype", torch.float32)
    torch.manual_seed(0)
    for step in range(1, 13):
        if step > 10:
            theirs.eval(), ours.eval()
        x = torch.randn(PAIRS[name], dtype=dtype) * 3 + 1
        xs = [x.clone().requires_grad_() for _ in range(2)]
        dy = torch.randn_like(x)
        ys = [module(x) for module, x in zip((theirs, ours), xs, strict=True)]
        for module, y in zip((theirs, ours), ys, strict=True):
            module.zero_grad()
            y.backward(dy)
        torch.testing.assert_close(ys[1], ys[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=1e-5, atol=1e-5)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-4)
        if step in (1, 2, 10, 12):
            for (key, p), q in zip(
                ours.state_dict().items(), theirs.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", PAIRS)
def test_same_face_as_torch(name):
    theirs, ours = pair(name)
    assert repr(ours) == repr(theirs)
    if name != "SyncBatchNorm":  # of whose class DistributedDataParallel takes no CPU module
        assert isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())  # and the other way round, in pair()
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(ours), torch.load(stream, weights_only=False)):
        assert type(copied) is type(ours)
        for p, q in zip(copied.state_dict().values(), ours.state_dict().values(), strict=True):
            assert torch.equal(p, q) and p is not q
    meta = getattr(bnlib.nn, name)(3, device="meta", dtype=torch.float64)
    assert meta.weight.device.type == "meta" and meta.weight.dtype == torch.float64


def test_wrong_rank_is_torchs_error():
    for name, shape in [("BatchNorm1d", (2, 3, 4, 5)), ("BatchNorm2d", (2, 3, 4))]:
        with pytest.raises(ValueError, match=r"expected .* input"):
            getattr(bnlib.nn, name)(3)(torch.ones(shape))


def test_residual_and_relu():
    theirs, ours = pair("BatchNorm2d")
    x, residual = torch.randn(2, 4, 5, 3, 3).unbind()
    y = ours(x, residual=residual, activation="relu")
    torch.testing.assert_close(y, torch.relu(theirs(x) + residual), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_model_and_autocast(dtype):
    torch.manual_seed(0)
    theirs, ours = pair("BatchNorm2d", dtype=dtype)
    x = torch.randn(4, 5, 3, 3, dtype=dtype)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x), rtol=2e-2, atol=2e-2)
    assert ours.running_mean.dtype == dtype
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-2, atol=1e-2)

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
    fast = bnlib.nn.convert_batch_norm(copy.deepcopy(model))
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=dtype):
        y, expected = fast(x), model(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert fast[1].weight.grad.dtype == torch.float32


# --- convert_batch_norm ---------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        shared = torch.nn.BatchNorm2d(4)
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), shared)
        self.blocks = torch.nn.ModuleDict({"a": torch.nn.Sequential(shared, torch.nn.ReLU())})
        self.head = torch.nn.ModuleList([torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)])

    def forward(self, x):
        x = self.blocks["a"](self.stem(x)).mean((2, 3))
        return self.head[1](self.head[0](x))


def test_convert_keeps_everything_but_the_class():
    torch.manual_seed(0)
    model = Net()
    norm, calls = model.stem[1], []
    norm.register_forward_hook(lambda *_: calls.append("hook"))
    norm.weight.requires_grad_(False)
    model.head[1].eval()
    model.head[1].note = "kept"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = copy.deepcopy(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}

    converted = bnlib.nn.convert_batch_norm(model)

    assert converted is model and model.stem[1] is norm is model.blocks["a"][0]
    assert type(norm) is bnlib.nn.BatchNorm2d and type(model.head[1]) is bnlib.nn.BatchNorm1d
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert not norm.weight.requires_grad and norm.bias.requires_grad
    assert norm.training and not model.head[1].training and model.head[1].note == "kept"
    x = torch.randn(8, 3, 5, 5)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-5)
    assert calls == ["hook", "hook"] * 2  # the copy's hooks append to the same list
    before = model.stem[1].bias.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.stem[1].bias, before)

    again = bnlib.nn.convert_batch_norm(model)
    assert again is model and type(norm) is bnlib.nn.BatchNorm2d


def test_convert_a_lone_module_subclasses_and_sync():
    lone = torch.nn.BatchNorm1d(3)
    assert bnlib.nn.convert_batch_norm(lone) is lone and type(lone) is bnlib.nn.BatchNorm1d

    class Own(torch.nn.BatchNorm2d):
        pass

    class Ours(bnlib.nn.BatchNorm2d):
        pass

    parametrized = torch.nn.BatchNorm2d(3)
    torch.nn.utils.parametrize.register_parametrization(parametrized, "bias", torch.nn.Identity())
    model = torch.nn.Sequential(
        Own(3), torch.nn.LazyBatchNorm2d(), parametrized, torch.nn.LayerNorm(3), Ours(3)
    )
    before = [type(m) for m in model]
    names = r"'0' \(Own\), '1' \(LazyBatchNorm2d\), '2' \(ParametrizedBatchNorm2d\)$"
    with pytest.warns(UserWarning, match=names) as seen:
        bnlib.nn.convert_batch_norm(model)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert [type(m) for m in model] == before

    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), bnlib.nn.BatchNorm3d(3), lone)
    bnlib.nn.convert_batch_norm(model, sync=True)
    assert [type(m) for m in model] == [bnlib.nn.SyncBatchNorm] * 3
    assert all(m.process_group is None for m in model)
    x = torch.randn(4, 3, 5, 5)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(model[0](x), expected, rtol=1e-5, atol=1e-5)
    theirs = torch.nn.SyncBatchNorm(3, process_group="group")
    bnlib.nn.convert_batch_norm(theirs)
    assert type(theirs) is bnlib.nn.SyncBatchNorm and theirs.process_group == "group"

    group = object()
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), bnlib.nn.SyncBatchNorm(3), theirs)
    bnlib.nn.convert_batch_norm(model, sync=True, process_group=group)
    assert all(m.process_group is group for m in model)
    with pytest.raises(ValueError, match="sync=True with a process_group, got sync=False"):
        bnlib.nn.convert_batch_norm(model, process_group=group)
    for function in (bnlib.nn.convert_batch_norm, bnlib.nn.restore_batch_norm):
        with pytest.raises(TypeError, match=r"torch.nn.Module, got Tensor"):
            function(torch.ones(3))


CLASSES = [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm]


@pytest.mark.parametrize("steps", [[False], [True], [False, True], [True, False], [True, True]])
def test_restore_is_the_inverse_of_convert(steps):
    model = torch.nn.Sequential(*(cls(3) for cls in CLASSES))
    model[1].note = "kept"
    before = [sorted(m.__dict__) for m in model]
    parameters = [id(p) for p in model.parameters()]
    for sync in steps:
        bnlib.nn.convert_batch_norm(model, sync)
    for converted in (copy.deepcopy(model), model):
        restored = bnlib.nn.restore_batch_norm(converted)
        assert restored is converted and [type(m) for m in restored] == CLASSES
        assert [sorted(m.__dict__) for m in restored] == before
    assert [id(p) for p in model.parameters()] == parameters
    built = bnlib.nn.SyncBatchNorm(3)
    assert type(bnlib.nn.restore_batch_norm(built)) is torch.nn.SyncBatchNorm


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_restored_models_are_fused_by_torch_ao():
    from torch.ao.quantization import fuse_modules

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()

    model = bnlib.nn.restore_batch_norm(bnlib.nn.convert_batch_norm(net()))
    x = torch.randn(2, 3, 5, 5)
    fused = fuse_modules(model, [["0", "1"]])
    assert type(fused[1]) is torch.nn.Identity
    torch.testing.assert_close(fused(x), net()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_counts_nothing(dtype):
    for momentum in (None, 0.1):
        ours = bnlib.nn.BatchNorm1d(3, momentum=momentum, dtype=dtype)
        alone = bnlib.nn.BatchNorm1d(3, momentum=momentum, dtype=dtype)
        for n in (0, 50, 0, 20):
            x = torch.randn(n, 3, dtype=dtype) * 5
            ours(x)
            if n:
                alone(x)
        for one, other in zip(ours.buffers(), alone.buffers(), strict=True):
            assert torch.equal(one, other)
    assert ours.num_batches_tracked == 2


def test_on_the_meta_device():
    norm = bnlib.nn.BatchNorm2d(8, device="meta")
    x = torch.empty(2, 8, 3, 3, device="meta", requires_grad=True)
    y = norm(x, residual=x, activation="relu")
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape and norm.weight.grad.shape == (8,)


def test_evaluation_then_training_then_backward_is_an_error():
    """The gradient needs the statistics that training moves; torch's layer uses the moved ones."""
    norm = bnlib.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = norm.eval()(x, activation="relu")
    norm.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- torch's machinery around a model -------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.BatchNorm2d(4)
    )


def trained(model, wrap=lambda model: model, steps=2):
    """Parameters and buffers after a few steps."""
    torch.manual_seed(1)
    wrapped, optimizer = wrap(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        y = wrapped(torch.randn(6, 3, 5, 5))
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        optimizer.step()
    return model.state_dict()


def assert_same_state(ours, theirs):
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_checkpointed_model_trains_as_torch():
    def wrap(model):
        return lambda x: checkpoint(model, x, use_reentrant=False)

    ours = trained(bnlib.nn.convert_batch_norm(small_model()), wrap)
    assert_same_state(ours, trained(small_model(), wrap))


def test_ddp_trains_as_torch(tmp_path):
    expected = trained(small_model())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrap = torch.nn.parallel.DistributedDataParallel
        ours = trained(bnlib.nn.convert_batch_norm(small_model()), wrap)
        sync = trained(bnlib.nn.convert_batch_norm(small_model(), sync=True), wrap)
    finally:
        torch.distributed.destroy_process_group()
    assert_same_state(ours, expected)
    assert_same_state(sync, expected)


def test_compiled_model_trains_as_torch():
    def wrap(model):
        return torch.compile(model, fullgraph=True, backend="aot_eager")

    ours = trained(bnlib.nn.convert_batch_norm(small_model()), wrap)
    assert_same_state(ours, trained(small_model()))


def test_exported_model():
    model = bnlib.nn.convert_batch_norm(small_model()).eval()
    x = torch.randn(6, 3, 5, 5)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_traced_model():
    model = bnlib.nn.convert_batch_norm(small_model()).eval()
    x = torch.randn(6, 3, 5, 5)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(2 * x), model(2 * x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripting_needs_torchs_layers():
    model = bnlib.nn.convert_batch_norm(small_model()).eval()
    with pytest.raises(RuntimeError, match=r"not take bnlib.nn.BatchNorm2d: call .*restore"):
        torch.jit.script(model)
    x = torch.randn(6, 3, 5, 5)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(bnlib.nn.restore_batch_norm(model))(x), expected)


def test_convert_sync_batchnorm_of_torch():
    """torch's converter knows bnlib's layers by their base class, and makes them its own."""
    model = bnlib.nn.convert_batch_norm(small_model())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is torch.nn.SyncBatchNorm
    assert_same_state(model.state_dict(), state)


def test_symbolic_trace_has_leaves():
    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bnlib.nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x, residual=x, activation="relu")

    model = torch.nn.Sequential(Fused(), bnlib.nn.convert_batch_norm(small_model()))
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == ["0.norm", "1.0", "1.1", "1.2", "1.3"]
    x = torch.randn(6, 3, 5, 5)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    assert_same_state(graph.state_dict(), model.state_dict())
