"""What is wrong with the batch norms of a model: found by running some batches through it."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Sized
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bnlib.diagnosis.report import Diagnosis, Finding, LayerReport
from bnlib.diagnosis.rules import findings, report_of
from bnlib.diagnosis.watch import Record, Watch
from bnlib.probe import batch_norms, core, hooked, is_frozen, run, undisturbed

__all__ = ["Diagnosis", "Finding", "LayerReport", "diagnose"]

_PATIENCE = 3.0  # seconds before progress is shown, and half a second between its lines
_STEP = 0.5


def diagnose(model: nn.Module, batches: Any) -> Diagnosis:
    """Run batches through a torch model and say what is wrong with its batch norms.

    The main measure is how much of a layer's output evaluation changes. With μ and σ² of the given
    data, and the hat for "normalised with"::

        effect² = Σ_c γ_c² E[(x̂_running - x̂_data)²] / Σ_c γ_c² E[x̂_data²]
                = Σ_c γ_c² [(σ'/s - 1)² σ²/σ'² + (running_mean - μ)²/s²] / Σ_c γ_c² σ²/σ'²
        σ'² = σ² + ε,   s² = running_var + ε

    where the denominator is at least 1e-6 Σ_c γ_c², below which there is no output to speak of.
    Each layer normalises with the statistics of all that it was given so far, so that no layer is
    blamed for those before it; a frozen layer does with its own. The rest of the model is in
    evaluation mode. Afterwards everything is as it was, bit for bit, also when this raises:
    weights, buffers, modes, gradients, the generators of random numbers. Of what passes, sums per
    channel are kept and nothing else. What that costs, ``benchmarks/diagnosis.py`` measures.

    Kinds of findings, the gravest first:

    - ``nonfinite``: buffers or parameters with NaN, infinity or a negative variance;
      ``nonfinite_input``: the first layer that meets NaN or infinity.
    - ``replicas``: the ranks of the default process group, if there is one, hold different numbers.
      Every rank has to call ``diagnose`` then. Buffers do differ after a step of
      DistributedDataParallel, until the next one.
    - ``never_trained``: running statistics at 0 and 1. Of such a layer only its mode, its momentum
      and what is not finite is told besides.
    - ``training_in_eval``: a layer in training mode inside an evaluated model.
    - ``stale``: an effect above 0.5 and above what the few given data could produce by chance.
    - ``unfrozen``: parameters frozen, statistics not; ``eval_in_training``: the reverse. A layer
      with both frozen is left in peace.
    - ``momentum`` above 0.5; ``double_counted``: exactly twice the batches of the other layers, as
      by checkpointing (where all layers are checkpointed, the model does not show it).
    - ``one_value``: a batch with one value per channel, in a layer that would train on it.
    - ``exploding``, ``epsilon``, ``constant``, ``dead``, ``zero_gamma``: channels beyond float16 or
      1000 times the others (columns of the input may be that); below ε, of a quarter of the
      channels; without any spread, or never passed by the ReLU that alone follows, in 64 samples
      or more; with a γ under 1e-4.
    - ``useless_bias``: of a convolution or linear layer whose output goes straight into the layer,
      and nowhere else.

    Args:
        model: a torch module with batch norms: torch's, those of ``bnlib.nn``, subclasses.
        batches: as :func:`bnlib.recalibration.recalibrate` takes them, prepared as in training. A
            few hundred samples will do.

    Returns:
        :class:`Diagnosis`, which prints as tables, and in a notebook as HTML. Work of more than a
        few seconds shows its progress on stderr.

    Raises:
        TypeError: ``model`` is not a torch module, or a batch is none of those forms.
        ValueError: no batch norms, lazy modules, or no batches.

    Source: Ioffe & Szegedy (2015); Wu & Johnson (2021). Derived in *Running statistics* and
    *Train/eval mismatch*.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).eval()
        >>> found = diagnose(model, torch.zeros(4, 2))
        >>> [(finding.layer, finding.kind) for finding in found.findings]
        [('1', 'never_trained')]
    """
    records = [
        Record(name, layer, is_frozen(model, layer) or _is_kept(model, layer))
        for name, layer in batch_norms(model).items()
    ]
    differing = _differing(records)
    progress = _Progress(len(batches) if isinstance(batches, Sized) else 0)
    with undisturbed(model, batches), ExitStack() as stack:
        watch = Watch(model, records)
        hooks = [core(model).register_forward_pre_hook(watch.begin, with_kwargs=True)]
        hooks += [
            record.layer.register_forward_hook(watch.after, with_kwargs=True) for record in records
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        stack.callback(progress.end)
        stack.enter_context(hooked([record.layer for record in records], watch.before))
        stack.enter_context(watch)
        for count in run(model, batches):
            watch.batch = count + 1
            progress.show(count)
    watch.settle()
    with torch.no_grad():
        rows, found = map(report_of, records), findings(model, records, count, differing)
        return Diagnosis(tuple(rows), tuple(found), count)


def _is_kept(model: nn.Module, layer: nn.Module) -> bool:
    """Whether an evaluated layer's parameters are frozen, and others of the model are not."""
    own = list(layer.parameters())
    return (
        not layer.training
        and bool(own)
        and not any(p.requires_grad for p in own)
        and any(p.requires_grad for p in model.parameters())
    )


def _differing(records: list[Record]) -> dict[str, dict[str, Any]]:
    """The layers in which some rank's numbers are not those of rank 0."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return {}

    def sums(tensors: tuple[Tensor | None, ...]) -> list[int]:
        kept = [t.detach().cpu().contiguous() for t in tensors if t is not None]
        return [zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().tobytes()) for t in kept]

    mine = {
        r.name: {
            "buffers": sums((r.layer.running_mean, r.layer.running_var)),
            "parameters": sums((r.layer.weight, r.layer.bias)),
        }
        for r in records
    }
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, mine)
    found = {}
    for name in mine:
        evidence = {
            what: sum(other[name][what] != all_ranks[0][name][what] for other in all_ranks)
            for what in ("parameters", "buffers")
        }
        if any(evidence.values()):
            found[name] = {**evidence, "ranks": len(all_ranks)}
    return found


class _Progress:
    """A line on stderr, once there is something to wait for."""

    def __init__(self, total: int) -> None:
        self._of = f" of {total}" if total else ""
        self._start = self._last = time.monotonic()
        self._shown = False

    def show(self, count: int) -> None:
        now = time.monotonic()
        if now - self._start > _PATIENCE and now - self._last > _STEP:
            seconds = now - self._start
            print(f"\rdiagnose: batch {count}{self._of}, {seconds:.0f} s", end="", file=sys.stderr)
            self._last, self._shown = now, True

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)
