"""MemorySelector: attention over memory slots, re-derived slowly."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdconcepts.concepts.memory import MemorySelector, SelectorZU
from tdconcepts.errors import BadKey, BadType, BadValue


def selector(selection="soft", temperature=1.0, out_features=3, **keywords):
    torch.manual_seed(0)
    return MemorySelector(6, 4, 5, out_features, temperature, selection, **keywords)


def slow(model, x):
    """The formula, one row, one output, one slot at a time."""
    memory = model.memory.weight.reshape(model.out_features, model.memory_size, model.exogenous_size)
    hidden = model.selector[0](x)
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    scores = model.selector[2](hidden).reshape(len(x), model.out_features, model.memory_size)
    out = torch.zeros(len(x), model.out_features, model.exogenous_size, dtype=x.dtype)
    for b in range(len(x)):
        for t in range(model.out_features):
            total = sum((scores[b, t, m] / model.temperature).exp() for m in range(model.memory_size))
            for m in range(model.memory_size):
                out[b, t] += (scores[b, t, m] / model.temperature).exp() / total * memory[t, m]
    return out


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4])
@pytest.mark.parametrize("out_features", [1, 3])
def test_soft_selection_is_the_formula(temperature, out_features):
    model = selector(temperature=temperature, out_features=out_features).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(model(latent=x), slow(model, x))


def test_with_one_output_the_input_still_matters():
    """A softmax over the outputs (torch_concepts before 1.0.0a7) gives a single output the weight 1, whatever x is."""
    model = selector(out_features=1)
    x = torch.randn(4, 6, requires_grad=True)
    out = model(latent=x)
    assert (out[0] - out[1]).abs().max() > 1e-3
    out.square().sum().backward()
    assert x.grad.abs().max() > 0
    assert model.selector[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "selection",
    ["soft", "gumbel", "argmax", torch.Generator().manual_seed(1)],
    ids=lambda s: s if isinstance(s, str) else "generator",
)
def test_the_weights_of_each_output_sum_to_one_over_the_memory(selection):
    weights = selector(selection).weights(torch.randn(50, 2, 6))
    assert weights.shape == (50, 2, 3, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50, 2, 3))
    if selection != "soft":
        assert set(weights.unique().tolist()) == {0.0, 1.0}


def test_argmax_reads_the_slot_with_the_largest_soft_weight():
    model, x = selector("argmax"), torch.randn(9, 6)
    memory = model.memory.weight.reshape(3, 4, 5)
    best = selector("soft").weights(x).argmax(-1)
    expected = torch.stack([torch.stack([memory[t, best[b, t]] for t in range(3)]) for b in range(9)])
    assert torch.equal(model(latent=x), expected)


def test_hard_selection_has_the_gradient_of_the_soft_weights():
    hard, soft, x = selector("argmax"), selector("soft"), torch.randn(9, 6)
    pull = torch.randn(9, 3, 4)
    (got,) = torch.autograd.grad((hard.weights(x) * pull).sum(), hard.selector[0].weight)
    (expected,) = torch.autograd.grad((soft.weights(x) * pull).sum(), soft.selector[0].weight)
    torch.testing.assert_close(got, expected)


def test_gumbel_draws_slots_from_the_softmax_of_the_scores():
    """Whatever the temperature: the Gumbel-max trick. 3 standard errors of 20 000 draws are below .011."""
    model, x = selector(torch.Generator().manual_seed(0), temperature=0.3), torch.randn(6)
    expected = model.selector(x).softmax(-1)
    drawn = model.weights(x.expand(20_000, 6)).mean(0)
    assert (drawn - expected).abs().max() < 0.011


def test_gumbel_noise_by_hand():
    model, x = selector(torch.Generator().manual_seed(3), temperature=0.7), torch.randn(8, 6)
    noise = -(-torch.rand(8, 3, 4, generator=torch.Generator().manual_seed(3)).log()).log()
    expected = ((model.selector(x) + noise) / 0.7).argmax(-1)
    assert torch.equal(model.weights(x).argmax(-1), expected)


def test_gumbel_in_any_precision_draws_what_single_precision_draws(monkeypatch):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.float64):
        weights = selector_with(11).to(dtype).weights(x.to(dtype))
        assert weights.dtype == dtype
        assert torch.equal(weights.argmax(-1), selector_with(11).weights(x).argmax(-1))
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, **options: torch.zeros(*shape, **options))
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert selector_with(11).to(dtype).weights(x.to(dtype)).isfinite().all()


def test_gumbel_under_vmap():
    model, x = selector("gumbel"), torch.randn(6).expand(50, 2, 6)
    weights = torch.vmap(model.weights, randomness="different")(x)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(weights, weights[:1].expand_as(weights))
    weights = torch.vmap(model.weights, randomness="same")(x)
    assert torch.equal(weights, weights[:1].expand_as(weights))


def test_a_generator_decides_and_the_global_one_is_left_alone():
    x, state = torch.randn(8, 6), torch.get_rng_state()
    first, second = (SelectorZU.weights(m, x) for m in (selector_with(11), selector_with(11)))
    torch.set_rng_state(state)
    selector_with(11).weights(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)


def selector_with(seed):
    state = torch.get_rng_state()
    model = selector(torch.Generator().manual_seed(seed))
    torch.set_rng_state(state)
    return model


def test_the_selection_can_be_changed_later():
    model, x = selector("gumbel"), torch.randn(2, 6)
    model.selection = "argmax"
    assert torch.equal(model(latent=x), model(latent=x))
    with pytest.raises(BadValue, match="hard"):
        model.selection = "hard"


def test_argmax_at_evaluation_on_request():
    """torch_concepts draws at evaluation too, and never reads ``training``."""
    model, x = selector(("gumbel", "argmax")), torch.randn(40, 6)
    assert not torch.equal(model.weights(x), model.weights(x))
    model.eval()
    assert torch.equal(model.weights(x), selector("argmax").weights(x))
    assert torch.equal(copy.deepcopy(model)(latent=x), model(latent=x))
    model.selection = ("soft", "argmax")
    assert torch.equal(model.train().weights(x), selector().weights(x))
    for wrong in (("soft",), ("soft", "hard"), ("soft", "soft", "soft"), None):
        with pytest.raises(BadValue, match="at evaluation"):
            model.selection = wrong


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0], [2, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("selection", ["soft", "gumbel", "argmax"])
def test_any_batch_and_dtype(batch, dtype, selection):
    model = selector(selection).to(dtype)
    td = TensorDict({"latent": torch.randn(*batch, 6, dtype=dtype)}, batch)
    assert model(td) is td
    assert set(td.keys()) == {"latent", "exogenous"}
    assert td["exogenous"].shape == (*batch, 3, 5)
    assert td["exogenous"].dtype is dtype


def test_rows_are_independent():
    model, x = selector(), torch.randn(4, 6)
    torch.testing.assert_close(model(latent=x)[2], model(latent=x[2]))


def test_the_page_example_and_its_names():
    model = SelectorZU(in_features=64, memory_size=10, exogenous_size=32, out_features=5, temperature=0.5)
    assert SelectorZU is MemorySelector
    assert isinstance(model.memory, nn.Embedding)
    assert isinstance(model.selector, nn.Sequential)
    assert model(latent=torch.randn(4, 64)).shape == (4, 5, 32)


def test_other_keys():
    model = selector(keys={("agents", "h"): ("agents", "z")})
    assert (model.in_keys, model.out_keys) == ([("agents", "h")], [("agents", "z")])
    assert model(TensorDict({"agents": {"h": torch.randn(2, 6)}}, [2]))["agents", "z"].shape == (2, 3, 5)


def test_copies_pickles_state_dicts_and_compiles():
    model, x = selector(), torch.randn(2, 6)
    expected = model(latent=x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(latent=x), expected)
    torch.manual_seed(5)
    other = MemorySelector(6, 4, 5, 3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(latent=x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TensorDict({"latent": x}, [2]))["exogenous"], expected)
    torch.testing.assert_close(torch.vmap(lambda row: model(TensorDict({"latent": row}))["exogenous"])(x), expected)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: MemorySelector(0, 4, 5, 3), "'in_features': 0"),
        (lambda: MemorySelector(6, 4, 5, 2.5), "'out_features': 2.5"),
        (lambda: selector(temperature=0), "temperature"),
        (lambda: selector(temperature=-1.0), "temperature"),
        (lambda: selector(temperature=float("nan")), "temperature"),
        (lambda: selector("hard"), "'hard'"),
        (lambda: selector(keys={"a": "b", "c": "d"}), "one pair"),
    ],
)
def test_bad_builds(build, text):
    with pytest.raises(BadValue, match=text):
        build()


@pytest.mark.parametrize(
    ("td", "error", "text"),
    [
        (TensorDict({"latents": torch.zeros(6)}), BadKey, "did you mean 'latents'"),
        (TensorDict({"latent": torch.zeros(5)}), BadValue, r"\[\*B, 6\]"),
        (TensorDict({"latent": torch.zeros(6, dtype=torch.long)}), BadType, "int64"),
        (TensorDict({"latent": torch.zeros(6)}).lock_(), BadValue, "locked"),
    ],
)
def test_bad_calls(td, error, text):
    with pytest.raises(error, match=text):
        selector()(td)


def test_a_drawn_slot_has_the_gradient_of_the_softmax_at_the_temperature():
    model, x, pull = selector(torch.Generator(), temperature=0.3), torch.randn(9, 6), torch.randn(9, 3, 4)
    model.selection.manual_seed(5)
    (got,) = torch.autograd.grad((model.weights(x) * pull).sum(), model.selector[0].weight)
    gumbel = -(-torch.rand(9, 3, 4, generator=torch.Generator().manual_seed(5)).log()).log()
    soft = ((model.selector(x) + gumbel) / 0.3).softmax(-1)
    (expected,) = torch.autograd.grad((soft * pull).sum(), model.selector[0].weight)
    torch.testing.assert_close(got, expected)
