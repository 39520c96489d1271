"""AIM, AUM, PGI and PGU against loops over their formulas, and against the truth of a policy that is known."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.metrics.faithfulness import AIM, AUM, PGI, PGU, ranked

KEY = ("attribution", "observation")


def policy():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return TensorDictModule(net, ["observation"], ["logits"])


def rows(batch=(4, 3)):
    torch.manual_seed(1)
    td = TensorDict(observation=torch.randn(*batch, 5).double(), batch_size=batch)
    td["action"] = torch.randint(0, 3, batch)
    return Gradient(policy(), Target("logits", by="action"), wrt="observation")(td)


@pytest.mark.parametrize(("k", "count"), [(1, 1), (3, 3), (0.4, 2), (1.0, 5)])
@pytest.mark.parametrize(("make", "least"), [(AIM, False), (AUM, True)])
def test_masking_by_the_formula(make, least, k, count):
    module, td = policy(), rows()
    found = make(module, k=k, baseline=0.5)(td.copy())["metric", make.name]
    for place in ((i, j) for i in range(4) for j in range(3)):
        x, order = td["observation"][place], td[KEY][place].abs().argsort(descending=not least)
        hidden = x.clone()
        hidden[order[:count]] = 0.5
        assert found[place] == float(module.module(x).argmax() == module.module(hidden).argmax())


@pytest.mark.parametrize("chunk_size", [None, 12, 30])
@pytest.mark.parametrize(("make", "least"), [(PGI, False), (PGU, True)])
def test_gaps_by_the_formula(make, least, chunk_size):
    module, td = policy(), rows()
    target = Target("logits", by="action")
    options = {"noise_level": 0.3, "n_samples": 4, "chunk_size": chunk_size}
    found = make(module, target, k=2, generator=torch.Generator().manual_seed(3), **options)(td.copy())
    noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    for place in ((i, j) for i in range(4) for j in range(3)):
        x, a = td["observation"][place], td["action"][place]
        chosen = td[KEY][place].abs().argsort(descending=not least)[:2]
        gap = 0.0
        for draw in noise:
            moved = x.clone()
            moved[chosen] += 0.3 * draw[chosen]
            gap += (module.module(x)[a] - module.module(moved)[a]).abs() / 4
        torch.testing.assert_close(found["metric", make.name][place], gap)


def test_a_true_explanation_beats_a_false_one():
    module = TensorDictModule(lambda x: torch.stack([x[..., 0], -x[..., 0]], -1), ["observation"], ["logits"])
    torch.manual_seed(0)
    td = TensorDict(observation=torch.randn(200, 3), batch_size=[200])
    true, false = torch.tensor([1.0, 0.0, 0.0]).expand(200, 3), torch.tensor([0.0, 0.1, 1.0]).expand(200, 3)
    for scores, better in ((true, True), (false, False)):
        td[KEY] = scores
        aim, aum = (
            AIM(module, k=1)(td.copy())["metric", "aim"].mean(),
            AUM(module, k=2)(td.copy())["metric", "aum"].mean(),
        )
        pgi = PGI(module, Target("logits", 0))(td.copy())["metric", "pgi"].mean()
        pgu = PGU(module, Target("logits", 0))(td.copy())["metric", "pgu"].mean()
        assert (aim < aum) == better
        assert (pgi > pgu) == better


def test_several_entries_are_ranked_together():
    assert ranked([torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 3.0]])], 1).tolist() == [[3, 0, 2, 1]]
    module = TensorDictModule(lambda x, y: x + y, ["x", "y"], ["logits"])
    td = TensorDict(x=torch.tensor([[2.0, 0.0]]), y=torch.tensor([[0.0, 1.0]]), batch_size=[1])
    td["attribution", "x"], td["attribution", "y"] = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert AIM(module)(td)["metric", "aim"].item() == 0.0
    assert AUM(module)(td)["metric", "aum"].item() == 1.0


def test_bad_input():
    module, td = policy(), rows()
    for k in (0, 1.5, True, -1):
        with pytest.raises(BadValue, match="not a number of features"):
            AIM(module, k=k)
    with pytest.raises(BadValue, match="more features than there are"):
        AIM(module, k=6)(td)
    with pytest.raises(BadKey, match="'attribution', 'observation'"):
        AIM(module)(td.exclude("attribution"))
    with pytest.raises(BadValue, match="has another shape"):
        AIM(module)(td.copy().set(KEY, torch.zeros(4, 3, 2, 5)))
    with pytest.raises(BadKey, match="reads no entry 'state'"):
        AIM(module, wrt="state")
    with pytest.raises(BadValue, match="no noise"):
        PGI(module, Target("logits", 0), noise_level=0.0)
    with pytest.raises(BadType, match="no option"):
        PGI(module, Target("logits", 0), baseline=0.0)
