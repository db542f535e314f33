"""bnlib.diagnosis: planted faults are found, healthy nets left in peace, nothing is disturbed."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import random
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import small_nets as nets
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnlib.nn
from bnlib import diagnosis
from bnlib.diagnosis import diagnose
from bnlib.diagnosis.rules import KINDS
from bnlib.diagnosis.watch import sums
from bnlib.recalibration import recalibrate

PHOTOS = {"channels": 3, "classes": 8}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@functools.cache
def trained(name="plain", data="digits", steps=60):
    torch.manual_seed(0)
    options = PHOTOS if data == "photo_patches" else {}
    return nets.train(getattr(nets, name)(**options), data, steps)


def healthy(name="plain", data="digits", steps=60):
    return copy.deepcopy(trained(name, data, steps))


def kinds(found):
    return {(f.layer, f.kind) for f in found.findings}


# --- Healthy nets ---------------------------------------------------------------------------------

UNTOUCHED = {
    "plain": nets.plain,
    "vgg": nets.vgg,
    "resnet": nets.resnet,
    "bottleneck": lambda: nets.resnet(bottleneck=True),
    "zero_init_residual": lambda: nets.resnet(bottleneck=True, zero=True),
    "mobilenet": nets.mobilenet,
    "densenet": nets.densenet,
    "mlp": nets.mlp,
}


@pytest.mark.parametrize("name", UNTOUCHED)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_an_untouched_model_was_never_trained_and_that_is_all(name, training, frozen):
    model = UNTOUCHED[name]().train(training).requires_grad_(not frozen)
    found = diagnose(model, nets.batches(size=16, count=2))
    assert {f.kind for f in found.findings} == {"never_trained"}
    assert len(found.findings) == len(found.layers)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain", "digits"),
        ("resnet", "digits"),
        ("mobilenet", "digits"),
        ("densenet", "digits"),
        ("mlp", "digits"),
        ("plain", "photo_patches"),
        ("mlp", "photo_patches"),
    ],
)
def test_a_trained_net_is_left_in_peace(name, data):
    if data == "photo_patches" and name == "mlp":
        model = nets.train(nets.mlp(**PHOTOS, size=256), data, 60)
    else:
        model = healthy(name, data)
    for size, count in ((128, 1), (2, 3), (1, 4), (1, 1)):
        for training in (True, False):
            if name == "mlp" and size == 1 and training:
                continue  # one value per channel: that is a finding
            model.train(training)
            found = diagnose(model, nets.batches(data, size, count))
            assert found.findings == (), found


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.03, "steps": 100},
        {"batch": 2, "rate": 0.02},
        {"rate": 0.5},
        {"norm": type("Mine", (nn.BatchNorm2d,), {})},
    ],
    ids=str,
)
def test_options_are_no_faults(options):
    how = {"steps": 60, "batch": 32, "rate": 0.05}
    how |= {key: options.pop(key) for key in list(options) if key in how}
    model = nets.train(nets.plain(**options), **how)
    assert diagnose(model, nets.batches()).findings == ()
    assert diagnose(model.eval(), nets.batches()).findings == ()


def test_layers_frozen_on_purpose_are_left_in_peace():
    model = healthy("resnet")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
            module.running_var *= 9  # as of other data, around which the rest was trained
    assert diagnose(model, nets.batches()).findings == ()
    assert diagnose(model.eval(), nets.batches()).findings == ()


class Of(nn.Module):
    """A model that computes ``run(layers, x)``."""

    def __init__(self, run, *layers):
        super().__init__()
        self.run, self.layers = run, nn.ModuleList(layers)

    def forward(self, x):
        return self.run(self.layers, x)


@pytest.mark.parametrize(
    "columns", [lambda x: x, lambda x: x[:, :2], lambda x: (2 * x).to(torch.float32)]
)
def test_columns_of_the_input_may_have_any_unit(columns):
    model = Of(lambda m, x: m[1](m[0](columns(x))), nn.BatchNorm1d(2), nn.Linear(2, 2))
    x = torch.randn(64, 2).double() * torch.tensor([1e6, 1])
    x = x.float() if columns(x).dtype == torch.float64 else x
    recalibrate(model, [x])
    assert diagnose(model, [x]).findings == ()
    later = Of(lambda m, x: m[1](m[0](columns(x))), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    later.layers[0].weight.data = torch.tensor([[1.0, 0], [0, 1]])
    recalibrate(later, [x])
    assert kinds(diagnose(later, [x])) == {("layers.1", "exploding")}


def test_layers_frozen_halfway_are_no_sign_of_checkpointing():
    model = nets.train(nets.plain(), steps=60)
    model[1].eval().requires_grad_(False)
    nets.train(model, steps=60)
    assert (model[1].num_batches_tracked, model[4].num_batches_tracked) == (60, 120)
    assert diagnose(model, nets.batches()).findings == ()
    assert diagnose(model.eval(), nets.batches()).findings == ()


# --- Planted faults -------------------------------------------------------------------------------


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def never_trained(model):
    model[4].reset_running_stats()


def stale_mean(model):
    model[4].running_mean += 3 * model[4].running_var.sqrt()


def stale_var(model):
    model[4].running_var *= 16


def nan_in_buffers(model):
    model[4].running_var[2] = float("nan")


def inf_in_buffers(model):
    model[4].running_mean[2] = float("inf")


def negative_variance(model):
    model[4].running_var[2] = -1


def inf_in_variance(model):
    model[4].running_var.fill_(float("inf"))  # as of a float16 that was too small


def nan_in_gamma(model):
    model[4].weight.data[2] = float("nan")


def nan_before(model):
    model[0].weight.data[2] = float("nan")


def training_in_eval(model):
    model.eval()
    model[4].train()


def eval_in_training(model):
    model[4].eval()


def unfrozen(model):
    model[4].requires_grad_(False)
    model.train()


def momentum(model):
    model[4].momentum = 0.9


def exploding(model):
    model[3].weight.data[2] *= 1e6
    recalibrate(model, nets.batches())


def epsilon(model):
    model[3].weight.data *= 1e-4
    recalibrate(model, nets.batches())


def constant(model):
    model[3].weight.data[2] = 0
    recalibrate(model, nets.batches())


def dead(model):
    model[4].bias.data[2] = -20
    recalibrate(model, nets.batches())


def zero_gamma(model):
    model[4].weight.data[2] = 0
    recalibrate(model, nets.batches())


def useless_bias(model):
    model[3].bias = nn.Parameter(torch.ones(16))
    recalibrate(model, nets.batches())


FAULTS = {
    never_trained: ("never_trained", {"batches_tracked": 0}),
    stale_mean: ("stale", {"mean_gap": pytest.approx(3, abs=0.3)}),
    stale_var: ("stale", {"std_ratio": pytest.approx(4, abs=0.5)}),
    nan_in_buffers: ("nonfinite", {"running_var": 1}),
    inf_in_buffers: ("nonfinite", {"running_mean": 1}),
    negative_variance: ("nonfinite", {"running_var": 1}),
    inf_in_variance: ("nonfinite", {"running_var": 16}),
    nan_in_gamma: ("nonfinite", {"weight": 1}),
    training_in_eval: ("training_in_eval", {"in_training": 1, "of": 2}),
    eval_in_training: ("eval_in_training", {"in_training": 1, "of": 2}),
    unfrozen: ("unfrozen", {"in_training": 2, "of": 2}),
    momentum: ("momentum", {"momentum": 0.9, "probably": 0.1}),
    exploding: ("exploding", {"channels": 1}),
    epsilon: ("epsilon", {"channels": 16, "of": 16}),
    constant: ("constant", {"channels": 1, "of": 16}),
    dead: ("dead", {"channels": 1, "of": 16}),
    zero_gamma: ("zero_gamma", {"channels": 1, "of": 16}),
    useless_bias: ("useless_bias", {"bias": "3.bias", "largest": 1.0}),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("converted", [False, True])
def test_a_planted_fault_is_found_and_nothing_else(fault, converted):
    model, (kind, evidence) = healthy(), FAULTS[fault]
    if converted:
        bnlib.nn.convert_batch_norm(model)
    fault(model)
    found = diagnose(model, nets.batches())
    assert kinds(found) == {("4", kind)}, found
    (finding,) = found.findings
    for name, value in evidence.items():
        assert finding.evidence[name] == value
    assert (finding.advice, finding.chapter) == KINDS[kind]


def test_nan_is_told_where_it_appears_first():
    model = healthy()
    nan_before(model)
    found = diagnose(model, nets.batches())
    assert kinds(found) == {("1", "nonfinite_input")}
    assert found.findings[0].evidence["batch"] == 1
    data = nets.batches()
    data[2][0][5, 0, 3, 3] = float("nan")
    found = diagnose(healthy(), data)
    assert kinds(found) == {("1", "nonfinite_input")}
    assert found.findings[0].evidence["batch"] == 3


def test_dead_channels_before_functional_relu_and_fused_relu():
    model = healthy("resnet")
    model[4].norms[0].bias.data[3] = -20
    recalibrate(model, nets.batches())
    assert kinds(diagnose(model, nets.batches())) == {("4.norms.0", "dead")}
    for norm in (bnlib.nn.BatchNorm2d(16), Fused(16)):  # which needs no compiler
        assert "activation" in inspect.signature(norm.forward).parameters
    norm.load_state_dict(model[4].norms[0].state_dict())
    model[4].norms[0] = Of(lambda m, x: m[0](x, activation="relu"), norm)
    assert kinds(diagnose(model, nets.batches())) == {("4.norms.0.layers.0", "dead")}


class Fused(nn.BatchNorm2d):
    def forward(self, x, residual=None, activation=None):
        return super().forward(x).relu()


@pytest.mark.parametrize("low", [-20.0, 0.0])
def test_a_few_samples_do_not_make_a_channel_dead_or_constant(low):
    model = Of(lambda m, x: m[0](x).relu(), nn.BatchNorm2d(1))
    model.layers[0].bias.data[0] = low
    x = torch.rand(64, 1, 16, 16) if low else torch.zeros(64, 1, 16, 16)
    recalibrate(model, [x])
    assert diagnose(model, [x[:63]]).findings == ()
    assert kinds(diagnose(model, [x])) == {("layers.0", "dead" if low else "constant")}


def test_a_low_channel_without_relu_is_not_dead():
    model = healthy("resnet")
    model[4].norms[1].bias.data[3] = -20  # to which the identity is added
    recalibrate(model, nets.batches())
    assert diagnose(model, nets.batches()).findings == ()


@pytest.mark.parametrize("run", [lambda y: y + y.relu(), lambda y: y.relu() + y])
def test_a_channel_that_passes_beside_the_relu_is_not_dead(run):
    model = Of(lambda m, x: run(m[0](x)), nn.BatchNorm2d(1))
    model.layers[0].bias.data[0] = -20
    recalibrate(model, nets.batches())
    assert diagnose(model, nets.batches()).findings == ()


def test_checkpointed_layers_count_twice():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nets.plain()[:3], nets.plain()[3:]

        def forward(self, x):
            return self.last(checkpoint(self.first, x, use_reentrant=False))

    model = nets.train(Checkpointed(), steps=60)
    found = diagnose(model, nets.batches())
    assert kinds(found) == {("first.1", "double_counted")}
    assert found.findings[0].evidence == {"batches_tracked": 120, "of_the_others": 60}


def test_a_layer_used_twice_is_not_counted_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.plain()
            self.net.insert(3, self.net[1])

        def forward(self, x):
            return self.net(x)

    model = nets.train(Twice(), steps=60)
    assert model.net[1].num_batches_tracked == 2 * model.net[5].num_batches_tracked
    assert "double_counted" not in {f.kind for f in diagnose(model, nets.batches()).findings}


def test_a_batch_of_one_is_found_where_it_would_be_trained_on():
    model, x = healthy("mlp"), nets.images("digits")[0]
    data = [x[:64], x[64:128], x[128:129]]
    found = diagnose(model, data)
    assert kinds(found) == {("2", "one_value"), ("6", "one_value")}
    assert found.findings[0].evidence == {"batches": 1, "first": 3}
    assert diagnose(model.eval(), data).findings == ()


def test_too_few_batches_are_told_with_the_weight_of_the_start():
    model = nets.train(nets.plain(), steps=10)
    found = diagnose(model, nets.batches())
    assert kinds(found) == {("1", "stale")}
    assert found.findings[0].evidence["start_weight"] == pytest.approx(0.9**10)


@pytest.mark.parametrize(
    ("run", "useless"),
    [
        (lambda conv, norm, x: norm(conv(x)), True),
        (lambda conv, norm, x: norm(conv(x)) + norm(conv(2 * x)), True),
        (lambda conv, norm, x: [norm(y := conv(x)), norm(y)], True),
        (lambda conv, norm, x: norm(conv(x)[:, : conv(x).shape[1]].relu_()), False),
        (lambda conv, norm, x: norm(y := conv(x)) + y, False),  # as with pre-activation
        (lambda conv, norm, x: torch.cat([y := conv(x), norm(y)]), False),
        (lambda conv, norm, x: norm(conv(x)).mean() + conv(x).relu().mean(), False),
    ],
)
def test_a_bias_is_useless_where_batch_norm_cancels_it_in_each_use(run, useless):
    conv, norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
    model = Of(lambda m, x: run(*m, x), conv, norm)
    recalibrate(model, nets.batches())
    expected = {("layers.1", "useless_bias")} if useless else set()
    assert kinds(diagnose(model, nets.batches())) == expected


def test_the_bias_of_a_linear_layer_goes_along_the_last_axis():
    model = Of(lambda m, x: m[1](m[0](x)), nn.Linear(6, 5), nn.BatchNorm1d(4))
    x = torch.randn(64, 4, 6)
    recalibrate(model, [x])
    assert diagnose(model, [x]).findings == ()
    model.layers[1] = nn.BatchNorm1d(5)
    recalibrate(model, [x[:, 0]])
    assert kinds(diagnose(model, [x[:, 0]])) == {("layers.1", "useless_bias")}


def two_ranks(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, data = trained(), nets.batches()
    wrapped = nn.parallel.DistributedDataParallel(model)
    # with another number of batches on each rank
    found = [kinds(diagnose(wrapped, data[rank:])) | kinds(diagnose(model, data))]
    recalibrate(wrapped, data[rank:][:1])
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    if rank:
        model[4].running_mean[0] += 1e-3
    found.append(kinds(diagnose(model, data[rank:])))
    if rank:
        model[1].weight.data[0] += 1e-3
    finding = diagnose(model, data).findings[0]
    with open(f"{folder}/{rank}", "w") as file:
        json.dump([*map(list, found), finding.layer, finding.evidence], file)
    dist.destroy_process_group()


def test_replicas_that_differ(tmp_path):
    trained()
    mp.start_processes(two_ranks, (str(tmp_path),), 2, start_method="fork")
    for rank in range(2):
        same, buffers, layer, evidence = json.loads((tmp_path / str(rank)).read_text())
        assert same == []
        assert buffers == [["4", "replicas"]]
        assert layer == "1"
        assert evidence == {"parameters": 1, "buffers": 0, "ranks": 2}


def test_rounding_errors_of_a_layer_without_output_are_not_stale():
    layer = nn.BatchNorm2d(3)
    x = 1e-12 * torch.randn(64, 3, 4, 4) + 1
    recalibrate(layer, [x])
    layer.running_mean += 1e-7  # a last bit of the mean, and 30,000 deviations of 1e-12
    found = diagnose(nn.Sequential(nn.Identity(), layer), [x])
    assert "stale" not in {f.kind for f in found.findings}
    layer.running_mean += 0.1
    found = diagnose(nn.Sequential(nn.Identity(), layer), [x])
    assert "stale" in {f.kind for f in found.findings}


def test_findings_are_ranked():
    model = healthy()
    for fault in (useless_bias, momentum, stale_mean, nan_in_buffers):
        fault(model)
    model[1].running_mean += 10 * model[1].running_var.sqrt()
    found = [(f.layer, f.kind) for f in diagnose(model, nets.batches()).findings]
    assert found == [
        ("4", "nonfinite"),
        ("1", "stale"),
        ("4", "stale"),
        ("4", "momentum"),
        ("4", "useless_bias"),
    ]


# --- The numbers ----------------------------------------------------------------------------------


def test_gap_and_effect_are_what_they_say():
    torch.manual_seed(0)
    x = torch.randn(40, 3, 5, 5, dtype=torch.float64) * 2 + 1
    layer = nn.BatchNorm2d(3, dtype=torch.float64, eps=0.1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1, -2]))
        layer.running_mean.copy_(torch.tensor([0.0, 1, 2]))
        layer.running_var.copy_(torch.tensor([1.0, 2, 9]))
    (found,) = diagnose(nn.Sequential(layer), x.split(7)).layers
    data = copy.deepcopy(layer).train()(x).detach()
    running = layer.eval()(x).detach()
    assert found.effect == pytest.approx(float((running - data).norm() / data.norm()), rel=1e-9)
    deviation = (x.var((0, 2, 3), correction=0) + 0.1).sqrt()
    gap = (layer.running_mean - x.mean((0, 2, 3))) / deviation
    assert found.mean_gap == pytest.approx(float(gap.square().mean().sqrt()), rel=1e-9)
    ratio = ((layer.running_var + 0.1).sqrt() / deviation).median()
    assert found.std_ratio == pytest.approx(float(ratio), rel=1e-9)
    assert found.shape == (7, 3, 5, 5) and found.values == 175


@pytest.mark.parametrize("data", ["digits", "photo_patches"])
def test_the_effective_number_predicts_the_spread_of_the_batch_means(data):
    x = nets.images(data)[0]
    channels, size = x.shape[1], 8
    model = nn.Sequential(nn.BatchNorm2d(channels))
    (found,) = diagnose(model, x.split(size)).layers
    draws = torch.stack(
        [x[torch.randint(len(x), (size,))].mean((0, 2, 3)) for _ in range(2000)]
    ).double()
    actual = (x.double().var((0, 2, 3)) / draws.var(0)).median()
    assert found.effective == pytest.approx(float(actual), rel=0.1)
    assert found.values == size * x[0, 0].numel()
    # a photograph is bright or dark; digits, all alike in ink, have means that hardly differ
    assert (found.effective > found.values) is (data == "digits")


def test_independent_values_are_all_worth_one():
    x = torch.randn(512, 4, 6, 6)
    (found,) = diagnose(nn.Sequential(nn.BatchNorm2d(4)), x.split(64)).layers
    assert found.effective == pytest.approx(found.values, rel=0.15)


@pytest.mark.parametrize("shape", [(50, 3), (50, 3, 1), (50, 3, 4), (50, 3, 4, 5), (9, 3, 2, 3, 4)])
@pytest.mark.parametrize("offset", [0, 1, 100, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums(shape, offset, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) + offset).to(dtype)
    values, samples = sums(x)
    rows = x.double().transpose(0, 1).flatten(1)
    exact = rows.var(1, correction=0)
    torch.testing.assert_close(values.mean, rows.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values.var(), exact, rtol=2e-3, atol=0)
    means = x.double().flatten(2).mean(2) if x.dim() > 2 else x.double()
    assert (values.count, samples.count) == (rows.shape[1], len(x))
    torch.testing.assert_close(samples.var(), means.var(0, correction=0), rtol=2e-3, atol=1e-8)


def test_what_one_layer_does_wrong_is_not_laid_at_the_next_ones_door():
    model = healthy("resnet")
    model[1].running_var *= 1e4
    found = diagnose(model, nets.batches())
    assert kinds(found) == {("1", "stale")}


# --- Nothing is disturbed, nothing is kept --------------------------------------------------------


def state(model):
    return (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [id(t) for t in [*model.parameters(), *model.buffers()]],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    )


def same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a[2], b[2], rtol=0, atol=0)
    return a[1] == b[1] and a[3:] == b[3:]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("fault", [nan_in_buffers, eval_in_training, training_in_eval])
def test_everything_is_as_it_was(fault, raises):
    model = healthy()
    fault(model)
    model(nets.batches()[0][0]).sum().backward()
    model.register_buffer("steps", torch.zeros(3))
    model.register_forward_pre_hook(lambda model, _: print(model.steps.add_(1)))
    data = nets.batches()

    def loader():
        for x, y in data:
            random.random(), np.random.rand()  # noqa: NPY002
            yield x + 0 * torch.rand_like(x), y
        if raises:
            yield torch.zeros(2, 2, 2, 2), None

    batches, before = loader(), state(model)
    if not raises:  # a DataLoader shuffles with a generator of its own
        shuffler = torch.Generator().manual_seed(3)
        order = shuffler.get_state()
        rows = list(zip(*data[0], strict=True))
        diagnose(model, torch.utils.data.DataLoader(rows, 32, True, generator=shuffler))
        assert torch.equal(shuffler.get_state(), order)
    if raises:
        with pytest.raises(RuntimeError, match="expected input"):
            diagnose(model, batches)
    else:
        diagnose(model, batches)
    assert same(before, state(model))


class Own(nn.Module):
    """A batch norm of one's own, which moves its buffers in either mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean, self.var, training=True)


