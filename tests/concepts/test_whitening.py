"""ConceptWhitening: covariance one, rotations that stay rotations, axes that find their concepts."""

import copy
import itertools
import pickle

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.whitening import ConceptWhitening, cayley_step, zca
from tdconcepts.errors import BadType, BadValue


def data(n=2000):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (n, 2), generator=g)
    base = torch.randn(n, 5, generator=g)
    base[:, 0] += 3 * labels[:, 0]
    base[:, 1] += 3 * labels[:, 1]
    return (base @ torch.randn(5, 5, generator=g) + 1).double(), labels


def ready(**options):
    torch.manual_seed(0)
    stage = ConceptWhitening(5, ["a", "b"], momentum=1.0, **options).double()
    z, labels = data()
    stage(latent=z)
    return stage, z, labels


def test_zca_by_its_definition():
    z, _ = data()
    covariance = z.T.cov(correction=0)
    exact, newton = zca(covariance), zca(covariance, iterations=30)
    torch.testing.assert_close(exact @ covariance @ exact, torch.eye(5).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(exact, exact.T)
    torch.testing.assert_close(newton, exact, atol=1e-6, rtol=1e-6)
    p, trace = torch.eye(5).double(), covariance.trace()
    for _ in range(3):
        p = 0.5 * (3 * p - torch.linalg.matrix_power(p, 3) @ covariance / trace)
    torch.testing.assert_close(zca(covariance, iterations=3), p / trace**0.5)


def test_in_training_the_batch_is_whitened_and_gradients_flow():
    stage = ConceptWhitening(5, ["a"], iterations=25).double()
    z, _ = data()
    z = z.clone().requires_grad_()
    out = stage(latent=z)
    torch.testing.assert_close(out.mean(0), torch.zeros(5).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(out.T.cov(correction=0), torch.eye(5).double(), atol=1e-3, rtol=0)
    out.square().sum().backward()
    assert z.grad.isfinite().all()
    torch.testing.assert_close(stage.mean, 0.05 * z.mean(0).detach())


def test_at_evaluation_rows_are_alone_and_running_means_are_used():
    stage, z, _ = ready()
    stage.eval()
    out = stage(latent=z)
    torch.testing.assert_close(out.T.cov(correction=0), torch.eye(5).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(stage(latent=z[7]), out[7])
    before = stage.covariance.clone()
    stage(latent=z[:3])
    assert torch.equal(stage.covariance, before)


@pytest.mark.parametrize("method", ["cayley", "exact"])
def test_axes_find_their_concepts(method):
    stage, z, labels = ready()
    stage.align(z, labels, method=method, steps=30)
    torch.testing.assert_close(stage.rotation @ stage.rotation.T, torch.eye(5).double(), atol=1e-9, rtol=0)
    out = stage.eval()(latent=z)
    for c in range(2):
        gaps = [out[labels[:, c] == 1, j].mean() - out[labels[:, c] == 0, j].mean() for j in range(5)]
        assert max(range(5), key=lambda j: gaps[j].abs()) == c
        assert gaps[c] > 1.5


def test_the_objective_rises_to_its_optimum_the_sum_of_singular_values():
    stage, z, labels = ready()
    values = [stage.align(z, labels, steps=1) for _ in range(40)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    best = torch.linalg.svdvals(stage.directions).sum().item()
    assert values[-1] == pytest.approx(best, rel=1e-3)
    assert stage.align(z, labels, method="exact") == pytest.approx(best, rel=1e-9)


def test_a_cayley_step_is_on_the_curve_of_the_paper():
    torch.manual_seed(0)
    rotation, wanted = torch.linalg.qr(torch.randn(4, 4).double())[0], torch.randn(4, 4).double()
    turned = cayley_step(rotation, wanted)
    torch.testing.assert_close(turned @ turned.T, torch.eye(4).double())
    assert (turned * wanted).sum() > (rotation * wanted).sum()
    a = -wanted @ rotation.T + rotation @ wanted.T
    # R(t) = (I + t/2 A)^-1 (I - t/2 A) R, so (R - turned) = t/2 A (R + turned) for one t
    half = a @ (rotation + turned) / 2
    t = ((rotation - turned) * half).sum() / half.square().sum()
    torch.testing.assert_close(rotation - turned, t * half)
    assert torch.equal(cayley_step(rotation, rotation * 2), rotation)  # already the best


def test_means_are_kept_with_momentum_and_where_a_concept_is_missing():
    stage, z, labels = ready()
    stage.align(z, labels)
    before = stage.directions.clone()
    some = labels.double()
    some[:, 1] = torch.nan
    stage.align(z, some, momentum=0.5)
    torch.testing.assert_close(stage.directions, before)
    stage.align(z[:100], labels[:100], momentum=0.5)
    assert not torch.allclose(stage.directions, before)


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
def test_any_batch_and_copies(batch):
    stage, _, _ = ready()
    stage.eval()
    td = stage(TensorDict({"latent": torch.randn(*batch, 5).double()}, batch))
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert torch.equal(other(td.copy())["whitened"], td["whitened"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_latent_of_another_dtype_is_whitened_in_single_precision_or_double(training, dtype):
    z = data(50)[0].to(dtype)
    stage, wide = ConceptWhitening(5, ["a"]).train(training), ConceptWhitening(5, ["a"]).double().train(training)
    out = stage(latent=z)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wide(latent=z.double()), atol=tolerance, rtol=tolerance)
    assert stage.mean.dtype == stage.covariance.dtype == torch.float32
    torch.testing.assert_close(stage.covariance.double(), wide.covariance, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_takes_no_digits(training):
    z, labels = data(50)
    z = z.float()
    stage, plain = (ConceptWhitening(5, ["a", "b"]).train(training) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out, objective = stage(latent=z), stage.align(z, labels)
        assert stage(latent=z.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(out, plain(latent=z))
    assert objective == plain.align(z, labels)


def test_vmap_in_training_is_refused_and_changes_nothing():
    """The rows of all calls would have to be known together; batch norm refuses it as well."""
    z, stage = data(40)[0].float().view(2, 20, 5), ConceptWhitening(5, ["a"])
    before = copy.deepcopy(stage.state_dict())
    pulled = torch.func.grad(lambda rows: stage(latent=rows).square().sum())
    for function in (lambda rows: stage(latent=rows), pulled):
        with pytest.raises(BadValue, match=r"got:     torch.vmap\n  way out: stage.eval\(\), or all rows in one batch"):
            torch.vmap(function)(z)
    torch.testing.assert_close(copy.deepcopy(stage).state_dict(), before, atol=0, rtol=0)
    stage(latent=z)
    stage.eval()
    torch.testing.assert_close(torch.vmap(lambda rows: stage(latent=rows))(z), stage(latent=z))


def test_stages_of_an_ensemble_may_be_mapped_over_with_their_state():
    z, stages = data(40)[0].float().view(2, 20, 5), [ConceptWhitening(5, ["a"]) for _ in range(2)]
    _, state = torch.func.stack_module_state(stages)
    call = lambda buffers, rows: torch.func.functional_call(stages[0], buffers, (), {"latent": rows})  # noqa: E731
    found = torch.vmap(call)(state, z)
    torch.testing.assert_close(found, torch.stack([ConceptWhitening(5, ["a"])(latent=rows) for rows in z]))


@pytest.mark.parametrize("way", ["grad", "jacrev", "inference"])
def test_running_means_are_plain_tensors_after(way):
    z, stage, plain = data(40)[0].float(), ConceptWhitening(5, ["a", "b"]), ConceptWhitening(5, ["a", "b"])
    plain(latent=z)
    plain.align(z, data(40)[1])
    if way == "inference":
        with torch.inference_mode():
            stage(latent=z)
            stage.align(z, data(40)[1])
    elif way == "grad":
        torch.func.grad(lambda rows: stage(latent=rows).square().sum())(z)
    else:
        torch.func.jacrev(lambda rows: stage(latent=rows))(z)
    other = pickle.loads(pickle.dumps(stage))
    assert torch.equal(other.mean, plain.mean)
    assert torch.equal(other.covariance, plain.covariance)
    stage.load_state_dict({key: value + 1 for key, value in plain.state_dict().items()})
    assert torch.equal(stage.rotation, plain.rotation + 1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ConceptWhitening(2, ["a", "b", "c"]), BadValue, "2 columns or fewer"),
        (lambda: ConceptWhitening(2, ConceptSpec(["a"], kinds=["continuous"])), BadValue, "axis for each"),
        (lambda: ConceptWhitening(2, ["a"], momentum=0.0), BadValue, "momentum"),
        (lambda: ConceptWhitening(2, ["a"], iterations=0), BadValue, "iterations"),
        (lambda: ConceptWhitening(2, ["a"])(torch.zeros(0, 2)), BadValue, "0 rows"),
        (lambda: ConceptWhitening(2, ["a"])(torch.zeros(2)), BadValue, "1 rows"),
        (lambda: ConceptWhitening(2, ["a"]).align(torch.zeros(3, 2), torch.zeros(3, 1), method="qr"), BadValue, "qr"),
        (lambda: ConceptWhitening(2, ["a"]).align(torch.zeros(3, 2), torch.zeros(3, 2)), BadValue, r"\[3, 2\]"),
        (lambda: ConceptWhitening(2, ["a"]).align(torch.zeros(3, 2).half(), torch.zeros(3, 1)), BadType, "float16"),
    ],
)
def test_bad_input(call, error, text):
    """An empty batch in training makes the running mean of torch_concepts NaN for ever; here it is refused."""
    with pytest.raises(error, match=text):
        call()


def test_the_parts_of_the_formula():
    """Of a small batch, where a division by one row less shows, with an eps that shows, and of few iterations."""
    torch.testing.assert_close(
        zca(torch.diag(torch.tensor([4.0, 11.0])), 5.0), torch.diag(torch.tensor([1 / 3, 1 / 4]))
    )
    stage = ConceptWhitening(2, ["a"], iterations=1, eps=0.5, momentum=0.25)
    x = torch.tensor([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0]])
    found = stage(x)
    covariance = torch.cov(x.T, correction=0)
    torch.testing.assert_close(stage.mean, 0.25 * x.mean(0))
    torch.testing.assert_close(stage.covariance, 0.75 * torch.eye(2) + 0.25 * covariance)
    wide = covariance + 0.5 * torch.eye(2)
    once = (1.5 * torch.eye(2) - 0.5 * wide / wide.trace()) / wide.trace().sqrt()
    torch.testing.assert_close(found, (x - x.mean(0)) @ once)
