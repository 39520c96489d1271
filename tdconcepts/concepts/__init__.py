"""Models that speak in concepts."""

from __future__ import annotations

from tdconcepts.concepts.bottleneck import ConceptActivation, ConceptBottleneck
from tdconcepts.concepts.memory import MemorySelector, SelectorZU
from tdconcepts.concepts.spec import ConceptSpec

__all__ = ["ConceptActivation", "ConceptBottleneck", "ConceptSpec", "MemorySelector", "SelectorZU"]
