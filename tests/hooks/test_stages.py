"""Stages: flattened, cut and pruned pipelines do what the whole does."""

import pytest
import torch
from hooks.nets import batch, linear, mlp, pipeline, twice
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import nn

from tdconcepts.errors import BadKey, BadType
from tdconcepts.hooks import Pullback, Site, Target, anchor, capture, check_module, cut, needed, stages
from tdconcepts.hooks.stages import containers, overlap, writer


class Drawn(torch.distributions.Categorical):
    """Counts how often it is drawn from."""

    count = 0

    def sample(self, *args):
        type(self).count += 1
        return super().sample(*args)

    @property
    def deterministic_sample(self):
        type(self).count += 1
        return self.mode


@pytest.fixture(autouse=True)
def nothing_drawn():
    Drawn.count = 0


def sampler(kind=InteractionType.RANDOM):
    return ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=Drawn, default_interaction_type=kind
    )


def to_logits():
    return [
        TensorDictModule(linear(4, 3, 0), ["x"], ["h"]),
        TensorDictModule(linear(3, 2, 1), ["h"], ["logits"]),
    ]


def actor(kind=InteractionType.RANDOM):
    return ProbabilisticTensorDictSequential(*to_logits(), sampler(kind))


def critic():
    return TensorDictModule(linear(3, 1, 2), ["h"], ["state_value"])


def after():
    return TensorDictModule(lambda action: action * 2, ["action"], ["twice"])


def run(parts, td):
    for part in parts:
        td = part(td)
    return td


# ---------------------------------------------------------------------------------------------------- flattened


@st.composite
def nested(draw, depth=3):
    """A pipeline of random nesting, whose stages add to the entry x."""
    number = st.integers(0, 9)

    def leaf(shift):
        return TensorDictModule(lambda x: 2 * x + shift, ["x"], ["x"])

    def make(depth):
        if not depth or draw(st.booleans()):
            return leaf(draw(number))
        return TensorDictSequential(*[make(depth - 1) for _ in range(draw(st.integers(1, 3)))])

    return make(depth)


@given(nested())
def test_the_stages_one_after_the_other_are_the_module(module):
    flat = stages(module)
    assert not any(isinstance(stage, TensorDictSequential) for stage in flat)
    assert run(flat, batch())["x"].equal(module(batch())["x"])
    assert [id(m) for m in flat] == [id(m) for m in module.modules() if type(m) is TensorDictModule]


@pytest.mark.parametrize("make", [mlp, twice, actor, critic])
def test_what_has_a_forward_of_its_own_is_one_stage(make):
    module = make()
    assert stages(module) == [module]


def test_sequentials_that_do_more_than_run_their_parts_are_one_stage():
    class Doubled(TensorDictSequential):
        def forward(self, tensordict):
            return super().forward(super().forward(tensordict))

    tolerant = TensorDictSequential(*pipeline(), partial_tolerant=True)
    selective = pipeline()
    selective.select_out_keys("y")
    watched = pipeline()
    watched.register_forward_hook(lambda module, args, out: None)
    for module in (Doubled(*pipeline()), tolerant, selective, watched):
        assert stages(module) == [module]
        assert stages(TensorDictSequential(module, after()))[0] is module
    assert len(stages(pipeline())) == 3


def test_our_own_taps_do_not_count_as_watching():
    net = pipeline()
    with anchor(net, "0"):
        assert len(stages(net)) == 3


def test_sequentials_of_names():
    net = TensorDictSequential({"enc": to_logits()[0], "head": to_logits()[1]})
    assert [stage.out_keys for stage in stages(net)] == [["h"], ["logits"]]
    assert len(cut(net, "h")[0]) == 1


# ---------------------------------------------------------------------------------------------------- cut


@pytest.mark.parametrize(("key", "lengths"), [("h", (1, 2)), ("z", (2, 1)), ("y", (3, 0)), (("z",), (2, 1))])
def test_cut(key, lengths):
    net = pipeline()
    for module in (net, TensorDictSequential(net), TensorDictSequential(TensorDictSequential(*net[:2]), net[2])):
        before, rest = cut(module, key)
        assert (len(before), len(rest)) == lengths
        td = run(before, batch())
        assert "y" not in td or not rest
        assert run(rest, td)["y"].equal(net(batch())["y"])


def test_cut_after_the_last_stage_that_writes():
    shift = TensorDictModule(lambda h: h + 1, ["h"], ["h"])
    net = TensorDictSequential(to_logits()[0], shift, to_logits()[1])
    assert [len(part) for part in cut(net, "h")] == [2, 1]
    assert writer(net, "h") is shift


