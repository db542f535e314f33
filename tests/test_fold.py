"""Folding: equal to the original to rounding wherever it folds, and it folds only there."""

from __future__ import annotations

import copy
import operator
import pickle
import random
import re
import threading
import types
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune

from bnlib.fold import FoldedBatchNorm, fold_batch_norm, fold_conv_bn, fold_linear_bn
from bnlib.nn import convert_batch_norm

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

# float64: the fold rounds every weight once, the convolution reassociates its sums; both are
# a few ulp (2e-16) of values of order 1. float32: the same at 6e-8, through up to ten layers.
RTOL = {torch.float64: 1e-10, torch.float32: 2e-4}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(model: nn.Module) -> nn.Module:
    """Running statistics and parameters as training could leave them, awkward ones included."""
    for bn in model.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm) and bn.running_mean is not None:
            with torch.no_grad():
                bn.running_mean.normal_(0, 2)
                bn.running_var.exponential_().add_(0.05)
                if bn.affine:
                    bn.weight.normal_(0, 1.5)  # half of them negative
                    bn.bias.normal_()
    return model.eval()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape and got.dtype == want.dtype
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-300)).item()


def check_model(model: nn.Module, *inputs: torch.Tensor, dtype=torch.float64, also=()):
    """Fold, compare, make sure that the original was left alone; return the report.

    ``also`` are functions of a model and its inputs whose values folding must not change either.
    """
    model = randomize(model).to(dtype)
    inputs = tuple(x.to(dtype) for x in inputs)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    after = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for run in (type(model).__call__, *also, type(model).__call__):
            want = run(model, *inputs)
            assert error(run(folded, *inputs), want) <= RTOL[dtype]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    report = folded.fold_report
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert report.folded.keys() | report.kept.keys() == norms
    assert not report.folded.keys() & report.kept.keys()
    left = {n for n, m in folded.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert left == set(report.kept)
    return report


# --- one pair


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_convolution(dims, groups, bias, affine, transposed):
    kind = (TRANSPOSED if transposed else CONVS)[dims]
    conv = kind(6, 12, 3, stride=2, padding=1, dilation=2, groups=groups, bias=bias)
    pair = randomize(nn.Sequential(conv, NORMS[dims](12, affine=affine, eps=1e-3))).double()
    x = torch.randn(3, 6, *[7] * dims, dtype=torch.float64)
    folded = fold_conv_bn(pair[0], pair[1])
    assert type(folded) is kind and folded.bias is not None
    assert error(folded(x), pair(x)) <= RTOL[torch.float64]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same", "valid"])
def test_every_padding_inside_the_convolution(mode, padding):
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, groups=2)
    pair = randomize(nn.Sequential(conv, nn.BatchNorm2d(6))).double()
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    assert error(fold_conv_bn(pair[0], pair[1])(x), pair(x)) <= RTOL[torch.float64]


@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 4),
    in_per_group=st.integers(1, 3),
    out_per_group=st.integers(1, 3),
    kernel=st.integers(1, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_grouping(dims, groups, in_per_group, out_per_group, kernel, transposed, seed):
    torch.manual_seed(seed)
    channels = groups * in_per_group, groups * out_per_group
    conv = (TRANSPOSED if transposed else CONVS)[dims](*channels, kernel, groups=groups)
    pair = randomize(nn.Sequential(conv, NORMS[dims](channels[1]))).double()
    x = torch.randn(2, channels[0], *[4] * dims, dtype=torch.float64)
    assert error(fold_conv_bn(pair[0], pair[1])(x), pair(x)) <= RTOL[torch.float64]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_linear(bias, affine):
    pair = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7, affine=affine))
    randomize(pair).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    folded = fold_linear_bn(pair[0], pair[1])
    assert type(folded) is nn.Linear
    assert error(folded(x), pair(x)) <= RTOL[torch.float64]


def test_agrees_with_torch_where_torch_can():
    conv, bn = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
    randomize(nn.ModuleList([conv, bn])).double()
    theirs, ours = fusion.fuse_conv_bn_eval(conv, bn), fold_conv_bn(conv, bn)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-14, atol=1e-14)


def test_tiny_and_zero_variance():
    pair = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    pair[1].running_var.copy_(torch.tensor([0.0, 1e-30, 1e-12, 1e12]))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    got, want = fold_conv_bn(pair[0], pair[1])(x), pair(x)
    for channel in range(4):  # each relative to itself: they differ by eight orders of magnitude
        assert error(got[:, channel], want[:, channel]) <= RTOL[torch.float64]


def test_computes_in_float64_and_rounds_once():
    conv, bn = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)
    randomize(nn.ModuleList([conv, bn]))
    exact = fold_conv_bn(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
    folded = fold_conv_bn(conv, bn)
    assert folded.weight.dtype == folded.bias.dtype == torch.float32
    assert torch.equal(folded.weight, exact.weight.float())
    assert torch.equal(folded.bias, exact.bias.float())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_mixed_dtypes_keep_the_layer_s(half):
    pair = randomize(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    conv = copy.deepcopy(pair[0]).to(half)
    folded = fold_conv_bn(conv, pair[1])
    assert folded.weight.dtype == folded.bias.dtype == half
    # Both round: the weights to half the spacing of the type, then the outputs.
    x = torch.randn(2, 3, 6, 6).to(half)
    want = pair[1](conv(x).float())
    assert error(folded(x).float(), want) <= 8 * torch.finfo(half).eps


def test_requires_grad_mode_format_hooks_and_device_follow_the_layer():
    conv = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
    conv.requires_grad_(False)
    bn = nn.BatchNorm2d(4).eval()
    folded = fold_conv_bn(conv, bn)
    assert not folded.weight.requires_grad and not folded.bias.requires_grad
    assert folded.training
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    conv.requires_grad_(True).eval()
    folded = fold_conv_bn(conv, bn)
    assert folded.weight.requires_grad and folded.bias.requires_grad and not folded.training
    assert folded.weight.is_leaf and conv.bias is None
    assert repr(folded) == "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))"


def test_sync_batch_norm_is_foldable():
    conv, bn = nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4).eval()
    assert fold_conv_bn(conv, bn).bias is not None


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class StandardizedConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)
    module._forward_pre_hooks.clear()  # so that the message speaks of the weight
    return module


