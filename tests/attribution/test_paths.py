"""Integrated gradients against the sum written out, against exact integrals, and against Captum 0.9."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn

from tdconcepts import IntegratedGradients, Site, Target
from tdconcepts.attribution.paths import quadrature
from tdconcepts.errors import BadKey, BadType, BadValue

METHODS = ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]


def close(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------- quadrature


@given(st.sampled_from(METHODS), st.integers(1, 300))
def test_weights_sum_to_one(method, n):
    points, weights = quadrature(method, n)
    assert len(points) == len(weights) == n
    assert math.isclose(sum(weights), 1.0, rel_tol=1e-12)
    assert points == sorted(points)
    assert 0 <= points[0] <= points[-1] <= 1
    assert min(weights) > 0


@given(st.integers(1, 20))
def test_gauss_is_exact_for_polynomials_of_degree_2n_minus_1(n):
    points, weights = quadrature("gausslegendre", n)
    for degree in range(2 * n):
        integral = sum(w * p**degree for p, w in zip(points, weights, strict=True))
        assert math.isclose(integral, 1 / (degree + 1), rel_tol=1e-10)
    too_high = sum(w * p ** (2 * n) for p, w in zip(points, weights, strict=True))
    assert n > 6 or not math.isclose(too_high, 1 / (2 * n + 1), rel_tol=1e-10)


@pytest.mark.parametrize(("method", "order"), [("riemann_left", 1), ("riemann_middle", 2), ("riemann_trapezoid", 2)])
def test_order_of_the_riemann_rules(method, order):
    """Twice the intervals, half (order 1) or a quarter (order 2) of the error."""

    def error(n):
        points, weights = quadrature(method, n + (method == "riemann_trapezoid"))
        return abs(sum(w * math.exp(p) for p, w in zip(points, weights, strict=True)) - (math.e - 1))

    assert error(64) / error(128) == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [2, 5, 50])
def test_rules_of_captum(method, n):
    approximation = oracle("captum.attr._utils.approximation_methods")
    step_sizes, alphas = approximation.approximation_parameters(method)
    points, weights = quadrature(method, n)
    assert points == pytest.approx([float(a) for a in alphas(n)], abs=1e-7)
    theirs = [float(s) for s in step_sizes(n)]
    if method == "riemann_trapezoid":  # Captum's sum to (n - 1) / n
        assert sum(theirs) == pytest.approx((n - 1) / n)
        theirs = [s * n / (n - 1) for s in theirs]
    assert weights == pytest.approx(theirs)


# ---------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_sum_written_out(pipeline, batch, method, n):
    """Both inputs move together; each entry's attribution is its step times the weighted mean of its gradients."""
    td = batch(4)
    td["baseline"] = TensorDict(x=torch.randn(4, 4).double(), batch_size=[4])
    explain = IntegratedGradients(pipeline, Target("logits", 2), n_steps=n, method=method)
    found = explain(td.copy())["attribution"]
    start = {"x": td["baseline", "x"], "z": torch.zeros_like(td["z"])}
    slow = {"x": torch.zeros_like(td["x"]), "z": torch.zeros_like(td["z"])}
    for alpha, weight in zip(*quadrature(method, n), strict=True):
        at = {k: (start[k] + alpha * (td[k] - start[k])).requires_grad_() for k in start}
        y = pipeline(TensorDict(at, batch_size=[4]))["logits"][:, 2].sum()
        for k, gradient in zip(at, torch.autograd.grad(y, list(at.values())), strict=True):
            slow[k] += weight * gradient * (td[k] - start[k])
    close(found["x"], slow["x"])
    close(found["z"], slow["z"])


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_exact_for_polynomials(degree, seed):
    """``y = sum_ij c_ij x_i^j``: the attribution of ``x_i`` is its own terms, to the last bit but a few."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(3, degree, generator=generator, dtype=torch.float64)
    powers = torch.arange(1, degree + 1)
    model = TensorDictModule(lambda x: (c * x[..., None] ** powers).sum((-1, -2)), ["x"], ["y"])
    td = TensorDict(x=torch.randn(5, 3, generator=generator, dtype=torch.float64), batch_size=[5])
    IntegratedGradients(model, Target("y"), n_steps=(degree + 1) // 2)(td)
    close(td["attribution", "x"], (c * td["x"][..., None] ** powers).sum(-1), 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 50])
def test_exact_for_linear_models_in_double_precision(method, n):
    """Captum's weights are float32, which is 1e-8 off here, and its trapezoid is (n - 1) / n of the truth."""
    linear = nn.Linear(4, 1, bias=False).double()
    td = TensorDict(x=torch.randn(3, 4, dtype=torch.float64), batch_size=[3])
    IntegratedGradients(TensorDictModule(linear, ["x"], ["y"]), Target("y"), n_steps=n, method=method)(td)
    close(td["attribution", "x"], (td["x"] * linear.weight[0]).detach(), 1e-14)


