"""Plain definitions of the nets that everybody explains: VGG11, with batch norm or not, ResNet18, a transformer."""

import torch
import torch.nn.functional as F
from tensordict.nn import TensorDictModule
from torch import nn


def vgg11(norm=False, width=64, classes=10, inplace=False):
    layers, channels = [], 3
    for step in (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"):
        if step == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, step * width, 3, padding=1))
        channels = step * width
        layers += [nn.BatchNorm2d(channels)] if norm else []
        layers.append(nn.ReLU(inplace))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4 * width), nn.ReLU(inplace)]
    return nn.Sequential(*layers, *head, nn.Linear(4 * width, classes))


class Block(nn.Module):
    def __init__(self, before, after, stride, inplace):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace)
        self.downsample = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self, width=64, classes=10, inplace=True):
        super().__init__()
        self.fc = nn.Linear(8 * width, classes)  # declared first: what counts is the order of execution
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(inplace), nn.MaxPool2d(3, 2, 1)
        sizes, blocks = [width, width, 2 * width, 4 * width, 8 * width], []
        for i in range(4):
            first = Block(sizes[i], sizes[i + 1], 1 if i == 0 else 2, inplace)
            blocks.append(nn.Sequential(first, Block(sizes[i + 1], sizes[i + 1], 1, inplace)))
        self.layers = nn.Sequential(*blocks)

    def forward(self, x):
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Canonical(nn.Module):
    """A :class:`ResNet18` of the same layers in the form that Zennit's canonizers are made for.

    The layers are declared in the order in which they run, and sums and means are modules.
    """

    def __init__(self, net, make_sum):
        super().__init__()
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.blocks = nn.Sequential(*(_CanonicalBlock(block, make_sum) for part in net.layers for block in part))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class _CanonicalBlock(nn.Module):
    def __init__(self, block, make_sum):
        super().__init__()
        self.main = nn.Sequential(block.conv1, block.bn1, block.relu, block.conv2, block.bn2)
        self.side = nn.Sequential() if block.downsample is None else block.downsample
        self.sum, self.relu = make_sum(dim=-1), nn.ReLU()

    def forward(self, x):
        return self.relu(self.sum(torch.stack([self.main(x), self.side(x)], -1)))


class TransformerBlock(nn.Module):
    """Pre-norm, with functional attention and a residual stream."""

    def __init__(self, width=8, heads=2, bias=True):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.up, self.down = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width, bias=bias)

    def forward(self, x):
        q, k, v = (
            t.reshape(*t.shape[:-1], self.heads, -1).transpose(-2, -3) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def prepared(net, bias=True, dtype=torch.float64, init=False):
    """In evaluation mode, with random batch-norm statistics; without any bias, and initialised as trained nets are.

    torch's own initialisation lets the values of a VGG shrink from layer to layer.
    """
    for module in net.modules():
        if init and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            if bias:
                module.running_mean.normal_(0, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
    if not bias:
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
    return net.eval().to(dtype)


def as_td(net, out="logits"):
    return TensorDictModule(net, ["x"], [out])