def test_cut_opens_an_actor():
    policy = actor(InteractionType.DETERMINISTIC)
    before, rest = cut(policy, "logits")
    assert (len(before), len(rest)) == (2, 1)
    td = run(before, batch())
    td["logits"] = torch.tensor([[0.0, 1.0]]).expand(5, 2)
    assert run(rest, td)["action"].eq(1).all()


@pytest.mark.parametrize("module", [mlp, pipeline, actor])
def test_cut_at_a_key_that_no_stage_writes(module):
    for key in ("x", "hh", ("h", "h")):
        with pytest.raises(BadKey, match="no stage of the model writes") as error:
            cut(module(), key)
        assert "way out:" in str(error.value)
    with pytest.raises(BadKey, match="did you mean 'h'"):
        cut(pipeline(), "hh")


def test_the_writer_of_an_entry():
    net = TensorDictSequential(critic(), TensorDictSequential(actor(), after()))
    policy = net[1][0]
    assert writer(net, "logits") is policy[1]
    assert writer(net, "action") is policy[2]
    assert writer(net, "twice") is net[1][1]
    assert writer(net, "x") is None
    assert writer(mlp(), "y").out_keys == ["y"]


# ---------------------------------------------------------------------------------------------------- pruned


def outs(found):
    return [key for stage in found for key in stage.out_keys]


def test_only_what_an_output_needs_is_kept():
    net = TensorDictSequential(to_logits()[0], critic(), to_logits()[1], after())
    assert outs(needed(net, ["logits"])) == ["h", "logits"]
    assert outs(needed(net, ["state_value"])) == ["h", "state_value"]
    assert outs(needed(net, ["logits", "state_value"])) == ["h", "state_value", "logits"]
    assert outs(needed(net, ["h"])) == ["h"]
    assert outs(needed(net, ["h"], keep=[net[1].module])) == ["h", "state_value"]
    assert needed(net, []) == []


def test_an_entry_that_is_written_again():
    """The later one counts; the earlier one only where the later one reads it."""
    first, second = to_logits()[0], TensorDictModule(linear(4, 3, 5), ["x"], ["h"])
    onto = TensorDictModule(lambda h: h + 1, ["h"], ["h"])
    assert needed(TensorDictSequential(first, second), ["h"]) == [second]
    assert needed(TensorDictSequential(first, onto), ["h"]) == [first, onto]


def test_groups_of_entries():
    class Reads(nn.Module):
        def forward(self, agents):
            return agents["h"] * 2

    writes = TensorDictModule(linear(4, 3, 0), ["x"], [("agents", "h")])
    reads = TensorDictModule(Reads(), ["agents"], ["y"])
    net = TensorDictSequential(writes, reads)
    assert needed(net, ["y"]) == [writes, reads]
    td = batch()
    td["agents", "h"] = torch.zeros(5, 3)  # of an earlier call
    for given_td in (batch(), td):
        gradient = Pullback(net, Target("y", 1), "x").gradients(given_td)[0]
        assert gradient.equal(2 * writes.module.weight[1].detach().expand(5, 4))


@pytest.mark.parametrize(
    ("key", "keys", "expected"),
    [
        ("a", ["a"], True),
        ("a", [("a", "b")], True),
        (("a", "b"), ["a"], True),
        (("a", "b"), [("a", "c")], False),
        ("ab", ["a"], False),
        ("a", [], False),
    ],
)
def test_overlap(key, keys, expected):
    assert overlap(key, keys) is expected