def test_buffers_that_move_without_a_new_version_come_back():
    model = healthy()
    model.insert(2, Own())
    version = model[2].mean._version
    with torch.no_grad():
        model(nets.batches()[0][0])
    assert model[2].mean._version == version and bool(model[2].mean.any())  # torch counts none
    before = state(model)
    diagnose(model, nets.batches())
    assert same(before, state(model))


def test_a_model_made_in_inference_mode():
    x = torch.randn(64, 1, 4, 4)
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm2d(1))
    assert kinds(diagnose(model, x)) == {("0", "never_trained")}
    recalibrate(model, x)
    assert diagnose(model, x).findings == ()


def test_layers_without_buffers_get_none():
    model = nets.plain(track_running_stats=False)
    before = state(model)
    diagnose(model, nets.batches())
    assert same(before, state(model)) and model[1].running_mean is None


def test_the_states_are_told_apart():
    model = healthy()
    before = state(model)
    model[4].weight.data[0] += 1e-6
    with pytest.raises(AssertionError):
        same(before, state(model))


def test_activations_are_not_kept():
    model, alive = healthy(), []
    model[4].register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))

    def loader():
        for batch in nets.batches(count=6):
            assert not any(ref() is not None for ref in alive)
            yield batch

    diagnose(model, loader())
    assert len(alive) == 6


