"""The conservation report."""

import torch
from torch import nn

from tdconcepts.lrp import Conservation, EpsilonRule, FlatRule


def test_lines():
    report = Conservation()
    report("a", EpsilonRule(), "out", torch.tensor([2.0, 2.0]))
    report("a", EpsilonRule(), "in", torch.tensor([1.0]))
    report("b", FlatRule(), "out", torch.tensor([0.0]))
    assert report.lines["a"].kept == 0.25
    assert report.lines["b"].kept != report.lines["b"].kept
    assert repr(report).splitlines()[-1].startswith("a ")
    report.clear()
    assert not report.lines
    assert isinstance(nn.ReLU(), nn.Module)
