"""Stand-in for torchvision.models.resnet: Zennit's canonizers look for these two classes."""

from torch import nn


class BasicBlock(nn.Module):
    """Never instantiated."""


class Bottleneck(nn.Module):
    """Never instantiated."""
