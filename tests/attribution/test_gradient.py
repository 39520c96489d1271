"""Gradients against differences, against the formulas by hand, and against Captum 0.9."""

import pytest
import torch
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn

from tdconcepts import Gradient, InputXGradient, Saliency, Site, Target
from tdconcepts.errors import BadKey, BadType, BadValue


def differences(f, x, step=1e-6):
    """The gradient of ``f: [n] -> number`` at each row of ``x [B, n]``, by central differences."""
    return torch.stack(
        [
            torch.stack([(f(row + step * e) - f(row - step * e)) / (2 * step) for e in torch.eye(len(row)).to(row)])
            for row in x
        ]
    )


def close(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("index", [0, 2, -1])
def test_gradient_is_the_limit_of_differences(net, batch, index):
    td = Gradient(net, Target("logits", index))(batch(3))
    with torch.no_grad():
        slow = differences(lambda row: net.module(row)[index], td["x"])
    close(td["attribution", "x"], slow, 1e-8)


def test_gradient_with_respect_to_a_site_and_to_an_entry_between_stages(pipeline, batch):
    td = Gradient(pipeline, Target("logits", 1), ["hidden", Site("1.0")])(pipeline(batch(3)))
    head = pipeline[1].module
    with torch.no_grad():
        close(td["attribution", "hidden"], differences(lambda row: head(row)[1], td["hidden"]), 1e-8)
        close(td["attribution", "1.0"], differences(lambda row: head[1](row)[1], head[0](td["hidden"])), 1e-8)


def test_saliency_and_input_x_gradient_are_what_they_say(pipeline, batch):
    wrt = ["x", "z", "hidden", Site("1.0")]
    td = pipeline(batch(4))
    gradient, size, product = (
        cls(pipeline, Target("logits", 2), wrt)(td.copy())["attribution"]
        for cls in (Gradient, Saliency, InputXGradient)
    )
    values = {"x": td["x"], "z": td["z"], "hidden": td["hidden"], "1.0": pipeline[1].module[0](td["hidden"])}
    for key, value in values.items():
        close(size[key], gradient[key].abs())
        close(product[key], value.detach() * gradient[key])


def test_input_x_gradient_before_an_in_place_operation_takes_the_value_before_it(net, batch):
    td = InputXGradient(net, Target("logits", 0), Site("0"))(batch(5))
    before = net.module[0](td["x"]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.module[2:](before.relu())[:, 0].sum(), before)
    assert (before < 0).any()
    close(td["attribution", "0"], before.detach() * gradient)


@pytest.mark.parametrize("size", [(), (1,), (3,), (2, 3), (2, 1, 2)])
def test_a_site_before_an_in_place_operation_under_any_batch(net, batch, size):
    td = batch(*size)
    found = Gradient(net, Target("logits", 0), Site("0"))(td)["attribution", "0"]
    flat = TensorDict(x=td["x"].reshape(-1, 4), batch_size=[td.numel()])
    close(found.reshape(-1, 8), Gradient(net, Target("logits", 0), Site("0"))(flat)["attribution", "0"])


def test_an_addition_in_place_in_the_forward(batch):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            h = self.first(x)
            h += 1
            h *= h.detach().sign()
            return self.last(h)

    model = Adds()
    module, target = TensorDictModule(model, ["x"], ["logits"]), Target("logits", 1)
    td = Gradient(module, target, ["x", Site("first")])(batch(4))
    first = model.first(td["x"]).detach()
    at_first = model.last.weight[1].detach() * (first + 1).sign()
    close(td["attribution", "first"], at_first)
    close(td["attribution", "x"], (at_first @ model.first.weight).detach())
    InputXGradient(module, target, Site("first"))(td)
    close(td["attribution", "first"], first * at_first)  # the value as it was before the addition


# ---------------------------------------------------------------------------------------- Captum


@pytest.mark.parametrize("absolute", [True, False])
def test_saliency_of_captum(net, batch, absolute):
    captum = oracle("captum.attr").Saliency(net.module)
    td = batch(6)
    ours = (Saliency if absolute else Gradient)(net, Target("logits", by="action"))(td)["attribution", "x"]
    theirs = captum.attribute(td["x"].clone().requires_grad_(), target=td["action"], abs=absolute)
    close(ours, theirs.detach())


def test_input_x_gradient_of_captum_for_entries_and_layers(net, batch):
    captum = oracle("captum.attr")
    td = InputXGradient(net, Target("logits", 2), ["x", Site("2"), Site("4", "input")])(batch(6))
    theirs = captum.InputXGradient(net.module).attribute(td["x"].clone().requires_grad_(), target=2)
    close(td["attribution", "x"], theirs.detach())
    layer = captum.LayerGradientXActivation(net.module, net.module[2]).attribute(td["x"], target=2)
    close(td["attribution", "2"], layer.detach())
    layer = captum.LayerGradientXActivation(net.module, net.module[4])
    close(td["attribution", "4:in"], layer.attribute(td["x"], target=2, attribute_to_layer_input=True).detach())


# ---------------------------------------------------------------------------------------- targets


def value_of_second(value, td):
    return value[..., 1]


@pytest.mark.parametrize("cls", [Gradient, Saliency, InputXGradient])
@pytest.mark.parametrize(
    "select", [[0, 2], range(3), slice(0, 2), ["argmax", 1, value_of_second], [(2,), (0,)], (slice(1, 3),)]
)
def test_many_targets_are_the_loop(net, batch, cls, select):
    wrt, td = ["x", Site("0"), Site("3")], batch(5)
    if isinstance(select, list):
        loop = select
    else:
        loop = list(range(3)[select[0] if isinstance(select, tuple) else select]) if select != range(3) else [0, 1, 2]
    many = cls(net, Target("logits", select), wrt)(td.copy())["attribution"]
    each = [cls(net, Target("logits", one), wrt)(td.copy())["attribution"] for one in loop]
    for key in ("x", "0", "3"):
        close(many[key], torch.stack([one[key] for one in each], 1))


def test_many_neurons_of_images_are_the_loop():
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 5)).double()
    cnn = TensorDictModule(layers, ["image"], ["logits"])
    td = TensorDict(image=torch.randn(3, 2, 6, 6, dtype=torch.float64), batch_size=[3])
    places = [(0, 1, 1), (2, 0, -1)]
    many = Gradient(cnn, Target(Site("0"), places))(td.copy())["attribution", "image"]
    assert many.shape == (3, 2, 2, 6, 6)
    for position, place in enumerate(places):
        one = Gradient(cnn, Target(Site("0"), place))(td.copy())["attribution", "image"]
        close(many[:, position], one)


