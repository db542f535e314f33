"""Measure what ``bnlib.diagnosis.diagnose`` costs, in forward passes of the same batches.

    python benchmarks/diagnosis.py              # a minute or two; prints, writes nothing

A forward pass in evaluation mode without gradients, one in training mode, a diagnosis and a
recalibration take turns, so that a disturbance of the machine hits all of them; rows give medians
and the ratios of those. On the CPU it is processor time that counts, which a busy machine changes
less. Models are untrained: the arithmetic is the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bnlib.diagnosis import diagnose
from bnlib.recalibration import recalibrate

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import small_nets  # noqa: E402
from resnet50 import ResNet50  # noqa: E402


def models(device: str) -> dict[str, tuple[nn.Module, list[torch.Tensor]]]:
    small = torch.randn(16, 64, 1, 8, 8)
    large = torch.randn(2, 8, 3, 160, 160)
    return {
        "two layers, 64 x 1 x 8 x 8": (small_nets.plain(), list(small)),
        "resnet, 64 x 1 x 8 x 8": (small_nets.resnet(width=16), list(small)),
        "ResNet-50, 8 x 3 x 160 x 160": (ResNet50(), list(large)),
        "ResNet-50, channels_last": (
            ResNet50().to(memory_format=torch.channels_last),
            [x.to(memory_format=torch.channels_last) for x in large],
        ),
    }


def measure(model: nn.Module, data: list[torch.Tensor], turns: int) -> dict[str, float]:
    def forward(training: bool) -> Callable[[], None]:
        def run() -> None:
            model.train(training)
            with torch.no_grad():
                for x in data:
                    model(x)

        return run

    contestants: dict[str, Callable[[], object]] = {
        "eval": forward(False),
        "train": forward(True),
        "diagnose": lambda: diagnose(model, data),
        "recalibrate": lambda: recalibrate(model, data),
    }
    clock = time.perf_counter if data[0].is_cuda else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, call in contestants.items():
            begin = clock()
            call()
            if data[0].is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first warms up
                seconds[name].append(clock() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads")
    print("| model | eval, ms a batch | train | diagnose | recalibrate |\n|---|---|---|---|---|")
    for name, (model, data) in models(options.device).items():
        data = [x.to(options.device) for x in data]
        found = measure(model.to(options.device), data, options.turns)
        ratios = [found[key] / found["eval"] for key in ("train", "diagnose", "recalibrate")]
        each = 1e3 * found["eval"] / len(data)
        print(f"| {name} | {each:.2f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


if __name__ == "__main__":
    main()
