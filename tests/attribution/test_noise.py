"""SmoothGrad and VarGrad against loops, against Captum's NoiseTunnel with the same noise, and as statistics."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts import Gradient, InputXGradient, IntegratedGradients, Saliency, Site, SmoothGrad, Target, VarGrad
from tdconcepts.attribution import NoiseTunnel
from tdconcepts.errors import BadKey, BadType, BadValue


def close(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def seed(n=0):
    return torch.Generator().manual_seed(n)


@pytest.fixture
def smooth():
    """``x [4] -> logits [3]`` without kinks."""
    layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return TensorDictModule(layers, ["x"], ["logits"])


# ---------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("size", [(), (5,), (2, 3)])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("clean", "chunk"), [(True, None), (True, 4), (False, None), (False, 4)])
def test_the_loop_written_out(pipeline, batch, size, relative, clean, chunk):
    """Draw by draw: each entry gets the noise of its own key, in units of its row's range; then mean and variance."""
    td = batch(*size)
    n, lead = 7, len(size)
    td["noise"] = TensorDict({k: torch.randn(*size, n, *td[k].shape[lead:]).double() for k in "xz"}, batch_size=size)
    options = {"noise": "noise", "relative": relative, "include_clean": clean, "chunk_size": chunk}
    gradient = Gradient(pipeline, Target("logits", 1))
    draws = {"x": [], "z": []}
    for i in range(n):
        moved = td.select("x", "z").clone()
        for k in "xz":
            spread = (td[k].amax(-1, keepdim=True) - td[k].amin(-1, keepdim=True)) if relative else 1.0
            moved[k] += 0.0 if clean and i == 0 else 0.3 * spread * td["noise", k].select(lead, i)
        found = gradient(moved)
        for k, each in draws.items():
            each.append(found["attribution", k])
    mean = SmoothGrad(gradient, 0.3, n, **options)(td.copy())["attribution"]
    variance = VarGrad(gradient, 0.3, n, **options)(td.copy())["attribution"]
    for k, each in draws.items():
        close(mean[k], torch.stack(each).mean(0))
        close(variance[k], torch.stack(each).var(0, correction=0))


@pytest.mark.parametrize(("kind", "cls"), [("smoothgrad", SmoothGrad), ("vargrad", VarGrad)])
def test_noise_tunnel_of_captum(smooth, batch, kind, cls):
    captum = oracle("captum.attr")
    td, n, sigma = batch(5), 6, 0.25
    tunnel = captum.NoiseTunnel(captum.IntegratedGradients(smooth.module))
    torch.manual_seed(3)
    theirs = tunnel.attribute(td["x"], nt_type=kind, nt_samples=n, stdevs=sigma, target=2, n_steps=12)
    torch.manual_seed(3)  # Captum draws for each row its n samples, in float32
    drawn = torch.normal(0, torch.full((5 * n, 4), sigma)).double()
    td["noise", "x"] = drawn.view(5, n, 4) / sigma
    inner = IntegratedGradients(smooth, Target("logits", 2), n_steps=12)
    cls(inner, sigma, n, relative=False, noise="noise")(td)
    close(td["attribution", "x"], theirs, 1e-6)


# ---------------------------------------------------------------------------------------- a variance


def test_a_linear_model_has_no_variance_at_all():
    """PnPXAI's formula gives ``w ** 2 - w`` here."""
    linear = nn.Linear(4, 2)
    td = TensorDict(x=100 * torch.randn(50, 4), batch_size=[50])
    VarGrad(Gradient(TensorDictModule(linear, ["x"], ["y"]), Target("y", [0, 1])), 0.5)(td)
    assert torch.equal(td["attribution", "x"], torch.zeros(50, 2, 4))
    SmoothGrad(Gradient(TensorDictModule(linear, ["x"], ["y"]), Target("y", 0)), 0.5)(td)
    assert torch.equal(td["attribution", "x"], linear.weight[0].expand(50, 4))


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.floats(-1e6, 1e6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_never_negative(number, offset, dtype):
    torch.manual_seed(number)
    model = TensorDictModule(lambda x: (offset * x + x.sin()).sum(-1), ["x"], ["y"])
    td = TensorDict(x=torch.randn(8, 3, dtype=dtype), batch_size=[8])
    VarGrad(Gradient(model, Target("y")), n_iter=5, chunk_size=16)(td)
    assert td["attribution", "x"].ge(0).all()
    assert td["attribution", "x"].dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.1), (torch.float32, 0.3)])