@pytest.mark.parametrize("form", ["index", "column", "int32", "onehot", "onehot bool"])
def test_the_logged_action_in_every_form(net, batch, form):
    td = batch(6)
    chosen = td["action"]
    onehot = nn.functional.one_hot(chosen, 3)
    forms = {"index": chosen, "column": chosen[:, None], "int32": chosen.int(), "onehot": onehot}
    td["action"] = forms.get(form, onehot.bool())
    found = Gradient(net, Target("logits", by="action"))(td)["attribution", "x"]
    each = [Gradient(net, Target("logits", int(a)))(td[i].copy())["attribution", "x"] for i, a in enumerate(chosen)]
    close(found, torch.stack(each))


class Contrast:
    """What the chosen action is worth more than the best one."""

    in_keys = ["action"]  # noqa: RUF012

    def __call__(self, value, td):
        return value.gather(-1, td["action"][..., None])[..., 0] - value.amax(-1)


def test_a_callable_sees_the_entries_that_it_names(net, batch):
    td = batch(6)
    explain = Gradient(net, Target("logits", Contrast()))
    assert explain.in_keys == ["x", "action"]
    found = explain(td.copy())["attribution", "x"]
    chosen = Gradient(net, Target("logits", by="action"))(td.copy())["attribution", "x"]
    best = Gradient(net, Target("logits", "argmax"))(td.copy())["attribution", "x"]
    close(found, chosen - best)


def test_an_input_that_does_not_matter_has_zeros(batch):
    model = TensorDictModule(lambda x, z: x.sin().sum(-1), ["x", "z"], ["value"])
    for target in (Target("value"), Target("value", [lambda v, td: v, lambda v, td: 2 * v])):
        td = Gradient(model, target)(batch(3))
        assert td["attribution", "x"].abs().min() > 0
        assert torch.equal(td["attribution", "z"], torch.zeros_like(td["attribution", "z"]))


# ---------------------------------------------------------------------------------------- policies


class Counted(torch.distributions.Categorical):
    """Counts its samples."""

    drawn = 0

    def sample(self, *args, **kwargs):
        Counted.drawn += 1
        return super().sample(*args, **kwargs)


@pytest.fixture
def policy(net):
    Counted.drawn = 0
    head = ProbabilisticTensorDictModule(
        ["logits"], ["action"], distribution_class=Counted, default_interaction_type="random"
    )
    return ProbabilisticTensorDictSequential(net, head)