def patched(module):
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("conv", "bn", "message"),
    [
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), "training mode: call .eval()"),
        (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4, track_running_stats=False).eval(),
            "no running statistics",
        ),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3).eval(), "4 output channels, the batch norm 3"),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4).eval(), "BatchNorm1d does not take 4-D"),
        (nn.Conv1d(3, 4, 3), nn.BatchNorm2d(4).eval(), "BatchNorm2d does not take 3-D"),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm3d(4).eval(), "BatchNorm3d does not take 4-D"),
        (nn.LazyConv2d(4, 3), nn.BatchNorm2d(4).eval(), "LazyConv2d is lazy"),
        (nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d().eval(), "LazyBatchNorm2d is lazy"),
        (nn.Conv2d(3, 4, 3), NormAndReLU(4).eval(), "NormAndReLU has a forward of its own"),
        (StandardizedConv(3, 4, 3), nn.BatchNorm2d(4).eval(), "StandardizedConv has a forward"),
        (patched(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4).eval(), "Conv2d has a forward of its own"),
        (hooked(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4).eval(), "Conv2d has hooks"),
        (nn.Conv2d(3, 4, 3), hooked(nn.BatchNorm2d(4)).eval(), "BatchNorm2d has hooks"),
        (pruned(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4).eval(), "weight is computed"),
        (
            parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            nn.BatchNorm2d(4).eval(),
            "weight is computed",
        ),
    ],
)
def test_pairs_that_are_refused(conv, bn, message):
    with pytest.raises(ValueError, match=r"cannot fold .* into .*: ") as raised:
        fold_conv_bn(conv, bn)
    assert message in str(raised.value)


def test_overflow_of_the_layer_s_dtype_is_refused():
    conv, bn = nn.Conv2d(3, 4, 3).half(), nn.BatchNorm2d(4).eval()
    bn.running_var.zero_()
    bn.weight.data.fill_(1e4)  # times 1/sqrt(1e-5) = 316: 3e6
    with pytest.raises(ValueError, match=r"folded weight overflows torch\.float16"):
        fold_conv_bn(conv, bn)


def test_wrong_types():
    conv, linear, bn = nn.Conv2d(3, 4, 3), nn.Linear(3, 4), nn.BatchNorm2d(4).eval()
    with pytest.raises(TypeError, match=r"expected a convolution of torch\.nn, got Linear"):
        fold_conv_bn(linear, bn)
    with pytest.raises(TypeError, match=r"expected torch\.nn\.Linear, got Conv2d"):
        fold_linear_bn(conv, bn)
    with pytest.raises(TypeError, match=r"expected a batch norm .* got InstanceNorm2d"):
        fold_conv_bn(conv, nn.InstanceNorm2d(4))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        fold_batch_norm("model")
    with pytest.raises(ValueError, match="BatchNorm2d does not take 2-D"):
        fold_linear_bn(linear, bn)


# --- whole models