def test_batches_of_every_form():
    model, (x, y) = healthy(), nets.batches()[0]
    expected = diagnose(model, [x]).layers
    for batches in (x, [x], [(x, y)], [[x, y]], iter([x]), {"input": x}, [{"input": x}]):
        assert diagnose(model, batches).layers == expected
    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=64)
    assert diagnose(model, loader).layers == expected


def test_in_inference_mode_and_under_autocast():
    model, data = healthy(), nets.batches()
    stale_mean(model)
    expected = diagnose(model, data)
    with torch.inference_mode():
        assert diagnose(model, data).layers == expected.layers
    with torch.autocast("cpu", torch.bfloat16):
        found = diagnose(model, data)
    assert kinds(found) == {("4", "stale")}
    assert found.layers[1].effect == pytest.approx(expected.layers[1].effect, rel=0.02)


@pytest.mark.parametrize(
    ("model", "batches", "error", "said"),
    [
        ("net", [], TypeError, "expected a torch.nn.Module, got str"),
        (nn.ReLU(), [], ValueError, "batch norms, got ReLU with none"),
        (nn.BatchNorm1d(2), [], ValueError, "at least one batch, got none"),
        (nn.BatchNorm1d(2), [3], TypeError, "got builtins.int"),
        (nn.BatchNorm1d(3, affine=False), torch.zeros(2, 1), RuntimeError, "1 elements not 3"),
    ],
)
def test_bad_input_is_named(model, batches, error, said):
    with pytest.raises(error, match=re.escape(said)):
        diagnose(model, batches)


