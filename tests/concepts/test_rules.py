"""Logic rules, re-derived by summing over every way the roles and concepts can turn out."""

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torch.autograd import forward_ad

from tdconcepts.concepts.rules import LogicRules, RuleLikelihood, RuleSelector
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadValue

nan = math.nan


def rules(c=3, tasks=2, m=2, **options):
    torch.manual_seed(0)
    return LogicRules(ConceptSpec(c), tasks, m, rule_size=4, **options).double()


def set_roles(model, wanted):
    """Make the decoded roles certain: ``wanted[t][m]`` is a text such as ``"+-0"``."""
    logits = torch.tensor([[[[40.0 * (r == s) for s in "+-0"] for r in rule] for rule in task] for task in wanted])
    model.decoder = torch.nn.Identity()
    model.memory = torch.nn.Parameter(logits.double().mT.flatten(-2))
    return model


def test_a_rule_is_the_expectation_over_concepts_and_roles():
    model = rules()
    c, selection = torch.rand(3).double(), torch.rand(2, 2).double()
    truth, probs = model(c, selection)
    w = model.roles()
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 3).double())
    for t, m in itertools.product(range(2), range(2)):
        total = 0.0
        for roles in itertools.product(range(3), repeat=3):
            for values in itertools.product((0, 1), repeat=3):
                chance = 1.0
                for i in range(3):
                    chance *= w[t, m, i, roles[i]] * (c[i] if values[i] else 1 - c[i])
                holds = all(r == 2 or (v == 1) == (r == 0) for r, v in zip(roles, values, strict=True))
                total += chance * holds
        torch.testing.assert_close(truth[t, m], total)
    torch.testing.assert_close(probs, (selection * truth).sum(-1))


def test_a_perfect_rule_holds_with_one_whatever_the_number_of_concepts():
    """W11: a factor of .999 caps a perfect rule at .894 for 112 concepts and at .368 for 1000."""
    model = set_roles(rules(1000, 1, 1), [["+-" * 500]])
    concepts = torch.tensor([1.0, 0.0]).repeat(500).double()
    for mode in (model, model.eval()):
        truth, _ = mode(concepts, torch.ones(1, 1).double())
        assert truth.item() == pytest.approx(1.0, abs=1e-12)
    concepts[7] = 1
    assert model(concepts, torch.ones(1, 1).double())[0].item() == pytest.approx(0.0, abs=1e-12)


def test_certain_roles_give_the_same_by_products_and_by_logarithms():
    model = rules(roles=("soft", "argmax"))
    c, selection = torch.rand(6, 3).double(), torch.rand(6, 2, 2).double()
    c[0, 0], c[1, 1] = 0, 1
    soft = model(c, selection)[0]
    by_products = model.eval()(c, selection)[0]
    with torch.no_grad():
        by_logarithms = model(c, selection)[0]
    torch.testing.assert_close(by_products, by_logarithms)
    assert not torch.allclose(soft, by_products)
    hard = model.roles()
    assert set(hard.detach().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,), ()])
@pytest.mark.parametrize("kind", ["soft", "argmax"])
def test_rows_in_parts_give_the_same_as_all_at_once(monkeypatch, kind, shape):
    """Also the gradients, where concepts are 0 or 1 and a rule says the contrary."""
    model = set_roles(rules(roles=kind), [["+-0", "000"], ["++-", "-0+"]])
    model.memory.data.mul_(torch.rand(model.memory.shape) < 0.5)  # some roles are certain, others are not
    c, selection = torch.rand(*shape, 3).double().requires_grad_(), torch.rand(*shape, 2, 2).double()
    c.data[..., 0], c.data[..., 1] = 0, 1
    found = []
    for factors in (2**18, 24, 1):  # all at once, two rows, one
        monkeypatch.setattr("tdconcepts.concepts.rules._FACTORS", factors)
        truth, probs = model(c, selection)
        assert truth.shape == (*shape, 2, 2)
        found.append((truth, probs, *torch.autograd.grad((truth.exp().sum(-1) * probs).sum(), [c, model.memory])))
    w = model.roles().detach()
    slow = (w[..., 2] + c[..., None, None, :] * w[..., 0] + (1 - c[..., None, None, :]) * w[..., 1]).prod(-1)
    torch.testing.assert_close(found[0][0], slow)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (1,), ()])
