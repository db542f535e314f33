"""Real gloo processes on loopback: whatever the shards, the ranks together are one process."""

from __future__ import annotations

import datetime
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import bnlib
from bnlib.distributed import sync_moments, sync_sum
from bnlib.nn import BatchNorm2d, SyncBatchNorm, convert_batch_norm

STEPS = 10
# Samples per rank: even, uneven, and with an empty shard in the first place and the last.
SHARDS = {2: [(4, 4), (7, 1), (0, 8)], 3: [(1, 5, 2), (0, 3, 5)], 4: [(2, 2, 2, 2), (0, 1, 7, 0)]}


def run(ranks: int, function: Callable, folder: Path, *arguments: str) -> None:
    """Start the ranks as copies of one process, which has imported once what all of them need."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "bnlib.nn", "bnlib.kernels.cpu"])
    given = (ranks, str(folder), *arguments)
    mp.start_processes(function, given, ranks, start_method="forkserver")


def start(rank: int, world: int, folder: str, seconds: float = 60) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )


def batches(steps: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    shape = (8, 3, 5, 2)
    make = torch.randn
    return [
        (
            make(shape, generator=g, dtype=torch.float64) * 3 + 10,
            make(shape, generator=g, dtype=torch.float64),
        )
        for _ in range(steps)
    ]


def a_layer(cls: type) -> torch.nn.Module:
    layer = cls(3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.5, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    return layer


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def compare_with_one_process(rank: int, world: int, folder: str) -> None:
    """Write the largest differences between this rank's part and a single process's."""
    start(rank, world, folder)
    found: dict[str, float] = {}
    calls = {"all_gather": 0, "all_reduce": 0}

    def counted(name: str, call):
        def count(*args, **kwargs):
            calls[name] += 1
            return call(*args, **kwargs)

        return count

    dist.all_gather = counted("all_gather", dist.all_gather)
    dist.all_reduce = counted("all_reduce", dist.all_reduce)

    for shards in SHARDS[world]:
        part = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
        ours, whole = a_layer(SyncBatchNorm), a_layer(BatchNorm2d)
        for step, (x, dy) in enumerate(batches(), 1):
            ours.zero_grad()
            whole.zero_grad()
            calls.update(all_gather=0, all_reduce=0)
            mine = x[part].clone().requires_grad_()
            y = ours(mine)
            y.backward(dy[part])
            all_x = x.clone().requires_grad_()
            all_y = whole(all_x)
            all_y.backward(dy)
            differences = {
                "y": apart(y, all_y[part]),
                "dx": apart(mine.grad, all_x.grad[part]),
                "collectives": abs(calls["all_gather"] - 1) + abs(calls["all_reduce"] - 1),
            }
            for name in ("weight", "bias"):
                total = sync_sum(getattr(ours, name).grad)
                differences[f"sum over ranks of d{name}"] = apart(total, getattr(whole, name).grad)
            if step in (1, 2, STEPS):
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    differences[name] = apart(getattr(ours, name), getattr(whole, name))
            for name, value in differences.items():
                found[name] = max(found.get(name, 0.0), value)

    # Local gradients stay local: they are those of this rank's own samples.
    x, dy = batches(1)[0]
    layer, mine = a_layer(SyncBatchNorm), x[rank : rank + 1]
    layer(mine).backward(dy[rank : rank + 1])
    found["dbias is local"] = apart(layer.bias.grad, dy[rank].sum(dim=(1, 2)))

    # Evaluation needs no other rank: this one runs it alone.
    if rank == 0:
        calls.update(all_gather=0, all_reduce=0)
        layer.eval()(mine)
        found["collectives in evaluation"] = sum(calls.values())
    dist.barrier()

    if world == 4:  # two groups of two, each a batch of its own
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        own = rank // 2
        rows = slice(4 * own, 4 * own + 4)
        layer, whole = a_layer(SyncBatchNorm), a_layer(BatchNorm2d)
        layer.process_group = groups[own]
        mine = slice(2 * (rank % 2), 2 * (rank % 2) + 2)
        found["process groups"] = apart(layer(x[rows][mine]), whole(x[rows])[mine])
    torch.save(found, f"{folder}/rank{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SHARDS), ids="{} ranks".format)
def differences(request, tmp_path_factory) -> dict[str, float]:
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    run(world, compare_with_one_process, folder)
    found: dict[str, float] = {}
    for rank in range(world):
        for name, value in torch.load(folder / f"rank{rank}").items():
            found[name] = max(found.get(name, 0.0), value)
    return found


def test_ranks_together_equal_one_process(differences: dict[str, float]) -> None:
    assert {"y", "dx", "running_var", "sum over ranks of dweight"} <= differences.keys()
    assert {name: value for name, value in differences.items() if value > 1e-10} == {}


def a_model(sync: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 2),
    )
    return convert_batch_norm(model.double(), sync=sync)


def train(model: torch.nn.Module, rows: slice) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 5, 3, generator=g, dtype=torch.float64)
    labels = torch.arange(8) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def train_under_ddp(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    each = 8 // world
    rows = slice(rank * each, (rank + 1) * each)
    models = [a_model(sync=True) for _ in range(2)]
    models[1].compile(backend="eager")
    wrapped = [torch.nn.parallel.DistributedDataParallel(model) for model in models]
    torch.save([train(model, rows) for model in wrapped], f"{folder}/rank{rank}")
    dist.destroy_process_group()


def test_ddp_of_two_ranks_trains_as_one_process(tmp_path: Path) -> None:
    run(2, train_under_ddp, tmp_path)
    alone = train(a_model(sync=False), slice(None))
    for rank in range(2):
        for parameters in torch.load(tmp_path / f"rank{rank}"):  # eager, compiled
            for ours, expected in zip(parameters, alone, strict=True):
                assert apart(ours, expected) < 1e-10


def lose_a_rank(rank: int, world: int, folder: str, how: str, collective: str) -> None:
    start(rank, world, folder, seconds=2)
    layer = a_layer(SyncBatchNorm)
    x = batches(1)[0][0].requires_grad_()
    y = layer(x)
    if rank == 1 and how == "dead":
        return  # and the other rank waits in vain
    if rank == 1:
        time.sleep(4)
    begin = time.monotonic()
    for _ in range(2):  # a second try must not take what was sent for the first
        message = rf"{collective} failed on rank {rank} of 2: another rank"
        with pytest.raises(RuntimeError, match=message):
            layer(x) if collective == "all_gather" else y.sum().backward(retain_graph=True)
    assert time.monotonic() - begin < 5
    if rank == 0 and how == "late":
        time.sleep(4)  # alive when the other one comes
    dist.destroy_process_group()


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("how", ["dead", "late"])
def test_a_lost_rank_is_an_error_within_the_timeout(
    tmp_path: Path, how: str, collective: str
) -> None:
    run(2, lose_a_rank, tmp_path, how, collective)


def one_value_in_all(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    shape = (1, 3, 1, 1) if rank else (0, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel over all ranks"):
        SyncBatchNorm(3)(torch.zeros(shape))
    y = SyncBatchNorm(3)(torch.full((1, 3, 1, 1), float(rank)))  # one value each is two in all
    assert y.flatten().sign().tolist() == [2.0 * rank - 1] * 3

    layer = SyncBatchNorm(3, momentum=None)
    for samples in (0, 4 * rank, 0):  # nothing on any rank, nothing on the first
        layer(torch.arange(3.0 * samples).view(samples, 3, 1, 1))
    assert layer.num_batches_tracked == 1
    assert layer.running_var.tolist() == [15.0] * 3  # of 0, 3, 6, 9 and so on

    layer = SyncBatchNorm(3, momentum=1.0)  # sums of squares that float32 does not hold
    y = layer(torch.full((4000, 3, 4, 4), 1e17 * (2 * rank - 1)))
    torch.testing.assert_close(y, torch.full_like(y, 2 * rank - 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_var, torch.full((3,), 1e34), rtol=1e-4, atol=0)
    dist.destroy_process_group()


def test_what_all_ranks_together_have_counts(tmp_path: Path) -> None:
    run(2, one_value_in_all, tmp_path)


def test_without_a_process_group() -> None:
    local = bnlib.moments(torch.randn(4, 3))
    for call in (lambda: sync_moments(local), lambda: sync_sum(local.mean)):
        with pytest.raises(RuntimeError, match="call init_process_group first"):
            call()


def test_averaging_variances_is_wrong_where_shards_differ() -> None:
    """The mistake that merging avoids: what the test above would say of it."""
    x, _ = batches(1)[0]
    x[:4] += 5
    parts = [bnlib.moments(x[:4]), bnlib.moments(x[4:])]
    whole = bnlib.moments(x)
    assert apart(bnlib.merge(*parts).var(), whole.var()) < 1e-10
    assert apart((parts[0].var() + parts[1].var()) / 2, whole.var()) > 1
