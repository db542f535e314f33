"""bnlib.recalibrate: running statistics of all the data together, and nothing else changed."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import bnlib.nn
from bnlib.recalibration import recalibrate

SIZES = [7, 1, 30, 2]


def batches_of(x, sizes=SIZES):
    return list(x[: sum(sizes)].split(sizes))


def drifting(dtype=torch.float64, seed=0, channels=3):
    """Batches whose means differ much more than the values within them."""
    torch.manual_seed(seed)
    x = torch.randn(sum(SIZES), channels, 4, 5, dtype=dtype) + 100
    return [b + 5 * i for i, b in enumerate(batches_of(x))]


def net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1), norm(2)
    )


def state(model):
    return copy.deepcopy(
        [
            dict(model.state_dict()),
            [m.training for m in model.modules()],
            torch.get_rng_state(),
            random.getstate(),
            [p.grad for p in model.parameters()],
        ]
    )


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0, equal_nan=True)
    assert a[1] == b[1] and torch.equal(a[2], b[2]) and a[3] == b[3]
    torch.testing.assert_close(a[4], b[4], rtol=0, atol=0)


KINDS = [
    nn.BatchNorm2d,
    bnlib.nn.BatchNorm2d,
    bnlib.nn.SyncBatchNorm,
    nn.SyncBatchNorm,
    type("Mine", (nn.BatchNorm2d,), {}),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.__module__}.{k.__name__}")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_layer_has_the_statistics_of_all_the_data(kind, training, momentum):
    batches = drifting()
    layer = kind(3, momentum=momentum, dtype=torch.float64)
    model = nn.Sequential(layer).train(training)
    found = recalibrate(model, batches)
    x = torch.cat(batches)
    var, mean = torch.var_mean(x, dim=(0, 2, 3))
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-13, atol=0)
    assert layer.num_batches_tracked == len(batches)
    assert found["0"].count == x.shape[0] * 20
    assert model.training is layer.training is training


@pytest.mark.parametrize("sizes", [[40], [20, 20], [1] * 40, [39, 1]], ids=str)
def test_the_cut_into_batches_does_not_matter_to_the_first_layer(sizes):
    x = torch.cat(drifting())[:40]
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    recalibrate(layer, batches_of(x, sizes))
    torch.testing.assert_close(layer.running_var, x.var(dim=(0, 2, 3)), rtol=1e-13, atol=0)


def test_the_average_of_variances_is_low_where_the_means_differ():
    batches = drifting()
    whole = torch.cat(batches).var(dim=(0, 2, 3))
    ours, theirs = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    recalibrate(ours, batches)
    torch.optim.swa_utils.update_bn(batches, nn.Sequential(theirs))
    within = torch.stack([b.var(dim=(0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(theirs.running_var, within)
    torch.testing.assert_close(ours.running_var, whole)
    assert (theirs.running_var < 0.1 * whole).all()


def test_deeper_layers_see_what_they_see_in_training_without_dropout():
    batches = drifting(torch.float32)
    model = net().eval()
    recalibrate(model, batches)
    seen = []
    reference = net().train()
    reference[3].eval()
    reference[5].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        reference(batch)
    x = torch.cat(seen).double()
    assert (x.var(dim=(0, 2, 3)) > 0).all()
    torch.testing.assert_close(model[5].running_mean.double(), x.mean((0, 2, 3)))
    torch.testing.assert_close(model[5].running_var.double(), x.var((0, 2, 3)))


def test_nothing_else_changes():
    model = net()
    model(torch.randn(4, 3, 4, 5)).sum().backward()
    model.register_buffer("count", torch.zeros(2))
    model.register_forward_pre_hook(lambda model, _: print(model.count.add_(torch.rand(2))))
    model[4].eval()

    def loader():
        for batch in drifting(torch.float32):
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            yield batch

    batches, before, others = loader(), state(model), np.random.get_state()[1].copy()  # noqa: NPY002
    recalibrate(model, batches)
    after = state(model)
    for name in list(after[0]):
        if "running" in name or "tracked" in name:
            assert not torch.equal(after[0].pop(name), before[0].pop(name))
    assert_same(before, after)
    assert np.array_equal(others, np.random.get_state()[1])  # noqa: NPY002


def test_an_exception_leaves_the_buffers_and_tells_what_happened():
    model, x = net().train(), torch.randn(4, 3, 4, 5)
    model[1].eval()
    before = state(model)
    buffer = model[5].running_mean
    with pytest.raises(TypeError, match=r"got builtins\.str"):
        recalibrate(model, [x, "not a batch"])
    assert_same(before, state(model))
    assert model[5].running_mean is buffer
    assert not model[5]._forward_pre_hooks


def test_a_waiting_backward_pass_is_not_disturbed():
    model = net().eval()
    x = torch.randn(4, 3, 4, 5)
    loss = model(x).sum()
    with pytest.raises(TypeError):
        recalibrate(model, [x, None])
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_that_the_buffers_cannot_hold_are_refused_and_change_nothing(dtype):
    model, x = net().to(dtype), torch.randn(4, 3, 4, 5).to(dtype)
    worst = torch.full_like(x, torch.nan) if dtype == torch.float32 else 3e4 * x
    before = state(model)
    with pytest.raises(ValueError, match=rf"expected statistics that {dtype} holds.* in '1'"):
        recalibrate(model, [x, worst])
    assert_same(before, state(model))


def test_frozen_layers_keep_their_statistics_and_use_them():
    model = net().train()
    model[1].eval()
    with torch.no_grad():
        model[1].running_mean.fill_(3)
    x = torch.randn(8, 3, 4, 5)
    assert list(recalibrate(model, [x])) == ["5"]
    assert (model[1].running_mean == 3).all() and not model[1].num_batches_tracked
    expected = model[4](model[1](model[0](x)).relu()).mean((0, 2, 3))
    torch.testing.assert_close(model[5].running_mean, expected)
    assert list(recalibrate(model.eval(), [x])) == ["1", "5"]


def test_layers_without_running_statistics_are_left_alone():
    model = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.BatchNorm2d(3),
    )
    assert list(recalibrate(model, drifting(torch.float32))) == ["2"]
    assert model[0].running_mean is None and model[0].num_batches_tracked is None
    assert (model[1].running_mean == 0).all()


def test_layers_out_of_reach_are_named():
    class Gap(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.used(self.used(x))

    model = Gap()
    with pytest.warns(UserWarning, match=r"no batch reached: 'spare'$"):
        found = recalibrate(model, drifting(torch.float32))
    assert list(found) == ["used"]
    assert (model.spare.running_mean == 0).all()
    assert model.used.num_batches_tracked == 2 * len(SIZES)  # as torch counts


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ("tensor", lambda x: x),
        ("dict", lambda x: {"x": x}),
        ("pair", lambda x: (x, torch.zeros(len(x)))),
        ("list", lambda x: [x, None, 3]),
    ],
)
def test_batches_of_every_form(shape, make):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, scale=1):
            assert scale == 1
            return self.bn(x)

    x = torch.randn(6, 3, 2, 2)
    model = Net()
    recalibrate(model, [make(x)])
    torch.testing.assert_close(model.bn.running_mean, x.mean((0, 2, 3)))
    if shape in ("tensor", "dict"):
        recalibrate(model, make(2 * x))  # alone it is one batch
        torch.testing.assert_close(model.bn.running_mean, 2 * x.mean((0, 2, 3)))


def test_forward_with_two_required_arguments_and_the_wrapper_around_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x, y):
            return self.bn(x + y)

    x = torch.randn(6, 3)
    for model in (Two(), nn.DataParallel(Two())):
        (layer,) = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
        recalibrate(model, [(x, x, "label")])
        torch.testing.assert_close(layer.running_mean, 2 * x.mean(0))
        with pytest.raises(ValueError, match=r"at least 2 elements.* got one with 1"):
            recalibrate(model, [(x,)])


def test_a_module_called_module_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Bilinear(2, 2, 3)  # whose forward needs two
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(self.module(x, x))

    x = torch.randn(6, 2)
    model = torch.optim.swa_utils.AveragedModel(Holder())
    found = recalibrate(model, [(x, "label")])
    assert list(found) == ["module.bn"]


def test_chunks_are_merged(monkeypatch):
    monkeypatch.setattr("bnlib.recalibration._CHUNK", 120)
    (x,) = drifting()[2:3]
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    recalibrate(layer, [x])
    torch.testing.assert_close(layer.running_var, x.var(dim=(0, 2, 3)), rtol=1e-13, atol=0)


def test_bfloat16_activations_in_a_float32_layer():
    x = torch.randn(64, 3, 4, 4).add(3).bfloat16()
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate(model, [x])
    torch.testing.assert_close(model[0].running_var, x.float().var((0, 2, 3)))


def test_an_empty_batch_moves_nothing():
    batches = drifting(torch.float32)
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    recalibrate(ours, [batches[0][:0], *batches])
    recalibrate(theirs, batches)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_a_compiled_model_runs_its_own_code():
    layer = nn.BatchNorm1d(3)
    model = torch.compile(nn.Sequential(layer), backend="eager")
    x = torch.randn(8, 3)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        recalibrate(model, [x])
    torch.testing.assert_close(layer.running_mean, x.mean(0))


@pytest.mark.parametrize(
    ("model", "batches", "error", "said"),
    [
        (3, [], TypeError, r"expected a torch\.nn\.Module, got int"),
        (nn.Linear(2, 2), [], ValueError, "with batch norms, got Linear with none"),
        (nn.LazyBatchNorm1d(), [], ValueError, "got the lazy 'weight'"),
        (nn.BatchNorm1d(2), 3, TypeError, "iterable of batches, got int"),
        (nn.BatchNorm1d(2), [], ValueError, "at least one batch, got none"),
        (nn.BatchNorm1d(2), [np.zeros((2, 2))], TypeError, r"got numpy\.ndarray"),
        (nn.BatchNorm1d(2), torch.zeros(1, 2), ValueError, r"one value per .*got input .*\(1, 2\)"),
        (nn.BatchNorm1d(3, affine=False), torch.zeros(2, 1), RuntimeError, "1 elements not 3"),
        (nn.BatchNorm1d(2, track_running_stats=False), [], ValueError, "got 0 with running"),
        (nn.Sequential(nn.BatchNorm1d(2).eval()), [], ValueError, "got 1 with .* frozen"),
    ],
)
def test_bad_input_is_named(model, batches, error, said):
    with pytest.raises(error, match=said):
        recalibrate(model, batches)