@pytest.mark.parametrize("kind", ["soft", "argmax"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, for tangents
def test_without_a_graph_the_parts_share_memory_and_nothing_else_changes(monkeypatch, kind, shape):
    """Also below ``vmap`` and with tangents, where there is no such memory; what was given stays as it was."""
    model = set_roles(rules(roles=kind), [["+-0", "000"], ["++-", "-0+"]])
    model.memory.data.mul_(torch.rand(model.memory.shape) < 0.5)
    c, selection = torch.rand(*shape, 3).double(), torch.rand(*shape, 2, 2).double()
    before, w = c.clone(), model.roles().detach()
    slow = (w[..., 2] + c[..., None, None, :] * w[..., 0] + (1 - c[..., None, None, :]) * w[..., 1]).prod(-1)
    for factors in (2**18, 24, 1):
        monkeypatch.setattr("tdconcepts.concepts.rules._FACTORS", factors)
        with torch.no_grad():
            torch.testing.assert_close(model(c, selection)[0], slow)
            mapped = torch.vmap(model)(c.expand(2, *c.shape), selection.expand(2, *selection.shape))[0]
            torch.testing.assert_close(mapped, slow.expand_as(mapped))
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(model(forward_ad.make_dual(c, torch.ones_like(c)), selection)[0])
        torch.testing.assert_close(found.primal, slow)
        ahead = model(c + 1e-6, selection)[0].detach()
        torch.testing.assert_close(found.tangent, (ahead - slow) / 1e-6, atol=1e-4, rtol=1e-4)
        assert torch.equal(c, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rules_that_hold_nowhere_are_zero_by_logarithms(dtype):
    model = set_roles(rules(400, 1, 2, roles="argmax"), [["+-" * 200, "-0" * 200]]).to(dtype)
    concepts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]).repeat(1, 200).to(dtype)
    with torch.no_grad():
        truth, _ = model(concepts, torch.ones(3, 1, 2, dtype=dtype))
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(truth[:, 0], expected, atol=1e-30, rtol=0)


def test_argmax_roles_have_the_gradient_of_the_soft_ones():
    model = rules(roles="argmax")
    pull = torch.randn(2, 2, 3, 3).double()
    (hard,) = torch.autograd.grad((model.roles() * pull).sum(), model.memory)
    (soft,) = torch.autograd.grad((model.roles("soft") * pull).sum(), model.memory)
    torch.testing.assert_close(hard, soft)


def test_what_a_rule_says():
    spec = ConceptSpec(["wing", "colour"], [1, 2])
    model = set_roles(LogicRules(spec, 1, 3), [["+-0", "000", "0++"]])
    assert model.text() == [["wing & ~colour = 0", "true", "colour = 0 & colour = 1"]]


def slow_likelihood(model, selection, labels, task, beta):
    w, total = model.roles("soft").tolist(), 0.0
    for t in range(model.tasks):
        if math.isnan(task[t]):
            continue
        p = 0.0
        for m in range(model.memory_size):
            holds = rebuilt = 1.0
            for (pos, neg, irr), y in zip(w[t][m], labels, strict=True):
                if math.isnan(y):
                    continue
                holds *= irr + (pos if y == 1 else neg)
                rebuilt *= (pos if y == 1 else neg) + irr / 2
            p += selection[t][m] * (holds * rebuilt**beta if task[t] == 1 else 1 - holds)
        total -= math.log(p)
    return total


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.1])
def test_the_likelihood_one_rule_at_a_time(beta):
    model = rules()
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, nan, 0], [nan, nan, nan]]).double()
    task = torch.tensor([[1.0, 0], [0, 0], [1, 1], [nan, 1]]).double()
    selection = torch.rand(4, 2, 2).double().softmax(-1)
    found = RuleLikelihood(model, reconstruction=beta)(selection, labels, task)
    each = zip(selection.tolist(), labels.tolist(), task.tolist(), strict=True)
    expected = [slow_likelihood(model, s, y, t, beta) for s, y, t in each]
    torch.testing.assert_close(found, torch.tensor(expected).double())
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_reconstruction_prefers_a_rule_that_is_a_prototype():
    model = set_roles(rules(2, 1, 2), [["+0", "+-"]])
    one, two = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).double()
    labels, task = torch.tensor([1.0, 0.0]).double(), torch.ones(1).double()
    plain, with_it = RuleLikelihood(model, reconstruction=0.0), RuleLikelihood(model)
    assert plain(one, labels, task).item() == pytest.approx(plain(two, labels, task).item(), abs=1e-9)
    assert with_it(one, labels, task).item() == pytest.approx(math.log(2), abs=1e-6)
    assert with_it(two, labels, task).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_batch_and_dtype(batch, dtype):
    model = rules(roles=("soft", "argmax")).to(dtype)
    latent = torch.randn(*batch, 5).to(dtype)
    selection = RuleSelector(5, 2, 2, [3]).to(dtype)(latent)
    for mode in (model, model.eval()):
        with torch.no_grad():
            truth, probs = mode(torch.rand(*batch, 3).to(dtype), selection)
        assert truth.shape == (*batch, 2, 2)
        assert probs.shape == (*batch, 2)
        assert probs.dtype is dtype
    loss = RuleLikelihood(model)(selection, torch.ones(*batch, 3), torch.ones(*batch, 2))
    assert loss.shape == torch.Size(batch)
    assert loss.isfinite().all()


