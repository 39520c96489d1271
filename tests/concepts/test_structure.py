"""LearnedGraph: no cycle in any state, and edges that are there are found."""

import pytest
import torch
from torch import nan

from tdconcepts.concepts.losses import ConceptLoss
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.structure import LearnedGraph
from tdconcepts.errors import BadValue

SPEC = ConceptSpec(["a", "b", "c"], [1, 3, 1])


def learned(**options):
    torch.manual_seed(0)
    return LearnedGraph(SPEC, **options)


def test_the_formula():
    graph, block = learned(threshold=0.2, temperature=0.5), torch.rand(6, 5)
    owner = [0, 1, 1, 1, 2]
    soft, hard = graph(block), graph.eval()(block)
    for b in range(6):
        for j in range(5):
            smooth = sharp = graph.bias[j]
            for i in range(5):
                gap = graph.priority[owner[j]] - graph.priority[owner[i]] - 0.2
                w = graph.weight[i, j] * block[b, i] * (owner[i] != owner[j])
                smooth = smooth + (gap / 0.5).sigmoid() * w
                sharp = sharp + (gap > 0) * w
            torch.testing.assert_close(soft[b, j], smooth)
            torch.testing.assert_close(hard[b, j], sharp)


@pytest.mark.parametrize("seed", range(10))
def test_there_is_never_a_cycle(seed):
    """torch_concepts' learner gives cycles and loops for a threshold below 0; here that is refused."""
    torch.manual_seed(seed)
    graph = LearnedGraph(6, threshold=0.05 * seed)
    adjacency = graph.adjacency(hard=True)
    power = torch.matrix_power(adjacency, 6)
    assert power.abs().max() == 0
    assert graph.dag(0.0).levels
    assert graph.training


def test_strengths_are_norms_of_blocks():
    graph = learned().eval()
    expected = torch.zeros(3, 3)
    columns = [[0], [1, 2, 3], [4]]
    for i in range(3):
        for j in range(3):
            expected[i, j] = graph.weight[columns[i]][:, columns[j]].norm() * graph.adjacency()[i, j]
    torch.testing.assert_close(graph.strength(), expected)
    graph.sparsity().backward()
    assert graph.weight.grad.isfinite().all()


def test_a_chain_is_found():
    torch.manual_seed(0)
    x = torch.randn(400, 1)
    y = 2 * x + 0.3 * torch.randn(400, 1)
    block = torch.cat([x, y, torch.randn(400, 1)], 1)
    graph = LearnedGraph(ConceptSpec(["x", "y", "z"], kinds=["continuous"] * 3))
    optimizer = torch.optim.Adam(graph.parameters(), lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        ((graph(block) - block).square().mean() + 0.02 * graph.sparsity()).backward()
        optimizer.step()
    assert {frozenset(edge) for edge in graph.dag(0.3).edges} == {frozenset("xy")}


@pytest.mark.parametrize("training", [True, False])
def test_a_missing_label_takes_no_part_and_leaves_every_gradient_finite(training):
    graph = learned().train(training)
    labels = torch.tensor([[1.0, 0, 1, 0, nan], [nan, 0, nan, 1, 1], [0, 1, 0, 0, 1]])
    found = graph(labels)
    block = labels.clone()
    block[0, 4] = block[1, 0] = 0
    block[1, 1:4] = 0  # one column of a concept is missing, and so is the concept
    torch.testing.assert_close(found, graph(block))
    ConceptLoss(SPEC)(found, labels).sum().backward()
    expected = [p.grad.clone() for p in graph.parameters() if p.grad is not None]
    graph.zero_grad()
    ConceptLoss(SPEC)(graph(block), labels).sum().backward()
    assert all(grad.isfinite().all() for grad in expected)
    torch.testing.assert_close([p.grad for p in graph.parameters() if p.grad is not None], expected)


def test_bad_input():
    for options, text in (
        ({"threshold": -0.1}, "allows cycles"),
        ({"temperature": 0.0}, "above 0"),
        ({"spread": -1.0}, "above 0"),
        ({"keys": {}}, "read: write"),
    ):
        if options != {"keys": {}}:
            with pytest.raises(BadValue, match=text):
                learned(**options)
    with pytest.raises(BadValue, match=r"\[\*B, 5\]"):
        learned()(torch.zeros(4))


def test_an_edge_of_no_strength_has_a_finite_gradient():
    graph = LearnedGraph(["a", "b"])
    graph.weight.data.zero_()
    graph.sparsity().backward()
    assert graph.weight.grad.isfinite().all()
