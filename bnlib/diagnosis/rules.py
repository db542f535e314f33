"""From what was seen to what is wrong: one rule for each kind of finding, and their bounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnlib.diagnosis.report import Finding, LayerReport
from bnlib.diagnosis.watch import Record
from bnlib.probe import core

_EFFECT = 0.5  # of the output's root mean square: half of it is another number in evaluation
_TINY = 1e-6  # of γ²: an output below it is none
_NOISE = 3.0  # standard errors that the given data must exceed besides
_MOMENTUM = 0.5  # above, the last batch outweighs all before it
_START = 0.1  # weight of the start, 0 and 1, that is worth a word
_HALF_MAX = 65504.0  # the largest float16
_SPREAD = 1000.0  # times the median channel's standard deviation
_FEW = 0.25  # of the channels with a variance below ε
_GAMMA = 1e-4  # a γ that lets nothing through
_SAMPLES = 64  # fewer may all lack what a channel is for
_SURE = 1000  # equal values that are no accident, where training may have seen others

_RUNNING = "Running statistics"
_MODES = "Train/eval mismatch"
_FORWARD = "Forward, and what ε does"

# Kind -> advice and chapter; the gravest first.
KINDS: dict[str, tuple[str, str]] = {
    "nonfinite": (
        "The layer's buffers or parameters make NaN in evaluation: recalibrate(), or load a "
        "checkpoint from before.",
        _RUNNING,
    ),
    "nonfinite_input": (
        "NaN or infinity reaches this layer first: look at the data and at what comes before it.",
        "Computing a mean and a variance",
    ),
    "replicas": (
        "The ranks disagree. Parameters must not; of buffers, save rank 0's and evaluate with "
        "those.",
        "When the batch outgrows one device",
    ),
    "never_trained": (
        "The running statistics are those of the start, 0 and 1: train, load a checkpoint with "
        "its buffers, or recalibrate().",
        _RUNNING,
    ),
    "training_in_eval": (
        "The layer is in training mode inside an evaluated model: its output depends on the "
        "company of a sample, and each forward moves its buffers. Call model.eval().",
        _MODES,
    ),
    "stale": (
        "Evaluation normalises with other numbers than these data have: prepare the data as in "
        "training, or recalibrate().",
        _RUNNING,
    ),
    "unfrozen": (
        "The layer's parameters are frozen, its statistics are not: model.train() puts a frozen "
        "layer back into training mode. Call layer.eval() after each model.train().",
        _MODES,
    ),
    "eval_in_training": (
        "The layer is in evaluation mode inside a model that trains, and its γ and β train: freeze "
        "those too (requires_grad_(False)), or call model.train().",
        _MODES,
    ),
    "momentum": (
        "PyTorch's momentum weighs the new batch: what other frameworks call 0.9 is 0.1 here. Set "
        "1 - momentum, then recalibrate().",
        _RUNNING,
    ),
    "double_counted": (
        "The layer has counted twice as many batches as others: where it is checkpointed, it runs "
        "twice in a step. Its momentum should be 1 - √(1 - momentum).",
        _MODES,
    ),
    "one_value": (
        "A batch has one value per channel, whose variance is 0: PyTorch refuses to train on it. "
        "Give the loader drop_last=True, or larger batches.",
        _RUNNING,
    ),
    "exploding": (
        "Channels far larger than float16 holds, or than the others: look at the weights before "
        "the layer, and at the learning rate.",
        "Computing a mean and a variance",
    ),
    "epsilon": (
        "ε outweighs the variance, so the output is smaller than γ says: scale the input up, or "
        "take a smaller ε.",
        _FORWARD,
    ),
    "constant": (
        "Channels with one value for all the data: look for dead units or empty columns before "
        "the layer. What ever differs there is multiplied by up to 1/√ε in evaluation.",
        _FORWARD,
    ),
    "dead": (
        "Channels that the ReLU behind the layer never lets through: lower the learning rate, or "
        "prune them.",
        "Backward",
    ),
    "zero_gamma": (
        "Channels whose γ is 0 pass on β alone: prune them, or spare γ the weight decay; see that "
        "the optimizer has it.",
        "Backward",
    ),
    "useless_bias": (
        "The mean that the layer subtracts takes the bias before it along: build that layer with "
        "bias=False.",
        "Backward",
    ),
}
# What is still worth a word in a layer that was never trained.
_ALWAYS = {
    "nonfinite",
    "nonfinite_input",
    "replicas",
    "training_in_eval",
    "unfrozen",
    "eval_in_training",
    "momentum",
    "one_value",
}


class _Gap(NamedTuple):
    """Per channel: distance of the means, ratio of the deviations, what changes, and of what."""

    mean: Tensor
    ratio: Tensor
    square: Tensor
    power: Tensor  # of the output, E[(γ x̂)²]
    scale: Tensor  # γ²

    def effect(self) -> float:
        # Where ε has swallowed a layer, to its output's rounding errors anything is large.
        total = max(float(self.power.sum()), _TINY * float(self.scale.sum()))
        return math.sqrt(float(self.square.sum()) / total) if total > 0 else 0.0


def gap_of(record: Record) -> _Gap | None:
    """How evaluation differs from what these data would have, where both are finite."""
    layer, seen = record.layer, record.seen
    if seen is None or seen.count < 2:  # one value has no spread to compare with
        return None
    if layer.running_mean is None or layer.running_var is None:
        return None
    mean, var = seen.mean, seen.var()
    own, spread = layer.running_mean.to(mean), layer.running_var.to(var) + layer.eps
    gamma = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().to(mean)
    shift, ratio = (own - mean) / (var + layer.eps).sqrt(), (spread / (var + layer.eps)).sqrt()
    scale, share = gamma * gamma, var / (var + layer.eps)
    square = scale * ((1 / ratio - 1) ** 2 * share + (shift / ratio) ** 2)
    good = torch.isfinite(square) & torch.isfinite(spread)
    if not bool(good.any()):
        return None
    found = shift, ratio, square, scale * share, scale
    return _Gap(*(each[good] for each in found))


def effective(record: Record) -> Tensor | None:
    """N σ²/Var(a) per channel, from the means a of single samples."""
    if record.seen is None or record.means is None or record.means.count < 2:
        return None
    tau = record.means.var(correction=1)
    var = record.seen.var() + tau / record.means.count  # what E[σ²_B] = σ² - Var(μ_B) leaves out
    worth = record.samples * var / tau
    worth = worth[~torch.isnan(worth)]
    return worth if len(worth) else None


def report_of(record: Record) -> LayerReport:
    """The row of one layer."""
    gap, worth, layer = gap_of(record), effective(record), record.layer
    return LayerReport(
        record.name,
        record.shape,
        record.values,
        None if worth is None else float(worth.median()),
        None if gap is None else math.sqrt(float((gap.mean**2).mean())),
        None if gap is None else float(gap.ratio.median()),
        None if gap is None else gap.effect(),
        None if layer.num_batches_tracked is None else int(layer.num_batches_tracked),
        layer.training,
    )


def findings(
    model: nn.Module, records: list[Record], batches: int, differing: dict[str, Any]
) -> list[Finding]:
    """All findings, ranked."""
    order = list(KINDS)
    found: list[tuple[int, float, int, Finding]] = []
    twice = _twice(records, batches)
    for record in records:
        untrained = _untrained(record)
        for kind, size, evidence in _of_layer(model, record, records):
            if not untrained or kind in _ALWAYS:
                found.append(_ranked(order, record, kind, size, evidence))
        if untrained:
            tracked = record.layer.num_batches_tracked
            count = 0 if tracked is None else int(tracked)
            found.append(_ranked(order, record, "never_trained", 0, {"batches_tracked": count}))
        if record.name in twice:
            found.append(_ranked(order, record, "double_counted", 0, twice[record.name]))
        if record.name in differing:
            found.append(_ranked(order, record, "replicas", 0, differing[record.name]))
    return [finding for *_, finding in sorted(found, key=lambda row: row[:3])]


def _ranked(
    order: list[str], record: Record, kind: str, size: float, evidence: dict[str, Any]
) -> tuple[int, float, int, Finding]:
    finding = Finding(record.name, kind, evidence, *KINDS[kind])
    return order.index(kind), -size, record.order, finding


def _untrained(record: Record) -> bool:
    """Whether the running statistics are those of the constructor."""
    mean, var = record.layer.running_mean, record.layer.running_var
    return (
        mean is not None and var is not None and bool((mean == 0).all()) and bool((var == 1).all())
    )


def _twice(records: list[Record], batches: int) -> dict[str, dict[str, int]]:
    """The layers that counted exactly twice as many batches as all others, for one call each.

    Frozen layers count for nothing: they stopped at some time.
    """
    counts: dict[str, int] = {}
    for r in records:
        tracked = 0 if r.layer.num_batches_tracked is None else int(r.layer.num_batches_tracked)
        if tracked and r.calls and not r.frozen and tracked * batches % r.calls == 0:
            counts[r.name] = tracked * batches // r.calls
    kinds = Counter(counts.values())
    if len(kinds) != 2 or max(kinds) != 2 * min(kinds):
        return {}
    return {
        name: {"batches_tracked": count, "of_the_others": min(kinds)}
        for name, count in counts.items()
        if count == max(kinds)
    }


def _of_layer(
    model: nn.Module, record: Record, records: list[Record]
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Kind, size and evidence of what one layer shows by itself."""
    layer = record.layer
    yield from _buffers(record)
    yield from _mode(model, record, records)
    gamma, seen = layer.weight, record.seen
    momentum = layer.momentum
    if momentum is not None and momentum > _MOMENTUM and layer.running_mean is not None:
        evidence = {"momentum": float(momentum), "probably": round(1 - float(momentum), 6)}
        yield "momentum", float(momentum), evidence
    if record.alone and (layer.training or layer.running_mean is None):
        yield "one_value", 0, {"batches": len(record.alone), "first": record.alone[0]}
    if record.broken:
        before = [r for r in records if r.order < record.order]
        if not any(r.broken or _broken_parameters(r) for r in before):
            yield "nonfinite_input", 0, {"batch": record.broken, "shape": str(record.shape)}
        return
    if seen is not None:
        yield from _channels(record)
    if gamma is not None:
        zero = int((gamma.detach().abs() < _GAMMA).sum())
        if zero:
            yield "zero_gamma", zero / len(gamma), {"channels": zero, "of": len(gamma)}
    if record.bias:
        largest = float(model.get_parameter(record.bias).detach().abs().max())
        yield "useless_bias", 0, {"bias": record.bias, "largest": largest}


