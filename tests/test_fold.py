"""Folding: equal to the original to rounding wherever it folds, and it folds only there."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune

from bnlib.fold import fold_batch_norm, fold_conv_bn, fold_linear_bn
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
    return ((got - want).abs().max() / want.abs().max()).item()


def check_model(model: nn.Module, *inputs: torch.Tensor, dtype=torch.float64):
    """Fold, compare, make sure that the original was left alone; return the report."""
    model = randomize(model).to(dtype)
    inputs = tuple(x.to(dtype) for x in inputs)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        want = model(*inputs)
        folded = fold_batch_norm(model)
        got = folded(*inputs)
    assert error(got, want) <= RTOL[dtype]
    after = model.state_dict()
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
    assert set(report.kept.values()) == {"it is called with more than its input"}


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
        (Twice(), {"bn": "called 2 times", "bn2": "comes from 'conv', which is called 2 times"}),
        (ReadsWeight(), {"bn": "comes from 'conv', which is also used elsewhere"}),
        (ReadsGamma(), {"bn": "its parameters are also read directly"}),
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
    assert "also used elsewhere" in report.kept["2"]


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
    assert not twice.fold_report.folded and torch.equal(twice(x), folded(x))


def test_rank_guard():
    """(N, L, C): the linear layer's channels are the last axis, the batch norm's are axis 1."""
    model = randomize(mlp())
    folded = fold_batch_norm(model)
    x = torch.randn(2, 20, 12)
    assert model(x).shape == (2, 20, 3)  # runs, normalising the 20 positions
    with pytest.raises(ValueError, match=r"expected a 2-D input, got shape \(2, 20, 12\)"):
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