NESTINGS = {
    "alone": lambda policy: policy,
    "in a sequential": lambda policy: TensorDictSequential(policy),
    "before others": lambda policy: TensorDictSequential(policy, after()),
    "deep": lambda policy: TensorDictSequential(TensorDictSequential(TensorDictSequential(policy), after())),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_logits_are_explained_without_drawing_an_action(nesting):
    net = NESTINGS[nesting](actor())
    state = torch.get_rng_state()
    gradients = Pullback(net, Target("logits", 1), ["x", "h"]).gradients(batch())
    assert Drawn.count == 0
    assert torch.get_rng_state().equal(state)
    w0, w1 = (stage.module.weight.detach() for stage in to_logits())
    torch.testing.assert_close(gradients[0], (w1[1] @ w0).expand(5, 4))
    torch.testing.assert_close(gradients[1], w1[1].expand(5, 3))


def test_what_needs_the_action_draws_it():
    net = TensorDictSequential(actor(InteractionType.DETERMINISTIC), after())
    assert outs(needed(net, ["twice"])) == [*actor().out_keys, "twice"]
    assert needed(net, ["action"]) == [net[0]]
    assert run(needed(net, ["twice"]), batch())["twice"].equal(net(batch())["twice"])


def test_a_site_behind_the_action_draws_it():
    net = TensorDictSequential(actor(), TensorDictModule(lambda a: a.float(), ["action"], ["f"]), critic())
    capture(net, "1", gradients=Target("state_value"))(batch())
    assert Drawn.count == 1
    Drawn.count = 0
    Pullback(net, Target("state_value"), Site("0.0")).gradients(batch())
    assert Drawn.count == 0


def test_hooks_of_the_user_on_a_container_are_not_passed_by():
    net, seen = actor(), []
    pull = Pullback(net, Target("logits", 0))
    handle = net.register_forward_hook(lambda module, args, out: seen.append(1))
    pull.gradients(batch())
    assert seen == [1]
    handle.remove()
    pull.gradients(batch())
    assert seen == [1]
    assert containers(net) == [net]
    assert [type(c) for c in containers(TensorDictSequential(actor(), after()))] == [
        TensorDictSequential,
        ProbabilisticTensorDictSequential,
    ]
    assert containers(mlp()) == []


def test_entries_of_pruned_stages_are_not_asked_for():
    extra = TensorDictModule(lambda h, extra: h + extra, ["h", "extra"], ["w"])
    net = TensorDictSequential(*to_logits(), extra)
    pull = Pullback(net, Target("logits", 0), "x")
    assert pull.in_keys == ["x"]
    expected = pull.gradients(batch())[0]
    with anchor(net, "0"):
        assert pull.gradients(batch())[0].equal(expected)
    with capture(net, "0"):
        assert pull.gradients(batch(extra=torch.ones(5, 3)))[0].equal(expected)


def test_torchrl_actors():
    modules = pytest.importorskip("torchrl.modules")
    net = TensorDictModule(nn.Sequential(linear(4, 3, 0), nn.Tanh(), linear(3, 2, 1)), ["observation"], ["logits"])
    policy = modules.ProbabilisticActor(
        net, in_keys=["logits"], out_keys=["action"], distribution_class=Drawn, default_interaction_type="random"
    )
    td = TensorDict(observation=batch()["x"], batch_size=[5])
    gradient = Pullback(policy, Target("logits", 1)).gradients(td)[0]
    assert Drawn.count == 0
    assert gradient.equal(Pullback(net, Target("logits", 1)).gradients(td)[0])
    assert [stage.out_keys for stage in cut(policy, "logits")[0]] == [["logits"]]
    found = capture(policy, "module.0.module.1")(td.clone())
    assert found["activation", "module.0.module.1"].shape == (5, 3)
    assert Drawn.count == 1


def test_torchrl_value_actors():
    modules = pytest.importorskip("torchrl.modules")
    data = pytest.importorskip("torchrl.data")
    net = nn.Sequential(linear(4, 3, 0), nn.Tanh(), linear(3, 2, 1))
    policy = modules.QValueActor(net, in_keys=["observation"], spec=data.OneHot(2))
    td = policy(TensorDict(observation=batch()["x"], batch_size=[5]))
    chosen = Pullback(policy, Target("action_value", by="action"), "observation").gradients(td)[0]
    best = Pullback(policy, Target("action_value", "argmax"), "observation").gradients(td)[0]
    value = Pullback(policy, Target("chosen_action_value"), "observation").gradients(td)[0]
    assert chosen.equal(best)
    torch.testing.assert_close(value, best)
    index = td["action_value"].argmax(-1)
    slope = (1 - net[1](net[0](td["observation"])).detach() ** 2) * net[2].weight[index].detach()
    torch.testing.assert_close(chosen, slope @ net[0].weight.detach())


# ---------------------------------------------------------------------------------------------------- what is no module


@pytest.mark.parametrize(
    "module", [nn.Linear(2, 2), len, None, "policy", torch.compile(nn.Linear(2, 2), backend="eager")]
)
def test_what_is_no_tensordict_module(module):
    with pytest.raises(BadType, match="policy is not a TensorDictModule") as error:
        check_module(module, "policy")
    assert "got:" in str(error.value)
    assert "needed:" in str(error.value)


def test_the_error_of_a_bare_module_shows_the_line_to_write():
    with pytest.raises(BadType, match="a bare Linear") as error:
        check_module(nn.Linear(2, 2))
    line = str(error.value).split("way out: ")[1]
    module = eval(line, {"TensorDictModule": TensorDictModule, "module": nn.Linear(4, 2)})
    assert isinstance(check_module(module), TensorDictModuleBase)