def test_the_variance_of_a_steep_and_hardly_bent_function(dtype, tolerance):
    """The gradient of ``1e4 x + .01 x ** 2`` is ``1e4 + .02 x``, of variance 4e-6 under noise 0.1. Captum gives -16 to
    24 in single precision, where the gradient itself has steps of half its standard deviation.
    """
    model = TensorDictModule(lambda x: (1e4 * x + 0.01 * x.square()).sum(-1), ["x"], ["y"])
    td = TensorDict(x=torch.randn(1, 20, dtype=dtype), batch_size=[1])
    explain = VarGrad(Gradient(model, Target("y")), 0.1, 4000, relative=False, noise=seed())
    found = explain(td)["attribution", "x"]
    assert (found / 4e-6 - 1).abs().max() < tolerance  # the sampling error is sqrt(2 / 4000) = 2 %
    assert found.min() > 0


@pytest.mark.parametrize("chunk", [None, 1, 3, 16])
def test_small_variance_around_a_large_gradient(chunk):
    """``sum(x + 1e-4 x ** 2) * 1e4`` in single precision: E[g^2] - E[g]^2 would be rounding, up to 16 (Captum)."""
    model = TensorDictModule(lambda x: (1e4 * x + 0.5 * x.square()).sum(-1), ["x"], ["y"])
    x, noise = torch.randn(4, 3), torch.randn(4, 50, 3)
    td = TensorDict(x=x, noise=TensorDict(x=noise, batch_size=[4]), batch_size=[4])
    VarGrad(Gradient(model, Target("y")), 1.0, 50, relative=False, noise="noise", chunk_size=chunk)(td)
    rounded = (1e4 + (x[:, None] + noise)).double()  # the gradients, as float32 has them
    torch.testing.assert_close(td["attribution", "x"].double(), rounded.var(1, correction=0), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10_000))
def test_in_any_groups_it_is_the_two_pass_variance(n, chunk, number):
    torch.manual_seed(number)
    layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    explainer = Gradient(TensorDictModule(layers, ["x"], ["y"]), Target("y"))
    td = TensorDict(x=torch.randn(3, 4).double(), batch_size=[3])
    td["noise", "x"] = torch.randn(3, n, 4).double()
    found = VarGrad(explainer, 0.5, n, relative=False, noise="noise", chunk_size=chunk)(td.copy())
    points = (td["x"][:, None] + 0.5 * td["noise", "x"]).requires_grad_()
    (each,) = torch.autograd.grad(layers(points).sum(), points)
    close(found["attribution", "x"], (each - each.mean(1, keepdim=True)).square().mean(1))


# ---------------------------------------------------------------------------------------- its size


def recorded(value, td):
    """A target whose gradient is the value itself."""
    return 0.5 * value.square().sum(-1)


@pytest.fixture
def noised():
    """An explainer that writes what it was given."""
    return Gradient(TensorDictModule(lambda x: x.clone(), ["x"], ["y"]), Target("y", recorded))


def test_noise_is_relative_to_the_range_of_each_row(noised):
    x = torch.tensor([[0.0, 1.0, 0.5], [0.0, 100.0, 50.0], [3.0, 3.0, 3.0], [1000.0, 1001.0, 1000.5]]).double()
    td = TensorDict(x=x, batch_size=[4])
    VarGrad(noised, 0.2, 4000, noise=seed())(td)
    deviation = td["attribution", "x"].mean(-1).sqrt()
    torch.testing.assert_close(deviation, torch.tensor([0.2, 20.0, 0.0, 0.2]).double(), rtol=0.03, atol=1e-9)


def test_noise_in_the_units_of_the_entry(noised, batch):
    td = batch(3)
    VarGrad(noised, 0.2, 4000, relative=False, noise=seed())(td)
    torch.testing.assert_close(td["attribution", "x"].mean().sqrt(), torch.tensor(0.2).double(), rtol=0.03, atol=0)
    SmoothGrad(noised, 0.0, 3)(td)
    close(td["attribution", "x"], td["x"])