def test_one_task_needs_no_dim():
    model = rules(tasks=1)
    td = TensorDict({"selection": torch.full((3, 1, 2), 0.5), "labels": torch.ones(3, 3), "task": torch.ones(3)}, [3])
    assert RuleLikelihood(model.float())(td)["loss", "rules"].shape == (3,)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: RuleSelector(4, 0, 1), "memory_size"),
        (lambda: RuleSelector(4, 2, 1)(torch.zeros(3)), r"\[\*B, 4\]"),
        (lambda: LogicRules(["a"], 0, 1), "tasks"),
        (lambda: LogicRules(ConceptSpec(["a"], kinds=["continuous"]), 1, 1), "continuous"),
        (lambda: LogicRules(["a"], 1, 1, roles="hard"), "hard"),
        (lambda: LogicRules(["a"], 1, 1, roles=("soft",)), "pair"),
        (lambda: LogicRules(["a"], 1, 1, keys={"a": "b"}), "keys for"),
        (lambda: rules()(torch.rand(3).double(), torch.rand(2, 3).double()), r"\[\*B, 2, 2\]"),
        (lambda: rules()(torch.rand(1, 3).double(), torch.rand(5, 2, 2).double()), "different batches"),
        (lambda: RuleLikelihood(rules(), ["a", "b"]), "three"),
        (lambda: RuleLikelihood(rules(), reconstruction=-1.0), "-1.0"),
    ],
)
def test_bad_input(build, text):
    with pytest.raises(BadValue, match=text):
        build()


def test_a_selector_of_large_scores_is_a_softmax():
    stage = RuleSelector(1, 3, 1)
    stage.layers.weight.data = torch.tensor([[1000.0], [999.0], [-1000.0]])
    stage.layers.bias.data.zero_()
    torch.testing.assert_close(stage(torch.ones(1, 1)), torch.tensor([[[1000.0, 999.0, -1000.0]]]).softmax(-1))
