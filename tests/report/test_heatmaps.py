"""Heat maps of experiments."""

import pytest
import torch

from tdconcepts.errors import BadType, BadValue
from tdconcepts.report import effect_map, heat_map

pytest.importorskip("matplotlib")


def cells(figure, axis=0):
    return figure.axes[axis].collections[0].get_array()


def test_rows_and_columns_are_where_their_names_say():
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, float("nan")]])
    figure = heat_map(values, ["a", "b"], ["x", "y", "z"], title="all")
    axis = figure.axes[0]
    assert cells(figure)[1, 0] == 3
    assert cells(figure).mask[1, 2]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "z"]
    assert axis.yaxis_inverted()
    assert axis.get_title() == "all"
    assert {text.get_text() for text in axis.texts} == {"0.00", "1.00", "2.00", "3.00", "4.00"}


def test_several_maps_share_their_colours():
    figure = heat_map({"one": torch.tensor([[1.0]]), "two": torch.tensor([[-4.0]])}, ["a"], ["x"])
    assert [axis.collections[0].get_clim() for axis in figure.axes[:2]] == [(-4.0, 4.0)] * 2


def test_effects_are_placed_by_name_and_averaged():
    names = ["blocks.0[0, :]", "blocks.0[10, :]", "blocks.1[0, :]", "blocks.1[2, :]", "out"]
    effect = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, float("inf"), 6.0, 7.0]])
    figure = effect_map(effect, names)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "2", "10", ""]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["blocks.0", "blocks.1", "out"]
    found = cells(figure)
    assert found[0].tolist() == [2.0, None, 3.0, None]
    assert found[1].tolist() == [3.0, 5.0, None, None]
    assert found[2, 3] == 6.0


def test_of_experiments():
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torch import nn

    from tdconcepts import Site, Target, ablation_effects

    net = TensorDictModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), ["x"], ["y"])
    td = TensorDict(x=torch.randn(5, 3), batch_size=[5])
    effects = ablation_effects(net, [Site("0"), Site("1")], Target("y", 0))
    effect = effects(td)["ablation", "effect"]
    found = cells(effect_map(effect, effects.sweep.names(td)))
    torch.testing.assert_close(torch.tensor(found.tolist()), effect.mean(0).view(2, 4))


def test_errors():
    with pytest.raises(BadValue, match="nothing to draw"):
        heat_map({}, ["a"], ["x"])
    for act in (lambda: heat_map("x", ["a"], ["b"]), lambda: effect_map(None, ["a"])):
        with pytest.raises(BadType, match="holds no numbers"):
            act()
    with pytest.raises(BadValue, match="fit its names"):
        heat_map(torch.zeros(2, 2), ["a"], ["x", "y"])
    with pytest.raises(BadValue, match="names do not fit"):
        effect_map(torch.zeros(3, 2), ["a"])
    with pytest.raises(BadValue, match="one cell"):
        effect_map(torch.zeros(3, 2), ["a[1]", "a[1]"])