def test_all_draws_are_noisy_unless_asked_otherwise(noised, batch):
    td = batch(3)
    SmoothGrad(noised, 0.2, 1, noise=seed())(td)
    assert (td["attribution", "x"] - td["x"]).abs().min() > 0
    SmoothGrad(noised, 0.2, 1, noise=seed(), include_clean=True)(td)
    close(td["attribution", "x"], td["x"])
    two = SmoothGrad(noised, 0.2, 2, noise=seed(), include_clean=True)(td.copy())["attribution", "x"]
    one = 2 * two - td["x"]
    assert (one - td["x"]).abs().min() > 0


def test_a_row_of_one_number_has_no_range(noised):
    td = TensorDict(x=torch.randn(3, 1).double(), batch_size=[3])
    with pytest.raises(BadValue, match="relative=False"):
        SmoothGrad(noised)(td)
    SmoothGrad(noised, relative=False)(td)
    with pytest.raises(BadValue, match="one number"):
        SmoothGrad(noised)(TensorDict(x=torch.randn(3).double(), batch_size=[3]))


def test_only_floating_entries_get_noise():
    table = nn.Embedding(3, 4).double()
    model = TensorDictModule(lambda x, kind: (x * table(kind)).sin().sum(-1), ["x", "kind"], ["y"])
    td = TensorDict(x=torch.randn(5, 4).double(), kind=torch.randint(0, 3, (5,)), batch_size=[5])
    VarGrad(Gradient(model, Target("y"), "x"))(td)
    assert td["attribution", "x"].max() > 0


def test_where_only_sites_are_explained_the_inputs_get_the_noise(smooth, batch):
    td = batch(4)
    td["noise", "x"] = torch.randn(4, 5, 4).double()
    found = SmoothGrad(Gradient(smooth, Target("logits", 0), Site("1")), 0.3, 5, relative=False, noise="noise")(td)
    each = [
        Gradient(smooth, Target("logits", 0), Site("1"))(
            TensorDict(x=td["x"] + 0.3 * td["noise", "x"][:, i], batch_size=[4])
        )["attribution", "1"]
        for i in range(5)
    ]
    close(found["attribution", "1"], torch.stack(each).mean(0))


# ---------------------------------------------------------------------------------------- randomness


def test_a_generator_gives_the_same_answer_whatever_the_chunks(pipeline, batch):
    td = batch(5)
    for cls in (SmoothGrad, VarGrad):
        state = torch.get_rng_state()
        explain = [
            cls(Gradient(pipeline, Target("logits", "argmax")), noise=seed(4), chunk_size=chunk)(td.copy())[
                "attribution"
            ]
            for chunk in (None, 1, 7, 11, 1000)
        ]
        assert torch.equal(torch.get_rng_state(), state)
        for other in explain[1:]:
            close(other["x"], explain[0]["x"])
            close(other["z"], explain[0]["z"])


def test_a_generator_goes_on_and_a_copy_goes_on_alike(smooth, batch):
    td = batch(3)
    explain = SmoothGrad(Gradient(smooth, Target("logits", 0)), noise=seed())
    first = explain(td.copy())["attribution", "x"]
    copies = [copy.deepcopy(explain), pickle.loads(pickle.dumps(explain))]
    second = explain(td.copy())["attribution", "x"]
    assert (first - second).abs().max() > 0
    for one in copies:
        assert torch.equal(one(td.copy())["attribution", "x"], second)


def test_without_a_source_it_is_torchs_own_generator(smooth, batch):
    td = batch(3)
    explain = SmoothGrad(Gradient(smooth, Target("logits", 0)))
    torch.manual_seed(5)
    first = explain(td.copy())["attribution", "x"]
    other = explain(td.copy())["attribution", "x"]
    torch.manual_seed(5)
    assert torch.equal(explain(td.copy())["attribution", "x"], first)
    assert (first - other).abs().max() > 0


def test_rows_under_a_noise_key_do_not_see_each_other(smooth, batch):
    td = batch(4)
    td["noise", "x"] = torch.randn(4, 6, 4).double()
    explain = VarGrad(Gradient(smooth, Target("logits", 0)), 0.2, 6, noise="noise")
    whole = explain(td.copy())["attribution", "x"]
    for i in range(4):
        close(explain(td[i].copy())["attribution", "x"], whole[i])


# ---------------------------------------------------------------------------------------- around an explainer


