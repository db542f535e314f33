"""Measure what batch norm's two collectives cost on this machine: gloo processes on loopback.

    python benchmarks/distributed.py            # a minute or two; writes book/data/distributed.csv

Each configuration times single calls on rank 0 after a warm-up, the operations in turn, so that a
disturbance of the machine hits all of them. The best time says what the exchange itself costs, the
median also how long the processes wait for a core. The file is drawn in *When the batch outgrows
one device*.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bnlib.distributed import sync_moments, sync_sum
from bnlib.statistics import Moments

OUT = Path(__file__).resolve().parent.parent / "book" / "data" / "distributed.csv"
RANKS = (2, 4)
CHANNELS = (64, 512, 2048, 16384, 65536)  # the last two only to see what a byte costs
WARM_UP = 20


def operations(channels: int, ranks: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """The calls to time, each with the bytes that one rank hands in."""
    zeros = torch.zeros(channels)
    local = Moments(1, zeros, zeros)
    row = torch.zeros(2 * channels + 2)  # mean, variance and the 8 bytes of the count
    rows = list(torch.zeros(ranks, len(row)).unbind())
    sums = torch.zeros(2 * channels)
    return {
        "all_gather": (row.nbytes, lambda: dist.all_gather(rows, row)),
        "sync_moments": (row.nbytes, lambda: sync_moments(local)),
        "all_reduce": (sums.nbytes, lambda: dist.all_reduce(sums)),
        "sync_sum": (sums.nbytes, lambda: sync_sum(sums)),
    }


def measure(rank: int, ranks: int, calls: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    rows = []
    for channels in CHANNELS:
        timed = operations(channels, ranks)
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for number in range(WARM_UP + calls):
            for name, (_, call) in timed.items():
                begin = time.perf_counter()
                call()
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - begin)
        for name, (size, _) in timed.items():
            times = sorted(seconds[name])
            found = times[0], statistics.median(times), times[int(0.9 * len(times))]
            rows.append((name, ranks, channels, size, calls, *(1e6 * t for t in found)))
    if rank == 0:
        torch.save(rows, f"{folder}/rows")
    dist.barrier()
    dist.destroy_process_group()


def processor() -> str:
    """The name of the processor, or of its architecture."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=150, help="timed calls per configuration")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.calls < 1:
        parser.error(f"expected --calls of at least 1, got {options.calls}")

    for name in ("lo", "lo0"):  # loopback, as Linux and macOS call it
        if name in (interface for _, interface in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    where = {
        "backend": "gloo, loopback",
        "machine": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    fields = ["operation", "ranks", "channels", "bytes", "calls"]
    fields += ["best_us", "median_us", "p90_us"]
    table = []
    for number, ranks in enumerate(RANKS, 1):
        print(f"[{number}/{len(RANKS)}] {ranks} processes", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (ranks, options.calls, folder), ranks)
            table += torch.load(f"{folder}/rows")
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*fields, *where])
        for row in table:
            writer.writerow([*row[:5], *(f"{t:.1f}" for t in row[5:]), *where.values()])
    print(f"wrote {len(table)} rows to {options.out.name}")


if __name__ == "__main__":
    main()