class ResidualBlock(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        ResidualBlock(8, 8, 1),
        ResidualBlock(8, 16, 2),
        ResidualBlock(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def mobilenet():
    """Inverted residuals: 1x1, depthwise, 1x1, each with its batch norm."""

    class Inverted(nn.Module):
        def __init__(self, channels, out, stride):
            super().__init__()
            wide = 4 * channels
            self.body = nn.Sequential(
                nn.Conv2d(channels, wide, 1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(),
                nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(),
                nn.Conv2d(wide, out, 1, bias=False),
                nn.BatchNorm2d(out),
            )
            self.skips = stride == 1 and channels == out

        def forward(self, x):
            return x + self.body(x) if self.skips else self.body(x)

    return nn.Sequential(Inverted(3, 8, 2), Inverted(8, 8, 1), Inverted(8, 12, 2), nn.Flatten(1))


class DenseNet(nn.Module):
    """Pre-activation: BN, ReLU, conv on everything before, as Huang et al. (2017) have it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.bn = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.stem(x)
        for bn, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(bn(x)))], 1)
        return self.head(F.relu(self.bn(x)).mean((2, 3)))


class UNet(nn.Module):
    """Down and up again, by a grouped transposed convolution."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1, groups=4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.leave = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        skip = self.enter(x)
        return self.leave(torch.cat([skip, self.up(self.down(skip))], 1))


def mlp():
    return nn.Sequential(
        nn.Linear(12, 20, bias=False),
        nn.BatchNorm1d(20),
        nn.Tanh(),
        nn.Dropout(),
        nn.Linear(20, 20),
        nn.BatchNorm1d(20, affine=False),
        nn.ReLU(),
        nn.Linear(20, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("make", "shape", "folded"),
    [(resnet, (2, 3, 12, 12), 8), (mobilenet, (2, 3, 12, 12), 9), (UNet, (2, 3, 8, 8), 3)],
)
def test_architectures_that_fold_completely(make, shape, folded, dtype):
    report = check_model(make(), torch.randn(shape), dtype=dtype)
    assert len(report.folded) == folded and not report.kept


@pytest.mark.parametrize("sync", [False, True])
def test_converted_models(sync):
    """The README's lines: bnlib's modules fold as torch's do, where they do nothing more."""
    report = check_model(convert_batch_norm(resnet(), sync), torch.randn(2, 3, 12, 12))
    assert len(report.folded) == 8 and not report.kept

    class Fused(ResidualBlock):
        def forward(self, x):
            y = self.bn1(self.conv1(x), activation="relu")
            return self.bn2(self.conv2(y), x, "relu")

    report = check_model(convert_batch_norm(Fused(3, 3, 1), sync), torch.randn(2, 3, 5, 5))
    assert report.folded == {"bn1": "conv1", "bn2": "conv2"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mlp(dtype):
    assert check_model(mlp(), torch.randn(6, 12), dtype=dtype).folded == {"1": "0", "5": "4"}


def test_densenet_keeps_all_but_what_is_exact():
    report = check_model(DenseNet(), torch.randn(2, 3, 8, 8))
    assert not report.folded
    assert report.kept["norms.0"] == "the output of 'stem' has 2 users; its output goes to relu"
    assert "its input comes from cat" in report.kept["norms.1"]


class TwoUsers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.after = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return y + z + self.after(z)


class Twice(nn.Module):
    """One convolution and one batch norm, each called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.again = self.conv
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.again(self.bn(self.bn(self.conv(x)))))


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight)


class ReadsGamma(ReadsWeight):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.weight.sum()


class WritesBetween(nn.Module):
    """With the batch norm folded into ``after``, that would read what has become of x."""

    def __init__(self, write):
        super().__init__()
        self.bn, self.after, self.write = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), write

    def forward(self, x):
        x = x + 1
        z = self.bn(x)
        self.write(x)
        return self.after(z) + x


def padded_later():
    """As networks are dilated: the padding is assigned when the layer exists already."""
    conv = nn.Conv2d(3, 4, 3)
    conv.dilation = conv.padding = (2, 2)
    return nn.Sequential(nn.BatchNorm2d(3), conv)


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (WritesBetween(lambda x: x.mul_(2)), {"bn": "before 'after' runs, mul_ may write into"}),
        (WritesBetween(lambda x: F.relu(x, inplace=True)), {"bn": "relu may write"}),
        # += is recorded as a harmless addition, which it is not.
        (WritesBetween(lambda x: operator.iadd(x, 1)), {"bn": "add may write"}),
        (WritesBetween(nn.ReLU(inplace=True)), {"bn": "'write' may write"}),
        (padded_later(), {"0": "zeros that the convolution pads with"}),
        (TwoUsers(), {"bn": "the output of 'conv' has 2 users; its output has 2 users"}),
        (Twice(), {"bn": "used 2 times", "bn2": "comes from 'conv', which is used 2 times"}),
        (ReadsWeight(), {"bn": "forward records other calls when it is folded"}),
        (ReadsGamma(), {"bn": "no attribute 'weight'"}),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()), {"1": "comes from '0'"}),
        (nn.Sequential(nn.BatchNorm2d(3)), {"0": "from the model's input; its output goes to the"}),
        (
            nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
            {"0": "zeros that the convolution pads with"},
        ),
        (
            nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)),
            {"0": "border of a transposed convolution"},
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), NormAndReLU(4)),
            {"1": "NormAndReLU has a forward of its own"},
        ),
        (nn.Sequential(hooked(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))), {"0.1": ""}),
        (nn.Sequential(nn.Conv2d(3, 3, 1), hooked(nn.BatchNorm2d(3))), {"1": "has hooks"}),
        (nn.Sequential(hooked(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), {"1": "has hooks"}),
    ],
)
def test_what_is_kept_and_why(model, reasons):
    report = check_model(model, torch.randn(2, 3, 5, 5))
    assert report.kept.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.kept[name]


def test_a_module_that_an_untraced_one_also_calls_is_kept():
    conv = nn.Conv2d(3, 3, 1)
    inner = hooked(nn.Sequential(conv))
    report = check_model(nn.Sequential(inner, conv, nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4))
    assert "which is used 2 times" in report.kept["2"]


def test_batch_norm_in_training_mode_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].train()
    assert "in training mode" in fold_batch_norm(model).fold_report.kept["1"]


@pytest.mark.parametrize(
    ("model", "shape", "folded"),
    [
        (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False)), (4, 5), {"0": "1"}),
        (
            nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3), nn.BatchNorm1d(3)),
            (4, 5),
            {"0": "1", "2": "1"},
        ),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, groups=2)), (2, 4, 9), {"0": "1"}),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding="valid")), None, {"0": "1"}),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, padding="same")), None, {"0": "1"}),
        (
            nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
            None,
            {"0": "1"},
        ),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), None, None),
    ],
)
def test_batch_norm_before_a_layer_that_does_not_pad_with_zeros(model, shape, folded):
    report = check_model(model, torch.randn(shape or (2, 3, 7, 7)))
    assert report.folded == (folded or {"0": "1", "2": "1"}) and not report.kept


def test_the_padded_zeros_are_why():
    """Folding forwards into a padded convolution is wrong on the border and nowhere else."""
    bn, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
    model = randomize(nn.Sequential(bn, conv)).double()
    unpadded = nn.Conv2d(3, 4, 3)
    unpadded.load_state_dict(conv.state_dict())
    wrong = fold_batch_norm(nn.Sequential(bn, unpadded).double().eval())[1]
    wrong.padding, wrong._reversed_padding_repeated_twice = (1, 1), [1, 1, 1, 1]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    difference = (wrong(x) - model(x)).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-12
    border = torch.ones(8, 8, dtype=bool)
    border[1:-1, 1:-1] = False
    assert difference.amax((0, 1))[border].min() > 1e-3
    assert difference.max() > 0.5


def test_returned_model_is_the_same_class_and_picklable():
    model = randomize(resnet())
    folded = fold_batch_norm(model)
    assert type(folded) is type(model) and not folded.training
    assert isinstance(folded[1], nn.Identity) and isinstance(model[1], nn.BatchNorm2d)
    x = torch.randn(1, 3, 8, 8)
    again = pickle.loads(pickle.dumps(copy.deepcopy(folded)))
    assert torch.equal(again(x), folded(x)) and again.fold_report == folded.fold_report
    twice = fold_batch_norm(folded)
    assert twice.fold_report == folded.fold_report and torch.equal(twice(x), folded(x))


def test_rank_guard():
    """(N, L, C): the linear layer's channels are the last axis, the batch norm's are axis 1."""
    model = randomize(mlp())
    folded = fold_batch_norm(model)
    x = torch.randn(2, 20, 12)
    assert model(x).shape == (2, 20, 3)  # runs, normalising the 20 positions
    with pytest.raises(ValueError, match=r"expected a 2-D input, got shape \[2, 20, 20\]"):
        folded(x)
    pickle.loads(pickle.dumps(folded))(x[0])


def test_root_hooks_and_optional_arguments():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x, scale=None, *, twice=False):
            y = self.bn(self.conv(x))
            if scale is not None:
                y = y * scale
            return y + y if twice else y

    model = randomize(hooked(Optional())).double()
    folded = fold_batch_norm(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert folded.fold_report.folded == {"bn": "conv"}
    assert error(folded(x, 2.0, twice=True), model(x, 2.0, twice=True)) <= RTOL[torch.float64]


def test_tracing_runs_on_a_copy():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), None
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.last = self.bn(self.conv(x))
            self.calls.add_(1)
            return self.last

    model = Remembers().eval()
    folded = fold_batch_norm(model)
    assert model.last is folded.last is None
    assert model.calls == folded.calls == 0


def test_control_flow_inside_modules_that_hold_no_layer():
    class Clip(nn.Module):
        def forward(self, x):
            return x.clamp(max=1.0) if x.max() > 1 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Clip())
    assert check_model(model, torch.randn(2, 3, 4, 4)).folded == {"1": "0"}


def test_models_that_cannot_be_folded():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"torch.fx cannot trace Branches \(.*fold_conv_bn"):
        fold_batch_norm(Branches().eval())
    with pytest.raises(ValueError, match=r"got Sequential in training mode.*call model.eval\(\)"):
        fold_batch_norm(mlp())


def test_folded_model_traces_exports_and_scripts():
    for model, x in ((resnet(), torch.randn(2, 3, 8, 8)), (mlp(), torch.randn(2, 12))):
        folded = fold_batch_norm(randomize(model))
        with torch.no_grad():
            want = folded(x)
            assert torch.equal(torch.fx.symbolic_trace(folded)(x), want)
            assert torch.equal(torch.export.export(folded, (x,)).module()(x), want)


# --- uses that the graph of forward does not show


class Pair(nn.Module):
    """A convolution and a batch norm that fold, unless a subclass does something with them."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.kept: list = []

    def forward(self, x):
        return self.bn(self.conv(x))


class TiedAtTheRoot(nn.Module):
    """The first name of the weight is not the convolution's."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv.weight = self.w

    def forward(self, x):
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight)


class TiedCoders(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.bn = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.decoder = nn.ConvTranspose2d(3, 3, 1, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.bn(self.encoder(x)))


class TiedGamma(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.bn2.weight = self.bn.weight

    def forward(self, x):
        return self.bn2(self.conv2(self.bn(self.conv(x)))) * self.bn2.weight.sum()


class TiedStatistics(TiedGamma):
    def __init__(self):
        super().__init__()
        self.bn2.weight = nn.Parameter(torch.ones(3))
        self.double()  # which would part them
        self.bn2.running_var = self.bn.running_var

    def forward(self, x):
        return self.bn2(self.conv2(self.bn(self.conv(x))))


class TiedView(Pair):
    """A buffer that is part of the weight."""

    def __init__(self):
        super().__init__()
        self.conv.double()
        self.register_buffer("part", self.conv.weight.detach()[1:, 0])

    def forward(self, x):
        return super().forward(x) * self.part.sum()


class Features(Pair):
    def features(self, x):
        return self.conv(x)


class FeaturesWithoutGradient(Pair):
    @torch.no_grad()
    def features(self, x):
        return self.conv(x)


class FeaturesByName(Pair):
    def features(self, x):
        return getattr(self, "conv")(x)  # noqa: B009


class FeaturesInside(Pair):
    def features(self, x):
        return sum(run(x) for run in [lambda v: self.conv(v)])


class FeaturesFromAList(Pair):
    def __init__(self):
        super().__init__()
        self.steps = [self.conv]

    def features(self, x):
        return self.steps[0](x)


class FeaturesByABoundMethod(Pair):
    def __init__(self):
        super().__init__()
        self.step = self.conv.forward

    def features(self, x):
        return self.step(x)


class WarmsUp(Pair):
    def forward(self, x):
        self.kept.append(None)
        y = self.conv(x)
        return self.bn(y) if len(self.kept) == 1 else y


class FeaturesThatForwardRuns(Features):
    def forward(self, x):
        return self.bn(self.features(x))


class NormAlone(Pair):
    def norm(self, x):
        return self.bn(x)


class PropertyOfWeight(Pair):
    @property
    def size(self):
        return self.conv.weight.norm()


class FeaturesOfPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.bn = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.bn(self.body(x))


class FeaturesOfSlice(nn.Sequential):
    def features(self, x):
        for layer in self[:1]:
            x = layer(x)
        return x


class FeaturesTwoDown(nn.Sequential):
    def features(self, x):
        return self.block.conv(x)


class Trains(Pair):
    def forward(self, x):
        self.bn.train()
        return super().forward(x)


class TrainsAndBack(Pair):
    def forward(self, x):
        self.bn.train()
        y = super().forward(x)
        self.bn.eval()
        return y


class Clips(Pair):
    def forward(self, x):
        for p in self.parameters():
            p.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class DoublesForTheCall(Pair):
    def forward(self, x):
        weight = self.conv._parameters["weight"].data
        weight.mul_(2)
        y = self.conv(x)
        weight.mul_(0.5)
        return self.bn(y)


class HooksForTheCall(Pair):
    def forward(self, x):
        seen = []
        handle = self.conv.register_forward_hook(lambda module, args, y: seen.append(y))
        y = super().forward(x)
        handle.remove()
        return y + sum(seen)


class CallsOtherwise(Pair):
    def __call__(self, x):
        return super().__call__(x) + self.conv(x)


class FeaturesOfTheOther(nn.Module):
    """Forward runs the method of one block, which says nothing of the other block's."""

    class Block(Features):
        def forward(self, x, split=False):
            return self.bn(self.features(x) if split else self.conv(x))

    def __init__(self):
        super().__init__()
        self.one, self.two = self.Block(), self.Block()

    def forward(self, x):
        return self.two(self.one(x, split=True))


class Stores(Pair):
    def forward(self, x):
        self.last = self.conv(x)
        return self.bn(self.last)


class StoresDeep(Pair):
    def forward(self, x):
        y = self.conv(x)
        self.kept.append({"conv": [y]})
        return self.bn(y)


class Reads(Pair):
    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        return super().forward(x) * self.read(self)


class Branches(Pair):
    """A module that is not traced, holding nothing that is registered, calls the convolution."""

    class Aside(nn.Module):
        def forward(self, x):
            return self.steps[0](x) if x.sum() > 0 else x

    def __init__(self):
        super().__init__()
        self.aside = self.Aside()
        self.aside.steps = [self.conv]

    def forward(self, x):
        return super().forward(x) + self.aside(x)


class Raw(Pair):
    def forward(self, x, raw=False):
        y = self.conv(x)
        return y if raw else self.bn(y)


class Scaled(Pair):
    def forward(self, x, scale=None):
        y = self.conv(x)
        return self.bn(y if scale is None else y * scale)


class ItsOwnResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), convert_batch_norm(nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y, y)


def other_forward(model):
    model.conv.forward = nn.Conv2d(3, 3, 1).double().forward
    return model


JIT = "ignore:`torch.jit.*` is deprecated:DeprecationWarning"
FEATURES = [lambda model, x: model.features(x)]
NONE: list = []
SHARED = "tensors are held by another module too"
METHOD = "the method 'features' of"


@pytest.mark.parametrize(
    ("model", "also", "reason"),
    [
        (TiedAtTheRoot(), NONE, SHARED),
        (TiedCoders(), NONE, SHARED),
        (TiedGamma(), NONE, SHARED),
        (TiedStatistics(), NONE, SHARED),
        (TiedView(), NONE, SHARED),
        (Features(), FEATURES, f"{METHOD} Features uses 'conv' too"),
        (FeaturesWithoutGradient(), FEATURES, METHOD),
        (FeaturesByName(), FEATURES, METHOD),
        (FeaturesInside(), FEATURES, METHOD),
        (FeaturesFromAList(), FEATURES, METHOD),
        (FeaturesByABoundMethod(), FEATURES, METHOD),
        (WarmsUp(), NONE, "in another call of forward it is"),
        (FeaturesOfPart(), FEATURES, METHOD),
        (FeaturesOfSlice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), FEATURES, METHOD),
        (FeaturesTwoDown(OrderedDict(block=Pair())), FEATURES, METHOD),
        (FeaturesThatForwardRuns(), FEATURES, "that forward runs calls only one"),
        (NormAlone(), [lambda model, x: model.norm(x)], "the method 'norm' of"),
        (PropertyOfWeight(), [lambda model, x: model.size], "the method 'size' of"),
        (FeaturesOfTheOther(), [lambda model, x: model.two.features(x)], "features"),
        (CallsOtherwise(), NONE, "the method '__call__' of"),
        (Trains(), NONE, "it is changed by forward"),
        (TrainsAndBack(), NONE, "it is changed by forward"),
        (Clips(), NONE, "it is changed by forward"),
        (DoublesForTheCall(), NONE, "'conv', which is changed by forward"),
        (HooksForTheCall(), NONE, "'conv', which is changed by forward"),
        (Stores(), [lambda model, x: model.last], "forward stores the output of 'conv'"),
        (StoresDeep(), [lambda model, x: model.kept[-1]["conv"][0]], "forward stores"),
        (Reads(lambda m: m.bn.eps), NONE, "no attribute 'eps'"),
        (Reads(lambda m: float(m.bn.running_var.sum())), NONE, "no attribute 'running_var'"),
        (Reads(lambda m: getattr(m, "b" + "n").momentum), NONE, "no attribute 'momentum'"),
        (Reads(lambda m: len(m.bn.state_dict())), NONE, "records other calls"),
        (Reads(lambda m: 1 + isinstance(m.bn, nn.BatchNorm2d)), NONE, "records other calls"),
        (Reads(lambda m: 1 + (type(m.bn) is nn.BatchNorm2d)), NONE, "records other calls"),
        (Reads(lambda m: m.state_dict()["conv.weight"].sum()), NONE, "records other calls"),
        (Reads(lambda m: m.conv._parameters["weight"].sum()), NONE, "records other calls"),
        (Reads(lambda m: sum(p.numel() for p in m.parameters())), NONE, "records other calls"),
        (Branches(), NONE, "which is used 2 times"),
        (Raw(), [lambda model, x: model(x, raw=True)], "in another call of forward it is"),
        (Scaled(), [lambda model, x: model(x, 2.0)], "its input comes from mul"),
        (ItsOwnResidual(), NONE, "it is called with (conv, conv)"),
        (other_forward(Pair()), NONE, "Conv2d has a forward of its own"),
    ],
)
def test_uses_that_forward_does_not_show(model, also, reason):
    report = check_model(model, torch.randn(2, 3, 4, 4), also=also)
    assert not report.folded
    assert all(reason in why for why in report.kept.values())


class Ordinary(nn.Module):
    """What models do beside forward, and what must not be taken for a use."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.decoder = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)})
        self.build()
        self.size = self.count()
        self._initialize_weights()

    def build(self):
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.head = nn.Sequential(self.conv, self.bn)

    def count(self):
        return self.head(torch.zeros(1, 3, 4, 4)).numel()

    def _initialize_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
        self.conv.bias.data.zero_()

    def init_weights(self):
        nn.init.ones_(self.conv.weight)
        nn.init.zeros_(self.head[-1].bias)

    def encode(self, x):
        return self.encoder(x)

    def freeze(self):
        self.bn.eval()
        for p in (*self.conv.parameters(), *self.bn.parameters()):
            p.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def __len__(self):
        return len(self.encoder)

    @property
    def depth(self):
        return len(self.encoder) + len(self.head)

    def forward(self, x, *, again=False, mask=None):
        first = next(self.parameters())
        x = self.encoder(x.to(first.device, self.conv.weight.dtype))
        for name, layer in self.decoder.items():
            x = layer(x) if name else x
        noise = 0 * torch.randn(1, dtype=x.dtype)
        x = self.head(x) + len(self.encoder) * self.conv.out_channels + noise
        if mask is not None:
            x = x * mask
        return x + x if again else x


def test_what_models_do_beside_forward_is_no_use():
    state = torch.get_rng_state()
    also = [lambda m, x: m.encode(x), lambda m, x: m(x, again=True), lambda m, x: m(x, mask=x)]
    report = check_model(Ordinary(), torch.randn(2, 3, 4, 4), also=also)
    assert report.folded == {"encoder.1": "encoder.0", "decoder.bn": "decoder.conv", "bn": "conv"}
    assert report.unseen == ()
    torch.set_rng_state(state)
    model = Ordinary().eval()
    state = torch.get_rng_state()
    fold_batch_norm(model)
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_followed_is_named():
    class Unseen(Pair):
        def first(self, x):
            return next(self.children())(x)

        def forward(self, x, mask=None, part="all"):
            return super().forward(x) if mask is None or mask.sum() > 0 else x

    report = check_model(hooked(Unseen()), torch.randn(2, 3, 4, 4))
    assert report.folded == {"bn": "conv"}
    assert report.unseen == (
        "forward with 'mask' given",
        "forward with another 'part'",
        "hooks of the model",
        "Unseen.first",
    )


def test_channels_are_counted_in_the_weights():
    """As after slimming a network by assigning smaller parameters."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(4))).double()
    model[0].weight = nn.Parameter(model[0].weight[:4].detach())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert error(fold_conv_bn(model[0], model[1])(x), model(x)) <= RTOL[torch.float64]


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision: buffers, and no batch norm of torch.nn."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: a subclass with a forward and modules of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, BatchNormAct2d, NormAndReLU])
def test_other_norms_beside_a_fold(norm):
    layers = nn.Conv2d(3, 3, 1), norm(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    assert check_model(nn.Sequential(*layers), torch.randn(2, 3, 4, 4)).folded == {"3": "2"}


def test_a_lazy_layer_stops_no_model():
    class Waits(Pair):
        def __init__(self):
            super().__init__()
            self.later = nn.LazyConv2d(3, 1)

    assert fold_batch_norm(Waits().eval()).fold_report.folded == {"bn": "conv"}


def test_checkpointed_and_generated_models_fold():
    class Checkpointed(Pair):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    for model in (Checkpointed(), torch.fx.symbolic_trace(Pair())):
        assert check_model(model, torch.randn(2, 3, 4, 4)).folded == {"bn": "conv"}


# --- models that cannot be copied, or are wrapped


def after_a_step(model):
    model(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    return model


def first_layer(change):
    layers = change(nn.Conv2d(3, 3, 1).double()), nn.ReLU(), *Pair().double().children()
    return nn.Sequential(*layers)


def uncopyable_attributes():
    model = nn.Sequential(nn.ReLU(), *Pair().double().children())
    model.group, model.outputs = (
        threading.Lock(),
        {"x": [model[1](torch.randn(1, 3, 2, 2).double())]},
    )
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: first_layer(nn.utils.weight_norm),
        lambda: after_a_step(first_layer(nn.utils.spectral_norm)),
        lambda: first_layer(lambda conv: prune.l1_unstructured(conv, "weight", 0.5)),
        uncopyable_attributes,
    ],
)
def test_what_cannot_be_copied_stops_no_model(make):
    model = randomize(make())
    with pytest.raises((RuntimeError, TypeError)):
        copy.deepcopy(model)
    folded = fold_batch_norm(model)
    assert len(folded.fold_report.folded) == 1 and not folded.fold_report.kept
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert error(folded(x), model(x)) <= RTOL[torch.float64]
    if hasattr(model, "outputs"):
        assert folded.group is model.group
        (there,), (here,) = folded.outputs["x"], model.outputs["x"]
        assert torch.equal(there, here) and not there.requires_grad and there is not here
        assert fold_conv_bn(model[1], model[2]).bias is not None


def test_layers_with_a_computed_weight_are_kept_beside_others():
    def computed(change):
        return nn.Sequential(*change(nn.Conv2d(3, 3, 1)), nn.ReLU(), *Pair().children())

    for change in (
        lambda conv: (prune.l1_unstructured(conv, "weight", 0.5), nn.BatchNorm2d(3)),
        lambda conv: (parametrizations.weight_norm(conv), nn.BatchNorm2d(3)),
        lambda conv: (nn.utils.spectral_norm(conv), nn.BatchNorm2d(3)),
    ):
        model = randomize(computed(change))
        folded = fold_batch_norm(model)
        assert folded.fold_report.folded == {"4": "3"}
        assert "is computed" in folded.fold_report.kept["1"]
        x = torch.randn(2, 3, 4, 4)
        assert error(folded(x), model(x)) <= RTOL[torch.float32]


def test_a_model_that_refuses_to_be_copied():
    class Refuses(Pair):
        def __deepcopy__(self, memo):
            raise RuntimeError("no")

    with pytest.raises(ValueError, match=r"Refuses cannot be copied \(no\)"):
        fold_batch_norm(Refuses().eval())


@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.jit.trace(model, torch.randn(1, 3, 2, 2)),
    ],
)
def test_wrapped_models(wrap):
    pair = randomize(Pair())
    with pytest.raises(ValueError, match=r"expected the model itself, got \w+, which wraps or com"):
        fold_batch_norm(wrap(pair))
    model = nn.Sequential(wrap(pair), *randomize(Pair()).children()).eval()
    folded = fold_batch_norm(model)
    assert folded.fold_report.folded == {"2": "1"}
    if not hasattr(model[0], "_orig_mod"):  # compiling takes seconds
        x = torch.randn(2, 3, 4, 4)
        assert error(folded(x), model(x)) <= RTOL[torch.float32]


def test_distributed_wrappers(tmp_path):
    dist = torch.distributed
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Pair()).eval()
        with pytest.raises(ValueError, match="got DistributedDataParallel, which wraps"):
            fold_batch_norm(model)
        own = convert_batch_norm(nn.Sequential(*Pair().children()), sync=True).eval()
        own[1].process_group = dist.new_group([0])
        assert fold_batch_norm(own).fold_report.folded == {"1": "0"}
    finally:
        dist.destroy_process_group()


