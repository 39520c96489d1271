"""Composites: kinds, paths, globs, order, operations, what is missing, the table, and adding up."""

import pickle

import pytest
import torch
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.lrp import Composite, EpsilonPlus, EpsilonRule, FlatRule, IgnoreRule, PassRule, ZPlusRule


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))


def chosen(composite, module=None):
    return dict(composite.rules_for(module or net()).modules)


def test_types_paths_globs_and_predicates():
    plus, other, third = ZPlusRule(), EpsilonRule(0.5), EpsilonRule(0.1)
    rules = Composite({nn.Linear: plus, "2.*": other, "3": third, nn.ReLU: PassRule()})
    assert chosen(rules) == {"0": plus, "1": PassRule(), "2.0": other, "2.1": other, "3": third}
    by_predicate = Composite({lambda m: isinstance(m, nn.Linear) and m.out_features == 2: plus, nn.Linear: other})
    assert chosen(by_predicate) == {"0": other, "2.0": other, "3": plus}


def test_a_rule_covers_what_is_below():
    rules = Composite({nn.Linear: ZPlusRule(), "2": EpsilonRule()})
    assert chosen(rules) == {"0": ZPlusRule(), "2": EpsilonRule(), "3": ZPlusRule()}


def test_or_overrides():
    a, b = (
        Composite({nn.Linear: ZPlusRule()}, {"gelu": PassRule()}),
        Composite({"0": EpsilonRule()}, {"gelu": IgnoreRule()}),
    )
    assert chosen(a | b)["0"] == EpsilonRule()
    assert (a | b).operations["gelu"] == IgnoreRule()
    assert chosen(a | {nn.Linear: EpsilonRule()})["3"] == EpsilonRule()
    assert chosen(a | {"0": None})["0"] == IgnoreRule()


def test_first_in_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 1, bias=False), nn.Linear(3, 4, bias=False)

        def forward(self, x):
            return self.head(self.body(x))

    model, x = Backwards(), torch.randn(2, 3, requires_grad=True)
    rules = Composite({nn.Linear: ZPlusRule(1e-9)}, first=(nn.Linear, FlatRule(1e-9)))
    with rules.on(model, convention="relevance") as m:
        for _ in range(2):
            found = torch.autograd.grad(m(x), x, torch.ones(2, 1))[0]
            assert found.allclose(found[:, :1].expand(2, 3))  # every input gets the same


def test_operations_by_name_and_function():
    assert Composite(operations={torch.matmul: PassRule()}).operations == {"matmul": PassRule()}
    assert Composite(operations={torch.Tensor.__mul__: PassRule()}).operations == {"mul": PassRule()}


def test_missing_modules():
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU(), nn.Bilinear(2, 2, 2), nn.Embedding(3, 3))
    rules = {nn.Linear: EpsilonRule()}
    with pytest.raises(BadValue, match=r"1 \(PReLU\), 2 \(Bilinear\)[\s\S]*on_missing"):
        Composite(rules).on(model)
    with pytest.warns(UserWarning, match="PReLU"):
        Composite(rules, on_missing="warn").on(model)
    Composite(rules, on_missing="gradient").on(model)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return torch.special.i0(self.layer(x))


def test_missing_operations():
    x, rules = torch.randn(2, 3, requires_grad=True), {nn.Linear: EpsilonRule()}
    with pytest.raises(BadValue, match="the operation 'special_i0' without a rule"):
        Composite(rules).on(Unknown())(x)
    with pytest.warns(UserWarning, match="special_i0"), Composite(rules, on_missing="warn").on(Unknown()) as m:
        m(x)
    with Composite(rules, on_missing="gradient").on(Unknown()) as m:
        m(x)


def test_nothing_matches():
    with pytest.raises(BadValue, match="matches nothing"):
        Composite({nn.Conv2d: EpsilonRule()}, on_missing="gradient").on(net())
    with pytest.raises(BadKey, match=r"no module at path 'conv\.\*'"):
        Composite({"conv.*": EpsilonRule()}).on(net())


def test_bad_input():
    with pytest.raises(BadType, match="a rule, such as"):
        Composite({nn.Linear: "epsilon"})
    for wrong in (lambda: Composite([nn.Linear]), lambda: Composite(3), lambda: EpsilonPlus() | (lambda m: None)):
        with pytest.raises(BadType, match="no rules for kinds"):
            wrong()
    with pytest.raises(BadType, match="no rules for kinds"):
        Composite({nn.Linear: EpsilonRule()}, first=FlatRule())
    with pytest.raises(BadKey, match=r"no operation 'reshap'[\s\S]*'reshape'"):
        Composite(operations={"reshap": EpsilonRule()})
    with pytest.raises(BadValue, match="on_missing"):
        Composite(on_missing="ignore")
    with pytest.raises(BadValue, match="no such convention"):
        EpsilonPlus().on(net(), convention="both")


def test_the_table():
    text = EpsilonPlus().table(net())
    assert "0     " in text
    assert "EpsilonRule(epsilon=1e-06, zero_params=())" in text
    assert "path" in text.splitlines()[0]
    assert "convention" in repr(EpsilonPlus()).splitlines()[0]


def test_it_pickles():
    rules = Composite({nn.Linear: ZPlusRule(), "3": EpsilonRule()})
    assert chosen(pickle.loads(pickle.dumps(rules))) == chosen(rules)


def test_tied_modules_are_ruled_once():
    layer = nn.Linear(3, 3)
    assert chosen(Composite({nn.Linear: ZPlusRule()}), nn.Sequential(layer, layer)) == {"0": ZPlusRule()}
