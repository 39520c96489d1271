"""GraphPropagation: each concept from its parents, one at a time; and do."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict

from tdconcepts.concepts.graphs import Dag
from tdconcepts.concepts.propagation import GraphPropagation, HyperEquations, LinearEquations, graph_layout
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadValue

SPEC = ConceptSpec(["y", "a", "c", "b"], [1, 3, 1, 2], ["binary", "categorical", "continuous", "categorical"])
DAG = Dag(["a", "b", "c", "y"], [("a", "b"), ("a", "c"), ("b", "y"), ("c", "y")])
C, E = 7, 3


def stages():
    torch.manual_seed(0)
    layout = graph_layout(SPEC, DAG)
    linear, hyper = LinearEquations(layout), HyperEquations(layout, E, 4)
    for equations in (linear, hyper):
        torch.nn.init.normal_(equations.bias)
    return GraphPropagation(SPEC, DAG, linear).double(), GraphPropagation(SPEC, DAG, hyper).double()


def slow(stage, context, do=None):
    """One row, one concept at a time, by name; weights are looked up by the place of a column in the level order."""
    place = {column: i for i, column in enumerate(stage.order.tolist())}
    equations, values, logits = stage.equations, {}, torch.zeros(C, dtype=context.dtype)
    for name in DAG.order:
        own = range(C)[SPEC.slice(name)]
        for k, column in enumerate(own):
            j, parents = place[column], [i for p in DAG.parents(name) for i in range(C)[SPEC.slice(p)]]
            if isinstance(equations, LinearEquations):
                terms = [equations.weight[j, place[i]] * values[i] for i in parents]
                logits[column] = context[k] if not parents else equations.bias[j] + sum(terms)
            else:
                e = context[column]
                hidden = F.leaky_relu(equations.trunk(e))
                terms = [(equations.readout[j, :, place[i]] * hidden).sum() * values[i] for i in parents]
                logits[column] = equations.score(e)[0] if not parents else equations.bias[j] + sum(terms)
        probs = ConceptSpec([name], [len(own)], [SPEC.kinds[SPEC.index(name)]]).probs(logits[list(own)])
        for k, column in enumerate(own):
            values[column] = probs[k] if do is None or do[column].isnan() else do[column]
    return logits, torch.stack([values[i] for i in range(C)])


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("with_do", [False, True])
def test_each_concept_from_its_parents(kind, with_do):
    stage = stages()[kind]
    context = torch.randn(5, *((3,) if kind == 0 else (C, E))).double()
    td = TensorDict({"context": context}, [5])
    if with_do:
        td["do"] = torch.full((5, C), torch.nan)
        td["do"][0, SPEC.slice("b")] = torch.tensor([1.0, 0.0])
        td["do"][1, SPEC.slice("c")] = 7.0
        td["do"][2] = torch.arange(7.0)
    out = stage(td)
    for b in range(5):
        logits, probs = slow(stage, context[b], td["do"][b] if with_do else None)
        torch.testing.assert_close(out["concepts_logits"][b], logits)
        torch.testing.assert_close(out["concepts"][b], probs.double())
    if with_do:
        assert torch.equal(out["concepts"][2], torch.arange(7.0).double())


@pytest.mark.parametrize("kind", [0, 1])
def test_do_cuts_the_edges_into_a_concept(kind):
    stage = stages()[kind]
    context = torch.randn(*((3,) if kind == 0 else (C, E))).double().requires_grad_()
    do = torch.full((C,), torch.nan)
    do[SPEC.slice("c")] = 1.0
    do[SPEC.slice("b")] = torch.tensor([0.0, 1.0])
    td = stage(TensorDict({"context": context, "do": do}))
    grad = torch.autograd.grad(td["concepts"][0], context, retain_graph=True, allow_unused=True)[0]
    of_roots = grad if kind == 0 else grad[SPEC.slice("a")]
    assert of_roots.abs().max() == 0  # y no longer depends on a
    assert torch.autograd.grad(td["concepts_logits"][2], context)[0].abs().max() > 0  # the logit says what it would be


def test_the_weights_of_the_equations_can_be_read():
    _, stage = stages()
    context = torch.randn(4, C, E).double()
    td = stage(TensorDict({"context": context}, [4]))
    weights = stage.equations.weights(context)
    y = (weights[:, 0] * td["concepts"]).sum(-1) + stage.equations.bias[stage.back[0]]
    torch.testing.assert_close(y, td["concepts_logits"][:, 0])
    assert (weights[:, 0, SPEC.slice("a")] == 0).all()


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_batch_and_dtype(batch, dtype):
    for stage, shape in zip(stages(), [(3,), (C, E)], strict=True):
        td = stage.to(dtype)(TensorDict({"context": torch.randn(*batch, *shape).to(dtype)}, batch))
        assert td["concepts"].shape == (*batch, C)
        assert td["concepts"].dtype is dtype


def test_a_thousand_concepts_are_a_few_products():
    spec = ConceptSpec(1000)
    dag = Dag(spec.names, [(str(i), str(500 + i)) for i in range(500)])
    layout = graph_layout(spec, dag)
    assert (len(layout.levels), layout.roots, int(layout.mask.sum())) == (2, 500, 500)
    stage = GraphPropagation(spec, dag, LinearEquations(layout))
    assert stage(torch.zeros(2, 500))[1].shape == (2, 1000)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: graph_layout(SPEC, Dag("ab", [])), "other names"),
        (lambda: GraphPropagation(SPEC, DAG, stages()[0].equations, ["a", "b"]), "three entries"),
        (lambda: stages()[0](torch.zeros(2, 4).double()), r"\[\*B, 3\]"),
        (lambda: stages()[1](torch.zeros(2, C, 2).double()), r"\[\*B, 7, 3\]"),
        (lambda: stages()[0](TensorDict({"context": torch.zeros(3).double(), "do": torch.zeros(6)})), r"\[\*B, 7\]"),
    ],
)
def test_bad_input(build, text):
    with pytest.raises(BadValue, match=text):
        build()


@pytest.mark.parametrize("kind", [LinearEquations, HyperEquations])
def test_of_two_concepts_in_a_level_each_follows_its_own_parents_only(kind):
    """Also parents further up than one level."""
    dag = Dag("abcde", [("a", "c"), ("b", "d"), ("c", "e"), ("b", "e")])
    spec = ConceptSpec([*"abcde"])
    layout = graph_layout(spec, dag)
    torch.manual_seed(0)
    equations = kind(layout) if kind is LinearEquations else kind(layout, 3)
    stage = GraphPropagation(spec, dag, equations)
    context = torch.randn(5, 2) if kind is LinearEquations else torch.randn(5, 5, 3)
    for name in dag.names:
        moved = []
        for value in (0.0, 1.0):
            do = torch.full((5, 5), torch.nan)
            do[:, spec.index(name)] = value
            moved.append(stage(TensorDict({"context": context, "do": do}, [5]))["concepts"])
        followed = {other for i, other in enumerate(dag.names) if not torch.equal(moved[0][:, i], moved[1][:, i])}
        assert followed == {name, *dag.descendants(name)}
