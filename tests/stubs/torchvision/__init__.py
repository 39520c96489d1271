"""Stand-in for torchvision: the names that the oracles import."""

__version__ = "0.0.0"
