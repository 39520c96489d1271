"""Stand-in for timm.models.vision_transformer: PnPXAI looks for this class."""

from torch import nn


class Attention(nn.Module):
    """Never instantiated."""
