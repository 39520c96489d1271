"""The game that all methods of forward passes play: rows in flight, sites, parts of sites, held targets, progress."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Site, Target
from tdconcepts.errors import BadKey, BadType
from tdconcepts.perturbation import FeatureAblation, KernelShap, Lime, ShapleyExact, ShapleySampling


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 100])
def test_no_more_rows_than_chunk_size_are_in_flight(net, batch, chunk_size):
    seen = []
    handle = net[0].module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    whole = ShapleySampling(net, Target("logits", 0), generator=torch.Generator().manual_seed(0))(batch(5))
    seen.clear()
    torch.manual_seed(0)
    td = ShapleySampling(net, Target("logits", 0), generator=torch.Generator().manual_seed(0), chunk_size=chunk_size)(
        TensorDict(x=whole["x"], batch_size=[5])
    )
    handle.remove()
    assert max(seen) <= chunk_size
    torch.testing.assert_close(td["attribution", "x"], whole["attribution", "x"])


def test_a_site_and_an_entry_between_stages_are_games_of_their_own(net, batch):
    td = net(batch(3))
    explain = FeatureAblation(net, Target("logits", 2), ["x", "hidden", Site("1.0")])
    found = explain(td)["attribution"]
    head = net[1].module
    for key, value, rest in (("hidden", td["hidden"], head), ("1.0", td["hidden"].tanh(), head[1])):
        for i in range(5):
            changed = value.clone()
            changed[:, i] = 0
            torch.testing.assert_close(found[key][:, i], (rest(value) - rest(changed))[:, 2].detach())


def test_a_part_of_a_site_changes_that_part_alone(net, batch):
    td = batch(3)
    part = FeatureAblation(net, Target("logits", 2), Site("0.0", index=[1, 4]))(td)["attribution", "0.0[[1, 4]]"]
    whole = FeatureAblation(net, Target("logits", 2), Site("0.0"))(td)["attribution", "0.0"]
    torch.testing.assert_close(part, whole[:, [1, 4]])


def test_integer_entries_can_be_explained():
    table = nn.Embedding(7, 4)
    model = TensorDictModule(lambda tokens: table(tokens).sum((-1, -2)), ["tokens"], ["y"])
    model.table = table
    td = TensorDict(tokens=torch.tensor([[1, 2, 3], [4, 4, 0]]), batch_size=[2])
    found = FeatureAblation(model, Target("y"), baseline=5)(td)["attribution", "tokens"]
    expected = (table(td["tokens"]) - table(torch.tensor(5))).sum(-1)
    torch.testing.assert_close(found, expected.detach())


def test_argmax_is_chosen_once_at_the_row_itself(net, batch):
    td = batch(6)
    chosen = net(td.copy())["logits"].argmax(-1)
    found = FeatureAblation(net, Target("logits", "argmax"))(td.copy())["attribution", "x"]
    by = FeatureAblation(net, Target("logits", by="action"))(td.set("action", chosen))["attribution", "x"]
    torch.testing.assert_close(found, by)


def test_several_targets_are_the_loop(net, batch):
    td = batch(4)
    for cls, options in ((FeatureAblation, {}), (KernelShap, {})):
        many = cls(net, Target("logits", [2, 0]), **options)(td.copy())["attribution", "x"]
        each = [cls(net, Target("logits", i), **options)(td.copy())["attribution", "x"] for i in (2, 0)]
        torch.testing.assert_close(many, torch.stack(each, 1))


def test_outputs_are_those_of_one_run(net, batch):
    td = FeatureAblation(net, Target("logits", 0), outputs=True)(batch(3))
    torch.testing.assert_close(td["logits"], net(td.select("x"))["logits"].detach())


def test_the_graph_is_kept_on_request(net, batch):
    td = batch(3)
    td["x"].requires_grad_()
    assert not FeatureAblation(net, Target("logits", 0))(td.copy())["attribution", "x"].requires_grad
    found = FeatureAblation(net, Target("logits", 0), create_graph=True)(td.copy())["attribution", "x"]
    found.square().sum().backward()
    assert td["x"].grad.abs().sum() > 0


def test_progress_is_shown_on_request(net, batch, capsys):
    FeatureAblation(net, Target("logits", 0), chunk_size=3)(batch(3))
    assert capsys.readouterr().err == ""
    FeatureAblation(net, Target("logits", 0), chunk_size=3, progress=True)(batch(3))
    assert "forward passes" in capsys.readouterr().err


def test_bad_input(net, batch):
    with pytest.raises(BadType, match="no option 'masks'"):
        FeatureAblation(net, Target("logits", 0), masks=None)
    with pytest.raises(BadKey, match="no entry 'x'"):
        FeatureAblation(net, Target("logits", 0))(batch(2).exclude("x"))
    with pytest.raises(BadType, match="bare"):
        FeatureAblation(net[0].module, Target("logits", 0))


@pytest.mark.parametrize("method", [FeatureAblation, ShapleyExact])
@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]).expand(3, 4, 8),
        torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]).expand(3, 4, 8),
        torch.arange(4).view(4, 1).expand(3, 4, 8) - 1,
        torch.tensor([[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [1] * 8, [-1] * 8]).expand(3, 4, 8),
        torch.zeros(3, 4, 8, dtype=torch.long),
        torch.full((3, 4, 8), -1),
    ],
)
def test_features_of_many_elements_are_looked_up_once(method, mask):
    """The same as with the features of each element, which a mask for each row asks for."""
    torch.manual_seed(0)
    net = TensorDictModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(96, 5), torch.nn.Tanh()), "x", "y")
    td = TensorDict(x=torch.randn(2, 3, 4, 8), m=TensorDict(x=mask.expand(2, 3, 4, 8), batch_size=[2]), batch_size=[2])
    td["m", "x"] = td["m", "x"].clone()
    short = method(net, Target("y", 1), mask=mask)(td.copy())["attribution", "x"]
    assert torch.allclose(short, method(net, Target("y", 1), mask="m")(td.copy())["attribution", "x"], atol=1e-6)
    x, groups = td["x"], mask.unique()
    for g in groups[groups >= 0].tolist() if method is FeatureAblation else ():
        lost = net(TensorDict(x=x, batch_size=[2]))["y"] - net(TensorDict(x=x * (mask != g), batch_size=[2]))["y"]
        assert torch.allclose(short[:, mask == g], lost[:, 1:2].expand(2, int((mask == g).sum())), atol=1e-6)
    assert short[:, mask < 0].eq(0).all()


@pytest.mark.parametrize("method", [FeatureAblation, KernelShap, Lime, ShapleyExact, ShapleySampling])
def test_without_any_feature_all_scores_are_zero(net, batch, method):
    td = method(net, Target("logits", 0), mask=lambda row: torch.full(row, -1))(batch(3))
    assert td["attribution", "x"].eq(0).all()
    empty = TensorDict(x=torch.zeros(3, 0), batch_size=[3])
    found = method(TensorDictModule(lambda x: x.sum(-1), ["x"], ["y"]), Target("y"))(empty)["attribution", "x"]
    assert found.shape == (3, 0)
