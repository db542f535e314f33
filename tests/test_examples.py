"""The examples run as their first lines say, and show what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAIN_DDP = str(ROOT / "examples" / "train_ddp.py")
SHORT = ["--epochs", "2", "--steps", "3", "--batch", "11"]  # 11 samples: uneven shards


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return run(*launcher, TRAIN_DDP, *arguments)


def differences(output: str) -> tuple[float, float]:
    """The two differences from one process that train_ddp.py prints: synchronised, and not."""
    found = dict(re.findall(r"^  (synchronised|own statistics) +(\S+)$", output, re.MULTILINE))
    return float(found["synchronised"]), float(found["own statistics"])


def losses(output: str) -> list[list[float]]:
    return [
        [float(number) for number in line.split()[2:]]
        for line in output.splitlines()
        if line.startswith("epoch")
    ]


def test_train_ddp_reproduces_one_process() -> None:
    done = torchrun(2, *SHORT)
    assert done.returncode == 0, done.stderr
    synced, own = differences(done.stdout)
    assert synced < 1e-10 < 1e-3 < own
    epochs = losses(done.stdout)
    assert len(epochs) == 2
    for alone, synchronised, own_statistics in epochs:
        assert alone == pytest.approx(synchronised, abs=1e-7)
        assert alone != pytest.approx(own_statistics, abs=1e-4)


def test_train_ddp_runs_alone() -> None:
    done = run(TRAIN_DDP, *SHORT)
    assert done.returncode == 0, done.stderr
    assert differences(done.stdout) == (0, 0)
    assert len(losses(done.stdout)) == 2


def test_train_ddp_refuses_an_argument_that_makes_no_sense() -> None:
    done = run(TRAIN_DDP, "--batch", "0")
    assert done.returncode == 2
    assert "expected a positive integer, got 0" in done.stderr