def test_explaining_logits_samples_no_action(policy, batch):
    td = batch(5)
    logged = td["action"].clone()
    state = torch.get_rng_state()
    Gradient(policy, Target("logits", by="action"))(td)
    assert Counted.drawn == 0
    assert torch.equal(td["action"], logged)
    assert "logits" not in td
    assert torch.equal(torch.get_rng_state(), state)


def test_an_explained_policy_is_the_policy(policy, batch):
    explained = Gradient(policy, Target("logits", by="action"), outputs=True)
    assert explained.in_keys == ["x"]
    assert explained.out_keys == [("attribution", "x"), "logits", "action"]
    td = batch(20).exclude("action")
    torch.manual_seed(1)
    bare = policy(td.copy())
    torch.manual_seed(1)
    with torch.no_grad():
        found = explained(td.copy())
    assert Counted.drawn == 2
    close(found["logits"], bare["logits"].detach())
    assert torch.equal(found["action"], bare["action"])
    assert not found["logits"].requires_grad
    again = Gradient(policy, Target("logits", by="action"))(found.copy())
    close(found["attribution", "x"], again["attribution", "x"])


def test_an_explained_actor_in_a_rollout_and_a_collector():
    pytest.importorskip("gymnasium")
    collectors = pytest.importorskip("torchrl.collectors")
    rl = pytest.importorskip("tdconcepts.rl")
    actor = rl.cartpole_policy()
    explained = Gradient(actor, Target("logits", by="action"), "observation", outputs=True)
    env = rl.cartpole_env(2, seed=0)
    rollout = env.rollout(6, explained, break_when_any_done=False)
    options = {"frames_per_batch": 12, "total_frames": 12, "auto_register_policy_transforms": False}
    collector = collectors.Collector(env, explained, **options)
    collected = next(iter(collector))
    collector.shutdown()
    for td in (rollout, collected):
        assert td["attribution", "observation"].shape == td["observation"].shape == (2, 6, 4)
        after = Gradient(actor, Target("logits", by="action"), "observation")(td.copy())
        torch.testing.assert_close(after["attribution", "observation"], td["attribution", "observation"])
        assert set(td["action"].unique().tolist()) <= {0, 1}


# ---------------------------------------------------------------------------------------- the graph


def test_second_derivatives():
    cube = TensorDictModule(lambda x: x.pow(3).sum(-1), ["x"], ["y"])
    td = TensorDict(x=torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True), batch_size=[1])
    for cls, factor in ((Gradient, 6.0), (InputXGradient, 9.0)):
        made = cls(cube, Target("y"), create_graph=True)(td.copy())["attribution", "x"]
        (second,) = torch.autograd.grad(made.sum(), td["x"])
        power = 1 if cls is Gradient else 2  # Captum's InputXGradient keeps half of its own derivative
        close(second, factor * td["x"].detach().pow(power))


def test_a_penalty_on_gradients_trains_the_model(net, batch):
    found = Gradient(net, Target("logits", [0, 1]), ["x", Site("3")], create_graph=True)(batch(4))["attribution"]
    (found["x"].square().sum() + found["3"].square().sum()).backward()
    grads = [p.grad for name, p in net.named_parameters() if "weight" in name]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_nothing_is_left_on_parameters_or_inputs(net, batch):
    td = batch(3)
    td["x"].requires_grad_()
    Gradient(net, Target("logits", 0))(td)
    assert td["x"].grad is None
    assert all(p.grad is None for p in net.parameters())
    assert not td["attribution", "x"].requires_grad


def test_results_are_tensors_of_their_own(batch):
    """Autograd gives an expanded tensor for a sum, and one tensor to both terms of an addition."""
    total = TensorDictModule(lambda x: x.sum(-1), ["x"], ["y"])
    Gradient(total, Target("y"))(td := batch(3))
    td["attribution", "x"].mul_(2)
    both = TensorDictModule(lambda x, z: (x[..., :2] + z).sum(-1), ["x", "z"], ["y"])
    Gradient(both, Target("y"), ["x", "z"])(td)
    td["attribution", "x"].zero_()
    assert td["attribution", "z"].eq(1).all()


# ---------------------------------------------------------------------------------------- rows in flight


@pytest.mark.parametrize(
    ("size", "chunk", "peak"), [((7,), 3, 3), ((7,), 1, 1), ((2, 9), 4, 4), ((), 1, 1), ((3, 2), 4, 4)]
)
def test_rows_in_flight(net, batch, rows_seen, size, chunk, peak):
    """A chunk never has more rows than it may, whatever the batch dims."""
    td = batch(*size)
    whole = Gradient(net, Target("logits", [0, 1, 2]), ["x", Site("0")])(td.copy())["attribution"]
    with rows_seen(net.module[0]) as seen:
        found = Gradient(net, Target("logits", [0, 1, 2]), ["x", Site("0")], chunk_size=chunk)(td)["attribution"]
    assert max(seen) == peak
    assert sum(seen) == td.numel()
    close(found["x"], whole["x"])
    close(found["0"], whole["0"])