def test_forward_set_on_the_instance():
    model = Pair().eval()
    model.forward = types.MethodType(lambda self, x: self.conv(x), model)
    with pytest.raises(ValueError, match="forward of this Pair was set on the instance"):
        fold_batch_norm(model)
    outer = nn.Sequential(model, *Pair().children())
    assert check_model(outer, torch.randn(2, 3, 4, 4)).folded == {"2": "1"}


def test_folded_again_and_inside_another_model():
    class Late(Pair):
        def __init__(self):
            super().__init__()
            self.late = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.late(super().forward(x))

    model = randomize(Late())
    model.late.train()
    once = fold_batch_norm(model)
    assert once.fold_report.folded == {"bn": "conv"} and "late" in once.fold_report.kept
    twice = fold_batch_norm(once.eval())
    assert twice.fold_report.folded == {"bn": "conv"}
    assert "comes from 'bn'" in twice.fold_report.kept["late"]
    outer = randomize(nn.Sequential(once, *Pair().children()))
    report = check_model(outer, torch.randn(2, 3, 4, 4))
    assert report.folded == {"0.late": "1", "2": "1"}


# --- numbers


@pytest.mark.parametrize("before", [False, True])
def test_underflow_of_the_layer_s_dtype_is_refused(before):
    """One channel of weights that a quiet slope makes subnormal, however large the others are."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(8, 8, 3).half(), nn.BatchNorm2d(8).eval()
    layers = (bn, conv) if before else (conv, bn)
    bn.running_var[1] = 1e4  # weights about 6e-4
    folded = fold_batch_norm(nn.Sequential(*layers).eval())
    assert folded.fold_report.folded
    bn.running_var[1] = 1e8  # 6e-6
    folded = fold_batch_norm(nn.Sequential(*layers).eval())
    assert "folded weight underflows torch.float16" in folded.fold_report.kept[str(1 - before)]
    # Why: folded all the same, the channel is off by several roundings of its largest value.
    wrong = (conv.weight.double()[1] * 1e-4).half().double() - conv.weight.double()[1] * 1e-4
    assert wrong.norm() > 2 * torch.finfo(torch.half).eps * (conv.weight[1] * 1e-4).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dead_channels_are_no_underflow(dtype):
    conv, bn = nn.Conv2d(8, 8, 3).to(dtype), nn.BatchNorm2d(8).eval()
    bn.weight.data[1], bn.weight.data[2] = 1e-41, 0
    assert fold_conv_bn(conv, bn).weight[0].abs().max() > 0


@pytest.mark.parametrize(
    ("statistic", "value"), [("running_var", -3), ("running_var", 0), ("running_mean", torch.inf)]
)
def test_channels_without_a_finite_slope_are_kept(statistic, value):
    model = randomize(Pair()).double()
    model.bn.eps = 0.0
    getattr(model.bn, statistic)[0] = value
    folded = fold_batch_norm(model)
    assert re.search("folded (weight|bias) is not finite", folded.fold_report.kept["bn"])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_half_layer_before_a_float_batch_norm_keeps_the_dtype_of_the_output(half):
    model = randomize(Pair())
    model.conv.to(half)
    folded, x = fold_batch_norm(model), torch.randn(2, 3, 4, 4).to(half)
    assert folded.fold_report.folded
    assert error(folded(x), model(x)) <= 8 * torch.finfo(half).eps


def test_tensors_that_are_no_plain_floating_point_ones_are_kept():
    complex_, meta = nn.Conv2d(3, 3, 1, dtype=torch.complex64), Pair().to("meta")
    float8 = nn.Conv2d(3, 3, 1)
    float8.weight = nn.Parameter(float8.weight.to(torch.float8_e4m3fn), requires_grad=False)
    bn = nn.BatchNorm2d(3)
    for model, reason in (
        (nn.Sequential(complex_, bn), "are torch.complex64"),
        (nn.Sequential(float8, bn), "are torch.float8_e4m3fn"),
        (meta, "on the meta device"),
    ):
        assert reason in "".join(fold_batch_norm(model.eval()).fold_report.kept.values())


@pytest.mark.parametrize("before", [False, True])
def test_memory_format_and_requires_grad_of_the_layer_stay(before):
    conv = nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last)
    conv.bias.requires_grad_(False)
    layers = (nn.BatchNorm2d(4), conv) if before else (conv, nn.BatchNorm2d(6))
    folded = fold_batch_norm(nn.Sequential(*layers).eval())
    (new,) = (m for m in folded if isinstance(m, nn.Conv2d))
    assert folded.fold_report.folded
    assert new.weight.is_contiguous(memory_format=torch.channels_last)
    assert new.weight.requires_grad and not new.bias.requires_grad


# --- what a folded model goes on to


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.c2, self.b2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b3, self.c3 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        convert_batch_norm(self)

    def forward(self, x):
        y = self.b1(self.c1(x), activation="relu")
        y = self.b2(self.c2(y), x, "relu")
        return self.c3(self.b3(y, activation="relu"))


@pytest.mark.filterwarnings(JIT)
def test_fused_calls_leave_an_addition_and_a_relu():
    model, x = Fused(), torch.randn(2, 3, 4, 4)
    report = check_model(model, x)
    assert report.folded == {"b1": "c1", "b2": "c2"}
    assert "an activation comes between it and 'c3'" in report.kept["b3"]
    folded = fold_batch_norm(randomize(model.float()))
    assert isinstance(folded.b1, FoldedBatchNorm) and repr(folded.b1) == "FoldedBatchNorm(rank=0)"
    again = pickle.loads(pickle.dumps(folded))
    assert torch.equal(again(x), folded(x))
    norm, y = folded.b1, torch.randn(2, 3, 4, 4)
    scripted = torch.jit.script(norm)
    for run in (norm, scripted):
        row = torch.randn(3, 1, 1, dtype=torch.float64)  # promotes and broadcasts, as + does
        assert torch.equal(run(y, row, "relu"), (y + row).relu())
        assert torch.equal(run(y, row), y + row) and torch.equal(run(y), y)
    with pytest.raises(ValueError, match="expected None or 'relu' as activation, got tanh"):
        norm(y, None, "tanh")


@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize(
    ("model", "shape", "wrong"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()), (3, 6), (3, 4, 6)),
        (nn.Sequential(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)), (3, 6, 6), (6, 6)),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)), (3, 6), (3, 6, 6)),
    ],
)
def test_folded_models_with_a_rank_guard_script_and_trace(model, shape, wrong):
    folded, x = fold_batch_norm(randomize(model)), torch.randn(shape)
    assert folded.fold_report.folded
    runs = [folded, torch.jit.script(folded), torch.fx.symbolic_trace(folded)]
    runs += [pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)]
    for run in runs:
        assert error(run(x), model(x)) <= RTOL[torch.float32]
        with pytest.raises((ValueError, torch.jit.Error), match="D input, got shape"):
            run(torch.randn(wrong))
    exported = torch.export.export(folded, (x,)).module()
    assert torch.equal(exported(x), folded(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_folded_models_quantize():
    ao, model, x = torch.ao.quantization, randomize(mlp()), torch.randn(64, 12)
    folded = fold_batch_norm(model)
    want = model(x)
    dynamic = ao.quantize_dynamic(folded, {nn.Linear})
    assert error(dynamic(x), want) < 0.1
    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if not engines:
        pytest.skip("no quantized engine on this machine")
    whole = nn.Sequential(ao.QuantStub(), folded, ao.DeQuantStub()).eval()
    whole.qconfig = ao.get_default_qconfig(torch.backends.quantized.engine)
    prepared = ao.prepare(whole)
    prepared(x)
    converted = ao.convert(prepared)
    assert "Quantized" in type(converted[1][0]).__name__ or converted[1][0].scale > 0


# --- many small models out of such tricks


class Stage(nn.Module):
    """Layers in an order drawn by the test; what a subclass does with them may forbid a fold."""

    also: ClassVar = {}

    def __init__(self, order, conv):
        super().__init__()
        self.order, self.conv, self.bn = order, conv, nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace="r" in order[1:])

    def forward(self, x):
        for letter in self.order:
            x = self.conv(x) if letter == "c" else self.bn(x) if letter == "b" else self.relu(x)
        return x


class StageStores(Stage):
    also: ClassVar = {"v": lambda stage, x: stage.v}

    def forward(self, x):
        self.v = self.conv(x)
        return self.bn(self.v)


class StageFeatures(Stage):
    also: ClassVar = {"features": lambda stage, x: stage.features(x)}

    def features(self, x):
        return self.conv(x)


class StageFeaturesRun(Stage):
    also: ClassVar = {"features": lambda stage, x: stage.features(x)}

    def features(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.bn(self.features(x))


class StageWhole(Stage):
    """A second method that runs both: its own code names them, so they stay; forward's fold."""

    also: ClassVar = {"both": lambda stage, x: stage.both(x)}

    def both(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return self.both(x).relu()


class StageReads(Stage):
    def forward(self, x):
        return super().forward(x) * (1 + self.bn.eps)


class StageAsks(Stage):
    def forward(self, x):
        x = super().forward(x)
        return -x if isinstance(self.bn, nn.BatchNorm2d) else x


class StageReadsWeight(Stage):
    def forward(self, x):
        return super().forward(x) + self.conv.weight.mean()


class StageTrains(Stage):
    def forward(self, x):
        self.bn.train()
        x = super().forward(x)
        self.bn.eval()
        return x


class StageWrites(Stage):
    def forward(self, x):
        x = x + 0
        y = self.bn(x)
        x.mul_(2)
        return self.conv(y) + x.mean()


class StageFused(Stage):
    def __init__(self, order, conv):
        super().__init__(order, conv)
        self.same = 2 * conv.padding[0] + 1 == conv.kernel_size[0]

    def forward(self, x):
        return self.bn(self.conv(x), residual=x if self.same else None, activation="relu")


class RandomNet(nn.Module):
    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        kinds = [*[Stage] * 6, *Stage.__subclasses__()]
        stages: list[nn.Module] = []
        self.plain: list[Stage] = []
        for _ in range(draw.randint(1, 4)):
            kind = nn.ConvTranspose2d if draw.random() < 0.1 else nn.Conv2d
            size = draw.choice([1, 1, 3])
            padding = draw.choice([0, size // 2])
            groups, bias = draw.choice([1, 2, 4]), draw.random() < 0.5
            conv = kind(4, 4, size, padding=padding, groups=groups, bias=bias)
            order = draw.choice(["cbr", "cb", "bc", "bcr", "brc", "crb", "rcb", "cbb"])
            stage = draw.choice(kinds)(order, conv)
            trick = draw.random()
            if self.plain and trick < 0.06:
                stage.conv = draw.choice(self.plain).conv
            elif self.plain and trick < 0.12:
                stage.bn = draw.choice(self.plain).bn
            elif self.plain and trick < 0.18:
                stage.bn.weight = draw.choice(self.plain).bn.weight
            elif trick < 0.22:
                self.register_parameter(f"again{len(stages)}", stage.conv.weight)
            elif trick < 0.26:
                hooked(draw.choice([stage, stage.conv, stage.bn]))
            elif trick < 0.3:
                stage = nn.Sequential(nn.DataParallel(stage))
            elif stages and trick < 0.34:
                stage = draw.choice(stages)
            if isinstance(stage, Stage):
                self.plain.append(stage)
            stages.append(stage)
        self.plain = [stage for stage in self.plain if stage in stages]
        self.stages = nn.Sequential(*stages)
        for stage in self.modules():
            if isinstance(stage, StageFused):
                convert_batch_norm(stage)
        self.skip = draw.random() < 0.5
        self.option = draw.choice(self.plain) if self.plain and draw.random() < 0.2 else None

    def forward(self, x, raw=False):
        if raw and self.option is not None:
            return self.option.conv(x)
        y = self.stages(x)
        return y + x.mean() if self.skip else y


def test_random_models_compute_what_they_did():
    """Outputs of forward, twice, and of whatever else the stages offer, before and after."""
    norms = folded_norms = 0
    for seed in range(60):
        torch.manual_seed(seed)
        model = randomize(RandomNet(seed)).double()
        folded = fold_batch_norm(model)
        report, x = folded.fold_report, torch.randn(2, 4, 9, 9, dtype=torch.float64)
        norms += len(report.kept) + len(report.folded)
        folded_norms += len(report.folded)
        with torch.no_grad():
            for raw in (False, False, True):
                got, want = folded(x, raw), model(x, raw)
                assert error(got, want) <= RTOL[torch.float64], (seed, report)
            for ours, theirs in zip(folded.plain, model.plain, strict=True):
                for name, run in ours.also.items():
                    got, want = run(ours, x), run(theirs, x)
                    assert error(got, want) <= RTOL[torch.float64], (seed, name, report)
    assert folded_norms > norms / 5  # or the test would show little
