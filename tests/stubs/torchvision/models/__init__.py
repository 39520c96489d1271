"""Stand-in for torchvision.models."""