def test_the_model_runs_once_for_all_targets(net, batch, rows_seen):
    with rows_seen(net.module[0]) as seen:
        Gradient(net, Target("logits", [0, 1, 2]), ["x", Site("0")], outputs=True)(batch(5))
    assert seen == [5]


# ---------------------------------------------------------------------------------------- what is in the table


def test_integer_inputs_are_explained_at_the_embedding():
    layers = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(-2), nn.Linear(12, 2)).double()
    model = TensorDictModule(layers, ["tokens"], ["logits"])
    td = TensorDict(tokens=torch.randint(0, 7, (5, 4)), batch_size=[5])
    with pytest.raises(BadType, match=r"(?s)'tokens'.*int64.*Site"):
        Gradient(model, Target("logits", 0))(td)
    assert list(td.keys()) == ["tokens"]
    found = Gradient(model, Target("logits", 0), Site("0"))(td)["attribution", "0"]
    close(found, layers[2].weight[0].detach().view(4, 3).expand(5, 4, 3))


def test_a_lazy_stack_is_explained_like_a_dense_one(net, batch):
    dense = batch(4)
    lazy = TensorDict.lazy_stack(list(dense.clone().unbind(0)))
    found = Gradient(net, Target("logits", 1))(lazy)
    assert found is lazy
    close(lazy["attribution", "x"], Gradient(net, Target("logits", 1))(dense)["attribution", "x"])


def test_out_key(net, batch):
    explain = Gradient(net, Target("logits", 0), ["x", Site("3")], out_key=("why", "first"))
    assert explain.out_keys == [("why", "first", "x"), ("why", "first", "3")]
    assert explain(batch(2))["why", "first", "x"].shape == (2, 4)


def test_explanations_of_two_targets_live_side_by_side(net, batch):
    """Stages of one pipeline: the model, and two explainers after it."""
    target = Target("logits", 0)
    both = TensorDictSequential(net, Gradient(net, target, out_key="a"), Saliency(net, target, out_key="b"))
    td = both(batch(3))
    assert both.out_keys == ["logits", ("a", "x"), ("b", "x")]
    close(td["a", "x"].abs(), td["b", "x"])


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda net: Gradient(net.module, Target("logits", 0)), BadType, "TensorDictModule\\(module, in_keys"),
        (lambda net: Gradient(net, "logits"), BadType, "not a Target"),
        (lambda net: Gradient(net, Target("logit", 0)), BadKey, "did you mean 'logits'"),
        (lambda net: Gradient(net, Target(Site("9"), 0)), BadKey, "no module at path '9'"),
        (lambda net: Gradient(net, Target("logits", 0), "observation"), BadKey, "'observation'"),
        (lambda net: Gradient(net, Target("logits", 0), Site("layer")), BadKey, "no module at path 'layer'"),
        (lambda net: Gradient(net, Target("logits", 0), Site("*")), BadValue, "several places"),
        (lambda net: Gradient(net, Target("logits", 0), ["x", "x"]), BadValue, "twice"),
        (lambda net: Gradient(net, Target("logits", 0), []), BadValue, "nothing to explain by"),
        (lambda net: Gradient(net, Target("logits", 0), 3), BadKey, "3"),
        (lambda net: Gradient(net, Target("logits", 0), chunksize=3), BadType, "did you mean 'chunk_size'"),
        (lambda net: Gradient(net, Target("logits", 0), chunk_size=0), BadValue, "chunk size"),
        (lambda net: Gradient(net, Target("logits", 0), chunk_size=2.0), BadValue, "chunk size"),
        (lambda net: Gradient(net, Target("logits", 0), out_key="x"), BadKey, "out_key="),
        (lambda net: Gradient(net, Target("logits", 0), out_key=""), BadKey, "not a key"),
    ],
)
def test_bad_builds(net, build, error, text):
    with pytest.raises(error, match=text):
        build(net)


