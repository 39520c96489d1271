"""Relative input stability, against a loop over its formula."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.metrics.robustness import RIS


def explainer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    return Gradient(TensorDictModule(net, ["observation"], ["q"]), Target("q", by="action"), wrt="observation")


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_by_the_formula(chunk_size):
    explain = explainer()
    td = TensorDict(observation=torch.randn(2, 2, 3).double(), action=torch.randint(0, 2, (2, 2)), batch_size=[2, 2])
    td["observation"][0, 0, 0] = 0.0  # its relative change goes by the floor
    measure = RIS(
        explain, "observation", n_samples=6, generator=torch.Generator().manual_seed(5), chunk_size=chunk_size
    )
    found = measure(td.copy())["metric", "ris"]
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(5)).double()

    def attribution(x, a):
        return explain(TensorDict(observation=x, action=a, batch_size=[]))["attribution", "observation"]

    def relative(value, change):
        scale = torch.where(value.abs() < 1e-4, torch.full_like(value, 1e-4), value)
        return (change / scale).norm()

    for i in range(2):
        for j in range(2):
            x, a = td["observation"][i, j], td["action"][i, j]
            before, worst = attribution(x, a), 0.0
            for draw in noise:
                change = before - attribution(x + 0.05 * draw, a)
                worst = max(worst, relative(before, change) / max(relative(x, 0.05 * draw), 1e-4))
            torch.testing.assert_close(found[i, j], torch.as_tensor(worst))


def test_bad_input():
    explain = explainer()
    with pytest.raises(BadKey, match="does not explain 'action'"):
        RIS(explain, "action")
    with pytest.raises(BadValue, match="no noise"):
        RIS(explain, "observation", n_samples=0)
    td = TensorDict(observation=torch.zeros(2, 3).long(), action=torch.zeros(2).long(), batch_size=[2])
    with pytest.raises(BadType, match="floating-point"):
        RIS(explain, "observation")(td)
    with pytest.raises(BadKey, match="no entry 'observation'"):
        RIS(explain, "observation")(td.exclude("observation"))