# --- How it prints --------------------------------------------------------------------------------


def test_as_text():
    model = healthy()
    stale_mean(model)
    found = diagnose(model, nets.batches())
    text = str(found)
    assert text.startswith("1 finding in 2 batch norms, 4 batches\n")
    assert re.search(r"^4 +stale +effect [\d.]+$", text, re.MULTILINE)
    assert re.search(r"^stale: .* Chapter:\s+Running\s+statistics\.$", text, re.M | re.S)
    assert re.search(r"^1 +4096 +\d+ +[\d.]+ +[\d.]+ +[\d.]+$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 76
    long = found.findings[0]._replace(layer=90 * "x", evidence={"bias": 90 * "x"})
    text = str(diagnosis.Diagnosis(found.layers, (long,), 4))
    assert max(map(len, text.splitlines())) <= 76
    healthy_text = repr(diagnose(healthy(), nets.batches()))
    assert healthy_text.startswith("no findings in 2 batch norms, 4 batches\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (3, "3"),
        (0.999, "0.999"),
        (0.0, "0.0"),
        (0.12345678, "0.12"),
        (2.9e-8, "<0.001"),
        (1.96123, "2.0"),
        (16437.123, "16000"),
        (3.14159e7, "3.1e+07"),
        (float("inf"), "inf"),
        ("3.bias", "3.bias"),
    ],
)
def test_numbers_are_short(value, text):
    assert diagnosis.report._number(value) == text