@pytest.mark.parametrize("chunk", [None, 2])
def test_argmax_is_chosen_once_at_the_clean_input(chunk):
    """``logits = [x, -x]``: the gradient of the larger one changes its sign with x, the first one's doesn't."""
    model = TensorDictModule(lambda x: torch.cat([x, -x], -1), ["x"], ["logits"])
    td = TensorDict(x=torch.tensor([[0.05], [-0.05]]), batch_size=[2])
    inner = Gradient(model, Target("logits", "argmax"))
    options = {"relative": False, "noise": seed(), "chunk_size": chunk}
    SmoothGrad(inner, 1.0, 50, **options)(td)
    assert td["attribution", "x"].tolist() == [[1.0], [-1.0]]
    VarGrad(inner, 1.0, 50, **options)(td)
    assert td["attribution", "x"].tolist() == [[0.0], [0.0]]
    SmoothGrad(IntegratedGradients(model, Target("logits", "argmax"), baseline=5.0), 1.0, 50, **options)(td)
    assert list(td.keys()) == ["x", "attribution"]


@pytest.mark.parametrize("make", [Gradient, Saliency, InputXGradient, IntegratedGradients])
def test_around_any_explainer(pipeline, batch, make):
    td = batch(4)
    inner = make(pipeline, Target("logits", [0, 2]), ["x", "hidden", Site("1.0")])
    outer = SmoothGrad(VarGrad(inner, n_iter=3, noise=seed()), n_iter=2, noise=seed(1), chunk_size=5)
    assert outer.in_keys == inner.in_keys
    assert outer.out_keys == inner.out_keys
    outer(td)
    assert [td["attribution", k].shape for k in ("x", "hidden", "1.0")] == [(4, 2, 4), (4, 2, 5), (4, 2, 5)]


def test_around_a_stage_of_the_users_own(batch):
    own = TensorDictModule(lambda x: x.square(), ["x"], [("attribution", "x")])
    td = batch(3)
    td["noise", "x"] = torch.randn(3, 4, 4).double()
    SmoothGrad(own, 0.5, 4, relative=False, noise="noise")(td)
    close(td["attribution", "x"], (td["x"][:, None] + 0.5 * td["noise", "x"]).square().mean(1))
    both = TensorDictSequential(own, TensorDictModule(torch.sqrt, [("attribution", "x")], [("attribution", "x")]))
    SmoothGrad(both, 0.0, 4)(td)
    close(td["attribution", "x"], td["x"].abs())


def test_the_baseline_of_an_explainer_is_kept(smooth, batch):
    """The baseline is read only where it is there, and must not be lost on the way."""
    td = batch(3)
    plain = IntegratedGradients(smooth, Target("logits", 0))
    zero = plain(td.copy())["attribution", "x"]
    td["baseline", "x"] = torch.ones(3, 4).double()
    expected = plain(td.copy())["attribution", "x"]
    found = SmoothGrad(SmoothGrad(plain, 0.0, 2), 0.0, 3)(td.copy())["attribution", "x"]
    close(found, expected)
    assert (expected - zero).abs().max() > 1e-3
    VarGrad(plain, 0.3, 3, noise=seed(), chunk_size=2)(td)
    assert td["baseline", "x"].eq(1).all()


def test_the_delta_of_a_path_is_not_averaged(smooth, batch):
    inner = IntegratedGradients(smooth, Target("logits", 0), convergence_delta=True)
    assert SmoothGrad(inner).out_keys == [("attribution", "x")]


@pytest.mark.parametrize(
    ("size", "chunk", "peak"), [((6,), 1, 1), ((6,), 4, 4), ((6,), 13, 12), ((), 7, 7), ((2, 9), 4, 4)]
)
def test_rows_in_flight(smooth, batch, rows_seen, size, chunk, peak):
    with rows_seen(smooth.module[0]) as seen:
        VarGrad(Gradient(smooth, Target("logits", 0)), n_iter=10, chunk_size=chunk)(batch(*size))
    assert max(seen) == peak


def test_twenty_draws_of_a_small_batch_are_one_pass(smooth, batch, rows_seen):
    with rows_seen(smooth.module[0]) as seen:
        VarGrad(Gradient(smooth, Target("logits", 0)))(batch(8))
    assert seen == [160]


# ---------------------------------------------------------------------------------------- tunables


