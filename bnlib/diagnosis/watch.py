"""What a diagnosis keeps while batches run: sums per channel, never an activation."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from bnlib.axes import per_channel
from bnlib.statistics import Moments, merge

_BIASED: set[Any] = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    F.linear,
}
_RELUS: set[Any] = {
    F.relu,
    F.relu_,
    F.relu6,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
}
# Below it, x² in float32 has lost so much of the variance that the deviations are squared instead.
_CANCELS = 1e-3
# Only channels whose β is below -1.5 |γ| are watched for being dead: it costs a look at each value.
_LOW = 1.5


@dataclass
class Record:
    """What is known of one batch norm.

    ``seen`` are the moments of all values, ``means`` those of the samples' means.
    """

    name: str
    layer: _BatchNorm
    frozen: bool
    low: Tensor | None = None
    shape: tuple[int, ...] | None = None
    order: int = 0
    calls: int = 0
    values: int = 0
    samples: int = 0
    seen: Moments | None = None
    means: Moments | None = None
    alone: list[int] = field(default_factory=list)  # the batches with one value per channel
    broken: int = 0  # the first batch with NaN or infinity, from 1 on
    is_input: bool = False
    bias: str = ""  # the layer before it, whose bias is cancelled
    peak: Tensor | None = None


@dataclass
class Biased:
    """What is known of the output of a layer with a bias."""

    bias: str
    linear: bool
    cancelled: bool = False


class Marks:
    """Tensors that are recognised later, unless they were changed or are gone."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int, Any]] = {}

    def put(self, tensor: Tensor, what: Any) -> None:
        if tensor.is_inference():  # has no version that would tell of a change
            return
        key = id(tensor)
        ref = weakref.ref(tensor, lambda _: self._known.pop(key, None))
        self._known[key] = ref, tensor._version, what

    def get(self, tensor: Any) -> Any:
        ref, version, what = self._known.get(id(tensor), (None, 0, None))
        return what if ref is not None and ref() is tensor and tensor._version == version else None


class Watch(TorchFunctionMode):
    """The records of a model's batch norms, and what happens before and after them."""

    def __init__(self, model: nn.Module, records: list[Record]) -> None:
        super().__init__()
        self.records = {record.layer: record for record in records}
        self.batch = 1
        self._biases = {id(p): name for name, p in model.named_parameters()}
        self._after_bias, self._normalised = Marks(), Marks()
        self._kept: Counter[str] = Counter()  # outputs with that bias in which it does something
        self._inside = False  # a batch norm
        self._fresh = True  # no parameter was used so far
        self._calls = 0
        for record in records:
            gamma, beta = record.layer.weight, record.layer.bias
            if gamma is not None and beta is not None:
                low = (beta < -_LOW * gamma.abs()).nonzero()[:, 0]
                record.low = low if len(low) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        given = [v for v in _flat([*args, *kwargs.values()]) if isinstance(v, Tensor)]
        biased = [b for v in given if (b := self._after_bias.get(v))]
        normalised = [r for v in given if (r := self._normalised.get(v))]
        if func in _RELUS and normalised:
            self._rectified(normalised.pop(), given[0])
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) or type(out) in (tuple, list):  # else its shape was asked for
            self._fresh &= not any(isinstance(v, nn.Parameter) for v in given)
            self._kept.update(b.bias for b in biased)
            for record in normalised:  # goes elsewhere too, past a ReLU
                record.low = None
        if func in _BIASED:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if bias is not None and id(bias) in self._biases:
                self._after_bias.put(out, Biased(self._biases[id(bias)], func is F.linear))
                self._kept[self._biases[id(bias)]] += 1
        return out

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Start anew with a batch: a hook."""
        self._inside, self._fresh = False, True

    def settle(self) -> None:
        """Drop the biases that do something after all, as elsewhere in the model."""
        for record in self.records.values():
            if self._kept[record.bias]:
                record.bias = ""

    def before(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take the input of a layer into account, and return what it is to normalise with."""
        self._inside = True
        with torch._C.DisableTorchFunction():  # what is done here is not the model's
            return self._before(self.records[layer], x)

    def _before(self, record: Record, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if not x.is_floating_point():
            return None  # the layer itself will say so
        self._calls += 1
        record.calls += 1
        if record.shape is None:
            record.shape, record.order = tuple(x.shape), self._calls
            record.is_input = self._fresh
        biased = self._after_bias.get(x)
        if biased and (record.frozen or (biased.linear and x.dim() > 2)):
            self._kept[biased.bias] += 1  # nothing is subtracted, or along another axis
        elif biased:
            record.bias = biased.bias
            self._kept[biased.bias] -= not biased.cancelled
            biased.cancelled = True
        values = math.prod(x.shape) // max(1, x.shape[1])
        record.values = max(record.values, values)
        record.samples = max(record.samples, x.shape[0])
        if values == 0:
            return None
        if values == 1:
            record.alone.append(self.batch)
        seen, means = sums(x)
        if not record.broken and not bool(torch.isfinite(seen.m2).all()):
            record.broken = self.batch
        record.seen = seen if record.seen is None else merge(record.seen, seen)
        record.means = means if record.means is None else merge(record.means, means)
        if record.frozen or record.seen.count < 2:
            return None
        return record.seen.mean, record.seen.var()

    def after(self, layer: Any, args: Any, kwargs: Any, y: Any) -> None:
        """Recognise the output of a layer later: a hook."""
        record = self.records[layer]
        if record.low is not None and isinstance(y, Tensor):
            if kwargs.get("activation") == "relu" and kwargs.get("residual") is None:
                self._rectified(record, y)
            self._normalised.put(y, record)
        self._inside = False

    def _rectified(self, record: Record, y: Tensor) -> None:
        """Keep the largest value of the channels that might never pass a ReLU."""
        if record.low is None:
            return
        peak = y.detach().index_select(1, record.low).transpose(0, 1).flatten(1).amax(1)
        record.peak = peak if record.peak is None else torch.maximum(record.peak, peak)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value


def sums(x: Tensor) -> tuple[Moments, Moments]:
    """Return the moments of the values of each channel, and those of the samples' means.

    One pass for the means of the samples and one for the sums of their squares, in float32; what
    follows has N values per channel and is done in float64.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # which that device lacks
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    count, places = x.shape[0], math.prod(x.shape[2:])
    if places == 1:
        means = _moments(x.reshape(x.shape[:2]).to(wide))
        return means, means
    axes = tuple(range(2, x.dim()))

    def both(v: Tensor) -> tuple[Moments, Tensor, Tensor]:
        """The samples' means, their mean, and what is left of the squares without it."""
        samples = _moments(v.mean(axes, dtype=dtype).to(wide))
        if v.is_contiguous():
            norms = torch.linalg.vector_norm(v, dim=axes, dtype=dtype)
            squares = norms.to(wide).square().sum(0)
        else:  # in channels_last, the norm of torch takes ten times as long as the square
            squares = v.to(dtype).square().sum(axes).to(wide).sum(0)
        return samples, squares, squares - count * places * samples.mean * samples.mean

    samples, squares, m2 = both(x)
    if bool((m2 < _CANCELS * squares).any()):
        shift = samples.mean.to(dtype)
        samples, _, m2 = both(x.to(dtype) - per_channel(shift, x.dim()))
        samples = samples._replace(mean=samples.mean + shift)
    return Moments(count * places, samples.mean, m2.clamp(min=0)), samples


def _moments(v: Tensor) -> Moments:
    """The moments of the columns of a matrix."""
    mean = v.mean(0)
    return Moments(len(v), mean, (v - mean).square().sum(0))