def test_many_layers_make_few_lines():
    found = diagnose(nets.resnet(bottleneck=True), nets.batches(count=1))
    text = str(found)
    assert "and 8 more  never_trained" in text and "and 1 layers with less effect" in text
    assert len(text.splitlines()) < 25


def test_as_html():
    model = healthy()
    stale_mean(model)
    found = diagnose(model, nets.batches())
    name = "<img src=x>"
    layers = tuple(row._replace(name=name) for row in found.layers)
    html = diagnosis.Diagnosis(layers, found.findings, 4)._repr_html_()
    assert html.count("<table") == 2 and html.count("</table>") == 2
    assert name not in html and "&lt;img src=x&gt;" in html
    assert '<th scope="col">effect</th>' in html


def test_progress_is_shown_on_long_work_alone(capsys, monkeypatch):
    diagnose(healthy(), nets.batches())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(diagnosis, "_PATIENCE", -1.0)
    monkeypatch.setattr(diagnosis, "_STEP", -1.0)
    diagnose(healthy(), nets.batches())
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("\rdiagnose: batch 1 of 4, 0 s") and err.endswith("\n")


def test_every_kind_is_documented_and_has_a_test():
    text = diagnosis.diagnose.__doc__
    source = Path(__file__).read_text(encoding="utf-8")
    for kind in KINDS:
        assert f"``{kind}``" in text
        assert f'"{kind}"' in source
    assert sys.modules["bnlib.diagnosis"] is diagnosis