# ---------------------------------------------------------------------------------------- completeness


@given(st.integers(0, 10_000), st.sampled_from(["gausslegendre", "riemann_middle", "riemann_trapezoid"]))
def test_completeness(seed, method):
    """The attributions of a row sum to the change of the target, and the delta says how nearly."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = TensorDictModule(layers, ["x"], ["logits"])
    td = TensorDict(x=torch.randn(4, 4, dtype=torch.float64), batch_size=[4])
    td["baseline", "x"] = torch.randn(4, 4, dtype=torch.float64)
    explain = IntegratedGradients(model, Target("logits", 1), n_steps=60, method=method, convergence_delta=True)
    explain(td)
    change = (layers(td["x"]) - layers(td["baseline", "x"]))[:, 1].detach()
    total = td["attribution", "x"].sum(-1)
    close(td["convergence_delta", "x"], total - change)
    assert (total - change).abs().max() < (1e-7 if method == "gausslegendre" else 2e-2)


def test_completeness_at_sites_and_between_stages(pipeline, batch):
    wrt = ["hidden", Site("1.0"), "x", "z"]
    explain = IntegratedGradients(pipeline, Target("logits", [0, 2]), wrt, convergence_delta=True, baseline=0.5)
    assert explain.out_keys[4:] == [
        ("convergence_delta", "joint"),
        ("convergence_delta", "hidden"),
        ("convergence_delta", "1.0"),
    ]
    td = explain(batch(3))
    start = batch(3).apply(lambda v: torch.full_like(v, 0.5) if v.is_floating_point() else v)
    change = (pipeline(td.copy())["logits"] - pipeline(start)["logits"])[:, [0, 2]].detach()
    for keys, delta in (("x", "z"), "joint"), (("hidden",), "hidden"), (("1.0",), "1.0"):
        total = sum(td["attribution", key].sum(-1) for key in keys)
        close(total, change, 1e-7)
        assert td["convergence_delta", delta].shape == (3, 2)
        close(td["convergence_delta", delta], total - change)


# ---------------------------------------------------------------------------------------- Captum


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("baseline", [None, 0.7, "rows"])
def test_integrated_gradients_of_captum(net, batch, method, baseline):
    captum = oracle("captum.attr").IntegratedGradients(net.module)
    td = batch(5)
    given = torch.randn(5, 4, dtype=torch.float64) if baseline == "rows" else baseline
    options = {"target": td["action"], "n_steps": 9, "method": method}
    theirs, delta = captum.attribute(td["x"], given, return_convergence_delta=True, **options)
    if baseline == "rows":
        td["baseline", "x"] = given
    number = baseline if isinstance(baseline, float) else None
    explain = IntegratedGradients(
        net, Target("logits", by="action"), n_steps=9, method=method, baseline=number, convergence_delta=True
    )
    explain(td)
    if method == "riemann_trapezoid":
        assert (td["attribution", "x"] - theirs).abs().max() > 1e-3
        close(td["attribution", "x"], theirs * 9 / 8, 1e-6)
    else:
        close(td["attribution", "x"], theirs, 1e-6)
        close(td["convergence_delta", "x"], delta, 1e-6)


def test_two_inputs_of_captum(pipeline, batch):
    captum = oracle("captum.attr")
    td = batch(5)

    def forward(x, z):
        return pipeline(TensorDict(x=x, z=z, batch_size=x.shape[:1]))["logits"]

    x, z = captum.IntegratedGradients(forward).attribute((td["x"], td["z"]), (0.5, 0.5), target=1, n_steps=8)
    IntegratedGradients(pipeline, Target("logits", 1), n_steps=8, baseline=0.5)(td)
    close(td["attribution", "x"], x, 1e-6)
    close(td["attribution", "z"], z, 1e-6)


@pytest.mark.parametrize("side", ["output", "input"])
def test_layer_integrated_gradients_of_captum(net, batch, side):
    captum = oracle("captum.attr").LayerIntegratedGradients(net.module, net.module[2])
    td = batch(5)
    options = {"target": 1, "n_steps": 8, "attribute_to_layer_input": side == "input"}
    theirs = captum.attribute(td["x"], 0.3 * torch.ones(5, 4).double(), **options)
    site = Site("2", side)
    IntegratedGradients(net, Target("logits", 1), site, n_steps=8, baseline=0.3)(td)
    close(td["attribution", str(site)], theirs, 1e-6)


def test_entries_between_stages_are_captums_layers(batch):
    captum = oracle("captum.attr")
    first, last = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double(), nn.Sequential(nn.GELU(), nn.Linear(5, 3)).double()
    model = TensorDictSequential(TensorDictModule(first, ["x"], ["hidden"]), TensorDictModule(last, ["hidden"], ["y"]))
    td = batch(5)
    given = torch.randn(5, 4, dtype=torch.float64)
    layer = captum.LayerIntegratedGradients(nn.Sequential(first, last), first)
    theirs = layer.attribute(td["x"], given, target=td["action"], n_steps=7, method="riemann_right")
    td["baseline", "x"] = given
    explain = IntegratedGradients(model, Target("y", by="action"), ["hidden"], n_steps=7, method="riemann_right")
    close(explain(td)["attribution", "hidden"], theirs, 1e-6)


def test_a_layer_before_an_in_place_operation(net, batch):
    """Captum raises "a leaf Variable that requires grad is being used in an in-place operation" here."""
    td = batch(4)
    IntegratedGradients(net, Target("logits", 0), Site("0"), n_steps=30, convergence_delta=True)(td)
    assert td["convergence_delta", "0"].abs().max() < 0.1
    start = net.module[0](torch.zeros(4, 4).double()).detach()
    step = (net.module[0](td["x"]) - start).detach()
    slow = torch.zeros_like(step)
    for alpha, weight in zip(*quadrature("gausslegendre", 30), strict=True):
        at = (start + alpha * step).requires_grad_()
        (gradient,) = torch.autograd.grad(net.module[2:](at.relu())[:, 0].sum(), at)
        slow += weight * gradient * step
    close(td["attribution", "0"], slow)


# ---------------------------------------------------------------------------------------- targets


def test_many_targets_are_the_loop(pipeline, batch):
    wrt, td = ["x", "hidden", Site("1.0")], batch(4)
    many = IntegratedGradients(pipeline, Target("logits", [2, "argmax"]), wrt, n_steps=5)(td.copy())["attribution"]
    for position, select in enumerate((2, "argmax")):
        one = IntegratedGradients(pipeline, Target("logits", select), wrt, n_steps=5)(td.copy())["attribution"]
        for key in ("x", "hidden", "1.0"):
            close(many[key][:, position], one[key])


def test_many_targets_of_images():
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(-3), nn.Linear(48, 5)).double()
    cnn = TensorDictModule(layers, ["image"], ["logits"])
    td = TensorDict(image=torch.randn(3, 2, 6, 6, dtype=torch.float64), batch_size=[3])
    wrt = ["image", Site("1")]
    many = IntegratedGradients(cnn, Target("logits", [0, 4]), wrt, n_steps=4, chunk_size=5)(td.copy())["attribution"]
    assert many["image"].shape == (3, 2, 2, 6, 6)
    for position, index in enumerate((0, 4)):
        one = IntegratedGradients(cnn, Target("logits", index), wrt, n_steps=4)(td.copy())["attribution"]
        close(many["image"][:, position], one["image"])
        close(many["1"][:, position], one["1"])


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_argmax_is_chosen_once_at_the_input(chunk):
    """``logits = [x, 1]``: at x = 3 the first is larger, for the first third of the path the second is."""
    model = TensorDictModule(lambda x: torch.cat([x, torch.ones_like(x)], -1), ["x"], ["logits"])
    td = TensorDict(x=torch.tensor([[3.0], [0.5]]), batch_size=[2])
    IntegratedGradients(model, Target("logits", "argmax"), convergence_delta=True, chunk_size=chunk)(td)
    torch.testing.assert_close(td["attribution", "x"], torch.tensor([[3.0], [0.0]]))
    torch.testing.assert_close(td["convergence_delta", "x"], torch.zeros(2))


# ---------------------------------------------------------------------------------------- baselines


def test_baselines_as_a_number_a_group_or_an_entry(net, batch):
    td = batch(4)
    target = Target("logits", 0)
    rows = torch.full((4, 4), 0.3, dtype=torch.float64)
    number = IntegratedGradients(net, target, baseline=0.3)(td.copy())["attribution", "x"]
    default = IntegratedGradients(net, target)(td.copy().set(("baseline", "x"), rows))["attribution", "x"]
    group = IntegratedGradients(net, target, baseline=("start", "here"))
    assert group.in_keys == ["x", ("start", "here", "x")]
    close(number, default)
    close(number, group(td.copy().set(("start", "here", "x"), rows))["attribution", "x"])
    zero = IntegratedGradients(net, target)(td.copy())["attribution", "x"]
    assert (number - zero).abs().max() > 1e-3
    ignored = IntegratedGradients(net, target, baseline=0)(td.copy().set(("baseline", "x"), rows))
    close(ignored["attribution", "x"], zero)


def test_a_baseline_of_one_number_a_row_is_not_one_a_feature(net, batch):
    """With as many rows as features, broadcasting from the right would take the rows for features."""
    td = batch(4)
    each = torch.randn(4, dtype=torch.float64)
    found = IntegratedGradients(net, Target("logits", 0))(td.copy().set(("baseline", "x"), each))["attribution", "x"]
    full = IntegratedGradients(net, Target("logits", 0))(
        td.copy().set(("baseline", "x"), each[:, None].expand(4, 4).clone())
    )["attribution", "x"]
    close(found, full)


def test_a_baseline_of_a_site_is_its_value_there(pipeline, batch):
    td = batch(3)
    start = pipeline(td.clone().apply(torch.zeros_like))["hidden"].detach()
    default = IntegratedGradients(pipeline, Target("logits", 0), "hidden")(td.copy())["attribution", "hidden"]
    given = IntegratedGradients(pipeline, Target("logits", 0), "hidden")(td.copy().set(("baseline", "hidden"), start))
    close(given["attribution", "hidden"], default)
    zero = IntegratedGradients(pipeline, Target("logits", 0), "hidden")(
        td.copy().set(("baseline", "hidden"), torch.zeros_like(start))
    )
    assert (zero["attribution", "hidden"] - default).abs().max() > 1e-3


@pytest.fixture
def embedded():
    layers = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(-2), nn.Tanh(), nn.Linear(12, 2)).double()
    return TensorDictModule(layers, ["tokens"], ["logits"])


def test_integer_inputs_need_a_baseline(embedded):
    td = TensorDict(tokens=torch.randint(1, 7, (5, 4)), batch_size=[5])
    explain = IntegratedGradients(embedded, Target("logits", 0), Site("0"), convergence_delta=True)
    with pytest.raises(BadValue, match=r"(?s)one value along the whole path.*'tokens'.*\('baseline', '0'\)"):
        explain(td.copy())
    with pytest.raises(BadType, match="int64"):
        IntegratedGradients(embedded, Target("logits", 0))(td.copy())
    table = embedded.module[0].weight.detach()
    tokens = explain(td.copy().set(("baseline", "tokens"), torch.zeros(5, 4, dtype=torch.long)))
    values = explain(td.copy().set(("baseline", "0"), table[0].expand(5, 4, 3).clone()))
    close(tokens["attribution", "0"], values["attribution", "0"])
    assert tokens["convergence_delta", "0"].abs().max() < 1e-8
    nowhere = explain(td.copy().set(("baseline", "0"), torch.zeros(5, 4, 3).double()))
    assert (nowhere["attribution", "0"] - values["attribution", "0"]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------- rows in flight


@pytest.mark.parametrize(
    ("size", "chunk", "peak"), [((6,), 1, 1), ((6,), 4, 4), ((6,), 13, 12), ((), 7, 7), ((2, 9), 4, 4)]
)
def test_rows_in_flight(net, batch, rows_seen, size, chunk, peak):
    td = batch(*size)
    wrt, target = ["x", Site("2")], Target("logits", [0, 1])
    whole = IntegratedGradients(net, target, wrt, n_steps=10)(td.copy())["attribution"]
    with rows_seen(net.module[4]) as seen:
        found = IntegratedGradients(net, target, wrt, n_steps=10, chunk_size=chunk)(td)["attribution"]
    assert max(seen) == peak
    close(found["x"], whole["x"])
    close(found["2"], whole["2"])


def test_the_default_is_one_pass_for_small_rows_and_several_for_large_ones(net, batch, rows_seen):
    with rows_seen(net.module[0]) as seen:
        IntegratedGradients(net, Target("logits", 0), n_steps=50)(batch(8))
    assert seen == [400]
    wide = TensorDictModule(nn.Linear(3 * 2**17, 1), ["image"], ["y"])
    with rows_seen(wide.module) as seen:
        IntegratedGradients(wide, Target("y"), n_steps=5)(TensorDict(image=torch.randn(2, 3 * 2**17), batch_size=[2]))
    assert seen == [4, 4, 2]


# ---------------------------------------------------------------------------------------- policies


class Counted(torch.distributions.Categorical):
    """Counts its samples."""

    drawn = 0

    def sample(self, *args, **kwargs):
        Counted.drawn += 1
        return super().sample(*args, **kwargs)


@pytest.mark.parametrize("target", [Target("logits", by="action"), Target("logits", "argmax")])
def test_an_explained_policy_is_the_policy(net, batch, target):
    head = ProbabilisticTensorDictModule(
        ["logits"], ["action"], distribution_class=Counted, default_interaction_type="random"
    )
    policy = ProbabilisticTensorDictSequential(net, head)
    explained = IntegratedGradients(policy, target, outputs=True, n_steps=8)
    assert explained.in_keys == ["x"]
    td = batch(20).exclude("action")
    torch.manual_seed(1)
    bare = policy(td.copy())
    Counted.drawn = 0
    torch.manual_seed(1)
    with torch.no_grad():
        found = explained(td.copy())
    assert Counted.drawn == 1
    assert torch.equal(found["action"], bare["action"])
    close(found["logits"], bare["logits"].detach())
    after = IntegratedGradients(policy, target, n_steps=8)(found.copy())
    close(found["attribution", "x"], after["attribution", "x"])


# ---------------------------------------------------------------------------------------- graph and dtype


def test_second_derivatives():
    """The attribution of ``x ** 2`` from zero is itself, so its derivative is ``2 x`` (Captum keeps half of it)."""
    square = TensorDictModule(lambda x: x.square().sum(-1), ["x"], ["y"])
    td = TensorDict(x=torch.tensor([[2.0, -3.0]], dtype=torch.float64, requires_grad=True), batch_size=[1])
    made = IntegratedGradients(square, Target("y"), n_steps=3, create_graph=True)(td)["attribution", "x"]
    (second,) = torch.autograd.grad(made.sum(), td["x"])
    close(second, 2 * td["x"].detach())


def test_a_graph_after_a_call_in_inference_mode(net, batch):
    explain = IntegratedGradients(net, Target("logits", 0), n_steps=3, create_graph=True)
    with torch.inference_mode():
        explain(batch(2))
    td = batch(2)
    td["x"].requires_grad_()
    explain(td)["attribution", "x"].sum().backward()
    assert td["x"].grad.abs().sum() > 0


def test_inputs_of_two_dtypes_keep_theirs():
    first, second = nn.Linear(2, 2).double(), nn.Linear(3, 2)
    model = TensorDictModule(lambda a, b: first(a) * second(b).tanh(), ["a", "b"], ["y"])
    td = TensorDict(a=torch.randn(4, 2, dtype=torch.float64), b=torch.randn(4, 3), batch_size=[4])
    IntegratedGradients(model, Target("y", 0), convergence_delta=True)(td)
    assert td["attribution", "a"].dtype == torch.float64
    assert td["attribution", "b"].dtype == torch.float32
    assert td["convergence_delta", "joint"].abs().max() < 1e-5


def test_half_precision_is_added_up_in_single_precision():
    linear = nn.Linear(64, 1, bias=False, dtype=torch.bfloat16)
    td = TensorDict(x=torch.randn(3, 64, dtype=torch.bfloat16), batch_size=[3])
    model = TensorDictModule(linear, ["x"], ["y"])
    explain = IntegratedGradients(model, Target("y"), n_steps=300, method="riemann_middle")
    found = explain(td)["attribution", "x"]
    assert found.dtype == torch.bfloat16
    exact = (td["x"].double() * linear.weight[0].double()).bfloat16()
    assert (found == exact).float().mean() > 0.97  # in half precision half of them would be the next number


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "simpson"}, BadValue, "'gausslegendre', 'riemann_left'"),
        ({"n_steps": 0}, BadValue, "n_steps=0"),
        ({"n_steps": 2.5}, BadValue, "n_steps=2.5"),
        ({"baseline": torch.zeros(4)}, BadType, "a Tensor"),
        ({"baseline": [0.0]}, BadType, "a list"),
        ({"baseline": True}, BadType, "a bool"),
        ({"baseline": float("nan")}, BadType, "nan"),
        ({"baseline": ""}, BadKey, "not a key"),
        ({"step": 3}, BadType, "no option 'step'"),
    ],
)
def test_bad_builds(net, options, error, text):
    with pytest.raises(error, match=text):
        IntegratedGradients(net, Target("logits", 0), **options)


@pytest.mark.parametrize(
    ("options", "change", "error", "text"),
    [
        ({"baseline": "start"}, lambda td: td, BadKey, r"\('start', 'x'\)"),
        ({}, lambda td: td.set(("baseline", "x"), torch.zeros(3, 2)), BadValue, r"(?s)\[3, 2\].*\[3, 4\]"),
        ({}, lambda td: td.set("baseline", torch.zeros(3)), BadKey, "not a group"),
        ({}, lambda td: td.exclude("x"), BadKey, "'x'"),
        ({"outputs": True}, lambda td: td.exclude("x"), BadKey, "'x'"),
        ({}, lambda td: td.lock_(), BadValue, "locked"),
    ],
)
def test_bad_calls_leave_everything_as_it_was(net, batch, options, change, error, text):
    td = change(batch(3))
    keys = set(td.keys(True, True))
    with pytest.raises(error, match=text):
        IntegratedGradients(net, Target("logits", 0), **options)(td)
    assert set(td.keys(True, True)) == keys


def test_a_part_of_a_site_is_that_part_of_the_whole(net, batch):
    td = batch(3)
    whole = IntegratedGradients(net, Target("logits", [0, 1]), Site("0"))(td)["attribution", "0"]
    part = IntegratedGradients(net, Target("logits", [0, 1]), Site("0", index=[1, 2]))(td)["attribution", "0[[1, 2]]"]
    close(part, whole[..., [1, 2]])
