"""The environment-factor test: what is salient and matters, what is salient and does not, and the numbers by hand."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.rl.factors import Factor, factor_test


def policy():
    def act(x):
        margin = x[..., 0] + 3.0 * x[..., 1] - 3.0 * x[..., 1].detach()  # the second: a gradient and no effect
        return torch.stack([margin, -margin], -1)

    return TensorDictModule(act, ["observation"], ["logits"])


def states():
    torch.manual_seed(0)
    return TensorDict(observation=torch.randn(6, 2, 3), batch_size=[6, 2])


def minus(i):
    sign = torch.ones(3)
    sign[i] = -1.0
    return lambda td: td.set("observation", td["observation"] * sign)


FACTORS = {name: Factor(minus(i), torch.arange(3) == i) for i, name in enumerate(["used", "loud", "absent"])}


def test_by_hand():
    td = states()
    found = factor_test(policy(), Gradient(policy(), Target("logits", 0)), td, FACTORS)
    x = td["observation"][..., 0]
    before, after = (torch.stack([s * x, -s * x], -1).softmax(-1) for s in (1, -1))
    torch.testing.assert_close(found.behaviour[0], (before - after).abs().sum(-1) / 2)
    assert found.behaviour[1:].abs().max() < 1e-6
    assert found.flips[0].all()
    assert not found.flips[1:].any()
    torch.testing.assert_close(found.share[:, 0, 0], torch.tensor([0.25, 0.75, 0.0]))
    assert (found.moved == 0).all()
    assert list(found.across_states()) == ["used", "loud", "absent"]
    assert found.across_factors().shape == (6, 2)
    assert (found.across_factors() <= 0.5 + 1e-6).all()  # the loudest does nothing
    headers, rows = found.rows()
    assert len(rows) == 3
    assert rows[1][:3] == ["loud", "0.750", "0.000"]
    assert all(len(row) == len(headers) for row in rows)


def test_a_place_that_moves_from_state_to_state():
    td = states()
    place = torch.zeros(6, 2, 3, dtype=torch.bool)
    place[..., 0] = True
    fixed = factor_test(policy(), Gradient(policy(), Target("logits", 0)), td, {"used": FACTORS["used"]})
    moving = factor_test(policy(), Gradient(policy(), Target("logits", 0)), td, {"used": Factor(minus(0), place)})
    assert torch.equal(fixed.share, moving.share)


def test_bad_input():
    td, explain = states(), Gradient(policy(), Target("logits", 0))
    with pytest.raises(BadValue, match="no factors"):
        factor_test(policy(), explain, td, {})
    with pytest.raises(BadType, match="the factor 'x' is none"):
        factor_test(policy(), explain, td, {"x": minus(0)})
    with pytest.raises(BadType, match="the place of 'x' is no tensor"):
        factor_test(policy(), explain, td, {"x": Factor(minus(0), [True] * 3)})
    with pytest.raises(BadType, match="not states"):
        factor_test(policy(), explain, None, FACTORS)
    with pytest.raises(BadValue, match="gives other states"):
        factor_test(policy(), explain, td, {"x": Factor(lambda t: t[0], torch.ones(3).bool())})
    with pytest.raises(BadValue, match="does not fit"):
        factor_test(policy(), explain, td, {"x": Factor(minus(0), torch.ones(2).bool())})
    with pytest.raises(BadKey, match="does not explain"):
        factor_test(policy(), policy(), td, FACTORS)
