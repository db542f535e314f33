"""ResNet-50 (He et al., 2016), with what follows each batch norm fused into it where it can be."""

import torch

import bnlib.nn

# The shapes of the 53 batch norms: (C, H = W), and how many layers have it.
SHAPES = {(64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5}
SHAPES |= {(256, 28): 1, (256, 14): 11, (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4}


class Bottleneck(torch.nn.Module):
    """Three convolutions with batch norm, and a shortcut."""

    def __init__(self, inside, width, stride):
        super().__init__()
        outside = 4 * width
        self.conv1 = torch.nn.Conv2d(inside, width, 1, bias=False)
        self.conv2 = torch.nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = torch.nn.Conv2d(width, outside, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = map(torch.nn.BatchNorm2d, (width, width, outside))
        self.down = None
        if stride > 1 or inside != outside:
            conv = torch.nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.down = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(outside))

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        y = norm_relu(self.bn1, self.conv1(x))
        y = norm_relu(self.bn2, self.conv2(y))
        return norm_relu(self.bn3, self.conv3(y), shortcut)


def norm_relu(bn, x, residual=None):
    """Fused where the module can, else one after the other, as torchvision does."""
    if isinstance(bn, bnlib.nn.BatchNorm2d):
        return bn(x, residual, "relu")
    y = bn(x)
    return torch.nn.functional.relu(y if residual is None else y.add_(residual), inplace=True)


class ResNet50(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn = torch.nn.BatchNorm2d(width)
        blocks, inside = [], width
        for scale, count, stride in ((1, 3, 1), (2, 4, 2), (4, 6, 2), (8, 3, 2)):
            for i in range(count):
                blocks.append(Bottleneck(inside, scale * width, stride if i == 0 else 1))
                inside = 4 * scale * width
        self.blocks = torch.nn.Sequential(*blocks)
        self.fc = torch.nn.Linear(inside, 1000)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(norm_relu(self.bn, self.conv(x)), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))