def _buffers(record: Record) -> Iterator[tuple[str, float, dict[str, Any]]]:
    layer = record.layer
    own = {
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "weight": layer.weight,
        "bias": layer.bias,
    }
    evidence = {}
    for name, tensor in own.items():
        if tensor is not None:
            wrong = ~torch.isfinite(tensor)
            if name == "running_var":
                wrong |= tensor + layer.eps <= 0
            if bool(wrong.any()):
                evidence[name] = int(wrong.sum())
    if evidence:
        yield "nonfinite", sum(evidence.values()), evidence


def _broken_parameters(record: Record) -> bool:
    own = list(record.layer.parameters(recurse=False))
    return not all(bool(torch.isfinite(p).all()) for p in own)


def _mode(
    model: nn.Module, record: Record, records: list[Record]
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    layer, training = record.layer, core(model).training
    if layer.running_mean is None:
        return  # both modes take the batch's statistics
    evidence = {
        "in_training": sum(r.layer.training for r in records),
        "of": len(records),
    }
    if layer.training and not training:
        yield "training_in_eval", 0, evidence
    own = [p for p in (layer.weight, layer.bias) if p is not None]
    trains = any(p.requires_grad for p in model.parameters())
    if training and not layer.training and any(p.requires_grad for p in own):
        yield "eval_in_training", 0, evidence
    frozen = bool(own) and trains and not any(p.requires_grad for p in own)
    if training and layer.training and frozen:
        yield "unfrozen", 0, evidence


def _channels(record: Record) -> Iterator[tuple[str, float, dict[str, Any]]]:
    layer, seen = record.layer, record.seen
    assert seen is not None
    mean, var = seen.mean, seen.var()
    size = (var + mean * mean).sqrt()
    constant = var <= (1e-6 * mean) ** 2

    gap = gap_of(record)
    if gap is not None and not record.frozen:
        effect = gap.effect()
        worth = effective(record)
        samples = 1 if record.means is None else record.means.count
        each = 1.0 if worth is None else float(worth.median()) / record.samples
        if effect > _EFFECT + _NOISE / math.sqrt(samples * each):
            evidence = {
                "effect": effect,
                "mean_gap": math.sqrt(float((gap.mean**2).mean())),
                "std_ratio": float(gap.ratio.median()),
            }
            tracked = layer.num_batches_tracked
            if tracked is not None and layer.momentum is not None:
                start = (1 - layer.momentum) ** int(tracked)
                if start > _START:
                    evidence |= {"start_weight": start}
            yield "stale", effect, evidence

    median = float(var.sqrt().median())
    wild = size > _HALF_MAX
    if median > math.sqrt(layer.eps):
        wild |= var.sqrt() > _SPREAD * median
    if bool(wild.any()) and not record.is_input:  # whose columns may have any unit
        largest = float(size.max())
        evidence = {"channels": int(wild.sum()), "largest": largest, "median": median}
        yield "exploding", largest, evidence

    live = ~constant
    small = live & (var < layer.eps)
    if int(small.sum()) > _FEW * len(var):
        ratio = float((layer.eps / var[small]).median())
        evidence = {"channels": int(small.sum()), "of": len(var), "eps_over_var": ratio}
        yield "epsilon", ratio, evidence

    if record.means is None or record.means.count < _SAMPLES:
        return
    surely = constant & (seen.count >= _SURE)
    if layer.running_var is not None:
        surely |= constant & (layer.running_var.to(var) <= layer.eps)
    if bool(surely.any()):
        evidence = {"channels": int(surely.sum()), "of": len(var)}
        yield "constant", int(surely.sum()) / len(var), evidence

    if record.peak is not None and record.low is not None and layer.weight is not None:
        never = record.peak <= 0
        never &= (layer.weight.detach().abs() >= _GAMMA)[record.low]  # else it is zero_gamma
        never &= ~constant[record.low]
        if bool(never.any()):
            yield (
                "dead",
                int(never.sum()) / len(var),
                {"channels": int(never.sum()), "of": len(var)},
            )
