"""Train on photo patches with two ranks, and show that they reproduce one process.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    python examples/train_ddp.py                        # one process: all three runs coincide

The same small convolutional network is trained three times from the same start on the same
batches, on the CPU: in one process that sees every batch whole; over the ranks with synchronised
batch norm; and over the ranks with each rank's own statistics. It ends with an error if the second
differs from the first by more than rounding.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnlib.book.datasets import photo_patches
from bnlib.nn import convert_batch_norm

# float64: rounding, which training amplifies, stays far below anything that could be an error.
DTYPE = torch.float64
TOLERANCE = 1e-9


def network(sync: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 8),
    )
    return convert_batch_norm(model.to(DTYPE), sync=sync)


def train(
    model: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace, rank: int, ranks: int
) -> list[float]:
    """Train on this rank's part of every batch; return every epoch's loss on its own part."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    shuffle = torch.Generator().manual_seed(1)  # the same order on every rank
    losses = []
    model.train()
    for _ in range(options.epochs):
        order = torch.randperm(len(x), generator=shuffle)
        batches = order.split(options.batch)[: options.steps]
        total = 0.0
        for batch in batches:
            mine = batch[rank::ranks]
            optimizer.zero_grad()
            # DDP averages the ranks' gradients: dividing each rank's sum by batch / ranks gives
            # every sample the same weight, however unevenly the batch splits.
            loss = nn.functional.cross_entropy(model(x[mine]), labels[mine], reduction="sum")
            (loss * ranks / len(batch)).backward()
            optimizer.step()
            total += loss.item() / len(batch)
        losses.append(total / len(batches))
    return losses


def over_ranks(
    sync: bool, x: Tensor, labels: Tensor, options: argparse.Namespace
) -> tuple[nn.Module, list[float]]:
    """Train over all ranks; the losses are those of the whole batches."""
    model = network(sync)
    if not dist.is_initialized():
        return model, train(model, x, labels, options, 0, 1)
    wrapped = DistributedDataParallel(model)
    losses = train(wrapped, x, labels, options, dist.get_rank(), dist.get_world_size())
    summed = torch.tensor(losses, dtype=DTYPE)
    dist.all_reduce(summed)
    return model, summed.tolist()


def apart(a: nn.Module, b: nn.Module) -> float:
    """The largest difference between two models' parameters and running statistics."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((model.eval()(x).argmax(dim=1) == labels).double().mean())


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--batch", type=positive, default=32, help="samples of all ranks together")
    parser.add_argument("--steps", type=positive, help="batches per epoch; the default is all")
    options = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets it
    if options.batch < ranks:
        parser.error(f"expected --batch of at least {ranks}, one per rank, got {options.batch}")

    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0

    images = photo_patches()
    x, test_x = (torch.from_numpy(a).to(DTYPE) for a in (images.train_x, images.test_x))
    labels, test_labels = (torch.from_numpy(a) for a in (images.train_y, images.test_y))

    # Every rank computes the reference: a collective must not keep the others waiting.
    alone = network(sync=False)
    alone_losses = train(alone, x, labels, options, 0, 1)
    synced, synced_losses = over_ranks(True, x, labels, options)
    own, own_losses = over_ranks(False, x, labels, options)

    difference = apart(synced, alone)
    if first:
        print(f"{ranks} rank{'s' if ranks > 1 else ''}, batches of {options.batch}\n")
        print("loss       one process   synchronised   own statistics")
        for epoch, row in enumerate(zip(alone_losses, synced_losses, own_losses, strict=True), 1):
            print("epoch {:2}  {:12.8f}   {:12.8f}     {:12.8f}".format(epoch, *row))
        scores = [accuracy(model, test_x, test_labels) for model in (alone, synced, own)]
        print("accuracy  {:12.4f}   {:12.4f}     {:12.4f}".format(*scores))
        print("\nlargest difference of a parameter or running statistic from one process:")
        print(f"  synchronised     {difference:.1e}")
        print(f"  own statistics   {apart(own, alone):.1e}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if not difference < TOLERANCE:
        raise SystemExit(f"expected a difference below {TOLERANCE}, got {difference}")


if __name__ == "__main__":
    main()
