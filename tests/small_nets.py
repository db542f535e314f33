"""Published architectures in miniature, and small nets trained on the book's images."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from bnlib.book import datasets


def conv(inside, outside, size=3, stride=1, groups=1, bias=False):
    return nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=bias)


class Residual(nn.Module):
    """ResNet's block: basic, or a bottleneck; the last γ at 0 if asked."""

    def __init__(self, inside, width, stride=1, bottleneck=False, zero=False, norm=nn.BatchNorm2d):
        super().__init__()
        out = 4 * width if bottleneck else width
        sizes = [(inside, width, 1), (width, width, 3), (width, out, 1)]
        sizes = sizes if bottleneck else [(inside, width, 3), (width, out, 3)]
        self.convs = nn.ModuleList(
            conv(a, b, k, stride if k == 3 and i == len(sizes) - 2 else 1)
            for i, (a, b, k) in enumerate(sizes)
        )
        if not bottleneck:
            self.convs[0].stride = (stride, stride)
        self.norms = nn.ModuleList(norm(b) for _, b, _ in sizes)
        self.down = None
        if stride > 1 or inside != out:
            self.down = nn.Sequential(conv(inside, out, 1, stride), norm(out))
        if zero:
            nn.init.zeros_(self.norms[-1].weight)

    def forward(self, x):
        y = x
        for i, (one, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(one(y))
            y = F.relu(y) if i < len(self.convs) - 1 else y
        return F.relu(y + (x if self.down is None else self.down(x)))


def resnet(bottleneck=False, zero=False, channels=1, classes=10, width=8, norm=nn.BatchNorm2d):
    factor = 4 if bottleneck else 1
    return nn.Sequential(
        conv(channels, width),
        norm(width),
        nn.ReLU(inplace=True),
        Residual(width, width, 1, bottleneck, zero, norm),
        Residual(factor * width, 2 * width, 2, bottleneck, zero, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(factor * 2 * width, classes),
    )


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, inside, out, stride, expand=4):
        super().__init__()
        hidden = inside * expand
        self.same = stride == 1 and inside == out
        self.body = nn.Sequential(
            conv(inside, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            conv(hidden, hidden, 3, stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            conv(hidden, out, 1),
            nn.BatchNorm2d(out),
        )

    def forward(self, x):
        return x + self.body(x) if self.same else self.body(x)


def mobilenet(channels=1, classes=10):
    return nn.Sequential(
        conv(channels, 8),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        Inverted(8, 8, 1),
        Inverted(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, classes),
    )


def vgg(channels=1, classes=10, bias=True):
    """VGG-BN: its convolutions have a bias each, which the batch norms cancel."""
    layers = []
    for inside, out in ((channels, 8), (8, 16)):
        layers += [conv(inside, out, bias=bias), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))


class Dense(nn.Module):
    """DenseNet's block: batch norm comes first, on what is concatenated."""

    def __init__(self, inside, growth=4, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inside + i * growth),
                nn.ReLU(inplace=True),
                conv(inside + i * growth, 4 * growth, 1),
                nn.BatchNorm2d(4 * growth),
                nn.ReLU(inplace=True),
                conv(4 * growth, growth),
            )
            for i in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def densenet(channels=1, classes=10):
    return nn.Sequential(
        conv(channels, 8),
        Dense(8),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, classes),
    )


def mlp(channels=1, classes=10, size=64, **options):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size * channels, 32, bias=False),
        nn.BatchNorm1d(32, **options),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(32, 32, bias=False),
        nn.BatchNorm1d(32, **options),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def plain(channels=1, classes=10, norm=nn.BatchNorm2d, bias=False, **options):
    return nn.Sequential(
        conv(channels, 8, bias=bias),
        norm(8, **options),
        nn.ReLU(),
        conv(8, 16, stride=2),
        norm(16, **options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


@functools.cache
def images(name):
    found = getattr(datasets, name)()
    x, y = torch.from_numpy(found.train_x), torch.from_numpy(found.train_y)
    return x - x.mean((0, 2, 3), keepdim=True), y


def train(model, data="digits", steps=150, batch=32, rate=0.05, decay=5e-4, seed=0, make=None):
    """Train, and leave the model in training mode, as a loop does."""
    x, y = images(data)
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if make is None:
        optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
    else:
        optimizer = make(parameters)
    for _ in range(steps):
        chosen = torch.randperm(len(x))[:batch]
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model


def batches(data="digits", size=64, count=4):
    x, y = images(data)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[: size * count]
    return [(x[i], y[i]) for i in order.split(size)]