@pytest.mark.parametrize(
    ("target", "change", "error", "text"),
    [
        (Target("logits", 3), lambda td: td, BadValue, "(?s)out of range.*select=3"),
        (Target("logits", -4), lambda td: td, BadValue, "out of range"),
        (Target("logits", [0, 3]), lambda td: td, BadValue, "out of range"),
        (Target("logits", (0, 0)), lambda td: td, BadValue, "out of range"),
        (Target("logits"), lambda td: td, BadValue, "3 numbers a row"),
        (Target("logits", lambda v, td: v), lambda td: td, BadValue, "no number for each row"),
        (Target("logits", by="action"), lambda td: td.exclude("action"), BadKey, "'action'"),
        (Target("logits", by="action"), lambda td: td.set("action", td["action"] + 3), BadValue, "does not index"),
        (Target("logits", by="action"), lambda td: td.set("action", td["x"]), BadValue, "does not index"),
        (Target("logits", 0), lambda td: td.exclude("x"), BadKey, "no entry 'x'"),
        (Target("logits", 0), lambda td: td.set("x", td["x"].long()), BadType, "int64"),
        (Target("logits", 0), lambda td: td.lock_(), BadValue, "locked"),
        (Target("logits", 0), lambda td: 3, BadType, "int"),
    ],
)
def test_bad_calls_leave_everything_as_it_was(net, batch, target, change, error, text):
    td = change(batch(3))
    keys = list(td.keys()) if isinstance(td, TensorDict) else None
    with pytest.raises(error, match=text):
        Gradient(net, target)(td)
    assert keys is None or list(td.keys()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_batch_size_that_is_not_the_models(net, batch):
    td = batch(3)
    with pytest.raises(BadValue, match=r"(?s)the batch in front.*\[3, 4\]"):
        Gradient(net, Target("logits", 0))(TensorDict(x=td["x"], batch_size=[3, 4]))
    with pytest.raises(BadValue, match=r"(?s)rows of shape \[3, 3\].*batch_size=\[3\]"):
        Gradient(net, Target("logits", 0))(TensorDict(x=td["x"]))
    mixed = TensorDictModule(lambda x: x.sum(0), ["x"], ["logits"])
    with pytest.raises(BadValue, match="mix its rows"):
        Gradient(mixed, Target("logits", 0))(td)


def test_targets_that_no_gradient_reaches(batch):
    cut = TensorDictModule(lambda x: x.detach().sin().sum(-1), ["x"], ["y"])
    with pytest.raises(BadValue, match="no gradient reaches"):
        Gradient(cut, Target("y"))(batch(3))
    index = TensorDictModule(lambda x: x.argmax(-1), ["x"], ["action"])
    with pytest.raises(BadType, match=r"(?s)int64.*explain the logits"):
        Gradient(index, Target("action"))(batch(3))


def test_a_site_that_never_runs(batch):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.taken, self.other = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.taken(x)

    module = TensorDictModule(Branches(), ["x"], ["logits"])
    for explain in (Gradient(module, Target("logits", 0), Site("other")), Gradient(module, Target(Site("other"), 0))):
        with pytest.raises(BadValue, match="'other' never ran"):
            explain(batch(3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_compiled_model_needs_its_anchors(net, batch):
    net.module[0].compile(backend="eager")
    explain = Gradient(net, Target("logits", 0), Site("0"))
    with pytest.raises(BadValue, match=r"(?s)compiled before the hooks came.*anchor"):
        explain(batch(3))


@pytest.mark.parametrize("cls", [Gradient, Saliency, InputXGradient])
def test_a_bad_number_stays_in_its_row(net, batch, cls):
    td = batch(3)
    explain = cls(net, Target("logits", [0, 1]), ["x", Site("2")], check_finite=False)
    clean = explain(td.copy())["attribution"]
    td["x"][1, 2] = float("nan")
    found = explain(td)["attribution"]
    assert found["x"][1].isnan().any()
    for key in ("x", "2"):
        close(found[key][[0, 2]], clean[key][[0, 2]])


def test_names_that_are_taken(net, batch):
    with pytest.raises(BadKey, match="out_key="):
        Gradient(net, Target("logits", 0))(td := batch(3).set("attribution", torch.zeros(3)))
    assert td["attribution"].shape == (3,)
    Gradient(net, Target("logits", 0), out_key="why")(td.set("held", torch.zeros(3)))
    model = TensorDictModule(nn.Linear(4, 3).double(), ["x"], ["attribution"])
    with pytest.raises(BadKey, match=r"\('attribution', 'x'\), below 'attribution'"):
        Gradient(model, Target("attribution", 0), outputs=True)
    again = TensorDictSequential(net, Gradient(net, Target("logits", 0)))
    with pytest.raises(BadKey, match="two entries would be written under one key"):
        Gradient(again, Target("logits", 0), outputs=True)