@pytest.mark.parametrize("cls", [SmoothGrad, VarGrad])
def test_tunables_are_settings(smooth, batch, cls):
    assert [t.name for t in cls.tunables] == ["noise_level", "n_iter"]
    for tunable in cls.tunables:
        for value in (tunable.values()[0], tunable.values()[-1]):
            made = cls(Gradient(smooth, Target("logits", 0)), **{tunable.name: value})
            assert getattr(made, tunable.name) == value
            made(batch(2))


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"noise_level": -0.1}, BadValue, "noise_level=-0.1"),
        ({"noise_level": float("nan")}, BadValue, "nan"),
        ({"noise_level": float("inf")}, BadValue, "inf"),
        ({"noise_level": True}, BadValue, "True"),
        ({"noise_level": "high"}, BadValue, "high"),
        ({"n_iter": 0}, BadValue, "n_iter=0"),
        ({"n_iter": 2.0}, BadValue, "n_iter=2.0"),
        ({"noise": 3}, BadType, "torch.Generator"),
        ({"noise": ""}, BadKey, "not a key"),
        ({"chunk_size": -1}, BadValue, "chunk size"),
    ],
)
def test_bad_builds(smooth, options, error, text):
    with pytest.raises(error, match=text):
        SmoothGrad(Gradient(smooth, Target("logits", 0)), **options)


def test_more_bad_builds(smooth):
    with pytest.raises(BadType, match="explainer is not a TensorDictModule"):
        SmoothGrad(smooth.module)
    with pytest.raises(BadValue, match="outputs=False"):
        SmoothGrad(Gradient(smooth, Target("logits", 0), outputs=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda td: td, BadKey, r"\('noise', 'x'\) of shape \[3, 20, 4\]"),
        (lambda td: td.set(("noise", "x"), torch.zeros(3, 4)), BadValue, r"(?s)\[3, 4\].*\[3, 20, 4\]"),
        (lambda td: td.set("noise", torch.zeros(3)), BadKey, "no noise"),
        (lambda td: td.exclude("x"), BadKey, "no entry 'x'"),
        (lambda td: td.set("x", td["x"].long()), BadType, "int64|nothing to add noise to"),
        (lambda td: td.lock_(), BadValue, "locked"),
    ],
)
def test_bad_calls_leave_everything_as_it_was(smooth, batch, change, error, text):
    td = change(batch(3))
    keys = set(td.keys(True, True))
    with pytest.raises(error, match=text):
        SmoothGrad(Gradient(smooth, Target("logits", 0)), noise="noise")(td)
    assert set(td.keys(True, True)) == keys


def test_tokens_alone_get_no_noise():
    layers = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(-2), nn.Linear(12, 2))
    model = TensorDictModule(layers, ["tokens"], ["logits"])
    explain = SmoothGrad(Gradient(model, Target("logits", 0), Site("0")))
    with pytest.raises(BadType, match="a stage of its own"):
        explain(TensorDict(tokens=torch.randint(0, 7, (5, 4)), batch_size=[5]))


def test_noise_tunnels_are_the_three_kinds(net, batch):
    """Against Captum's formulas on the same draws: the mean, the mean square, the variance."""
    td = batch(3).set(("noise", "x"), torch.randn(3, 6, 4, dtype=torch.float64))
    explain = Gradient(net, Target("logits", 1))
    options = {"n_iter": 6, "noise_level": 0.5, "relative": False, "noise": "noise"}
    each = torch.stack(
        [explain(td.copy().set("x", td["x"] + 0.5 * td["noise", "x"][:, i]))["attribution", "x"] for i in range(6)]
    )
    slow = {"smoothgrad": each.mean(0), "smoothgrad_sq": each.square().mean(0), "vargrad": each.var(0, correction=0)}
    for kind, expected in slow.items():
        torch.testing.assert_close(NoiseTunnel(explain, kind, **options)(td.copy())["attribution", "x"], expected)
    with pytest.raises(BadValue, match="kind of noise tunnel"):
        NoiseTunnel(explain, "smooth")


def test_draws_would_change_each_other_through_the_statistics_of_a_batch():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    explain = SmoothGrad(TensorDictModule(net, ["x"], [("attribution", "x")]), n_iter=3)
    td = TensorDict(x=torch.randn(5, 4), batch_size=[5])
    with pytest.raises(BadValue, match="draws would change each other"):
        explain(td)
    net.eval()
    assert explain(td)["attribution", "x"].shape == (5, 3)
