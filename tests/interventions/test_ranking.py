"""Rankings: exactly k, high first, ties by index; of those allowed; within a budget."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdconcepts.interventions.ranking import affordable_mask, counted_mask, prepare, top_mask

SCORES = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 0.5, 3.0, math.inf, math.nan])


def slow(row, k):
    """The definition: sort by score, then by index; NaN is below everything, minus infinity too."""
    return slow_counted(row, [True] * len(row), k)


@given(
    st.integers(1, 7).flatmap(
        lambda n: st.tuples(st.lists(st.lists(SCORES, min_size=n, max_size=n), max_size=4), st.integers(0, n))
    )
)
def test_top_mask_is_the_definition(case):
    rows, k = case
    if not rows:
        return
    score = torch.tensor(rows)
    expected = torch.tensor([slow(row, k) for row in rows])
    assert torch.equal(top_mask(score, k), expected)
    assert torch.equal(torch.vmap(lambda row: top_mask(row, k))(score), expected)  # the path without numpy
    assert torch.equal(top_mask(score.to(torch.bfloat16), k), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool]
)
def test_any_dtype(dtype):
    score = torch.randint(0, 2, (40, 9)).to(dtype)
    for k in (0, 1, 4, 9):
        assert torch.equal(top_mask(score, k), torch.tensor([slow(row, k) for row in score]))


def test_the_score_is_not_changed():
    score = torch.tensor([[1.0, math.nan, math.inf]])
    before = score.clone()
    top_mask(score, 2)
    assert torch.equal(score.nan_to_num(), before.nan_to_num())


def slow_counted(row, allowed, k):
    values = [(math.isnan(v), 0.0 if math.isnan(v) else -v, i) for i, v in enumerate(map(float, row))]
    chosen = sorted(value for value, a in zip(values, allowed, strict=True) if a)[:k]
    return [value in chosen for value in values]


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.tuples(SCORES, st.booleans()), min_size=n, max_size=n).flatmap(
            lambda row: st.tuples(st.just(row), st.integers(0, n + 1))
        )
    )
)
def test_counted_mask_is_the_definition(case):
    row, k = case
    score, allowed = torch.tensor([s for s, _ in row]), torch.tensor([a for _, a in row])
    expected = slow_counted(score, allowed, k)
    assert counted_mask(score, allowed, k).tolist() == expected
    assert counted_mask(score[None], allowed[None], torch.tensor([k])).tolist() == [expected]
    assert counted_mask(score.half(), allowed, k).tolist() == expected
    if all(allowed) and k <= len(row):
        assert counted_mask(score, allowed, k).tolist() == top_mask(score, k).tolist()


def slow_affordable(row, allowed, costs, budget):
    taken = [False] * len(row)
    for i in sorted((i for i in range(len(row)) if allowed[i]), key=lambda i: (-row[i], i)):
        if costs[i] <= budget:
            taken[i], budget = True, budget - costs[i]
    return taken


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(
            st.tuples(st.integers(-2, 2), st.booleans(), st.integers(0, 4)), min_size=n, max_size=n
        ).flatmap(lambda row: st.tuples(st.just(row), st.integers(0, 9)))
    )
)
def test_affordable_mask_is_the_definition(case):
    row, budget = case
    score, allowed, costs = ([x[i] for x in row] for i in range(3))
    expected = slow_affordable(score, allowed, costs, budget)
    given_ = torch.tensor(score), torch.tensor(allowed), torch.tensor(costs), torch.tensor(float(budget))
    assert affordable_mask(*given_).tolist() == expected


def test_ties_go_by_index_in_long_rows_too():
    """Where a sort that is not stable shuffles them."""
    score = torch.randint(0, 3, (20, 200), generator=torch.Generator().manual_seed(0)).float()
    allowed, costs = score >= 0, torch.ones(200)
    expected = torch.tensor([slow(row, 50) for row in score])
    assert torch.equal(counted_mask(score, allowed, torch.full((20,), 50)), expected)
    assert torch.equal(counted_mask(score, allowed, 50), expected)
    assert torch.equal(affordable_mask(score, allowed, costs, torch.full((20,), 50.0)), expected)


@pytest.mark.parametrize("columns", [4, 40])
def test_a_row_that_is_short_by_a_nan_and_one_that_is_long_by_a_tie_do_not_make_up_for_each_other(columns):
    score = torch.zeros(2, columns)
    score[0, :3] = torch.tensor([math.nan, 5.0, 4.0])  # without a care for NaN: one reached instead of two
    score[1, :3] = 5.0  # three reached instead of two
    found = top_mask(score, 2)
    assert found.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]


def test_a_budget_of_tenths_buys_as_many_tenths():
    """0.3 - 0.1 - 0.1 is below 0.1 in floating point."""
    score = torch.arange(5.0)
    costs = torch.full((5,), 0.1, dtype=torch.float64)
    assert affordable_mask(score, score >= 0, costs, torch.tensor(0.3, dtype=torch.float64)).sum() == 3
    assert affordable_mask(score, score >= 0, costs, torch.tensor(0.29, dtype=torch.float64)).sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_in_a_graph_it_is_one_operation_with_the_same_result(dtype):
    prepare()
    torch._dynamo.reset()
    score = torch.randint(0, 4, (20, 12)).to(dtype)
    expected = torch.tensor([slow(row, 5) for row in score])
    assert torch.equal(torch.compile(lambda s: top_mask(s, 5), fullgraph=True, backend="aot_eager")(score), expected)
    mapped = torch.compile(torch.vmap(lambda s: top_mask(s, 5)), fullgraph=True, backend="eager")
    assert torch.equal(mapped(score), expected)
    cases = [(score.contiguous(), 5), (score[:0], 5), (score[0], 1)]
    for case in cases:
        torch.library.opcheck(torch.ops.tdconcepts.top_mask.default, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize(("columns", "k"), [(12, 5), (12, 0), (12, 12), (12, 30), (6, 2)])
def test_of_those_allowed_in_a_graph_is_the_definition(dtype, columns, k):
    prepare()
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, (20, columns), generator=generator).to(dtype)
    allowed = torch.rand(20, columns, generator=generator) < 0.6
    if dtype.is_floating_point:
        score[0, :4], score[1, :3] = torch.inf, torch.tensor([-torch.inf, torch.nan, -torch.inf])
    expected = torch.tensor([slow_counted(row, open_, k) for row, open_ in zip(score, allowed, strict=True)])
    assert torch.equal(counted_mask(score, allowed, k), expected)
    for backend in "eager", "aot_eager":
        compiled = torch.compile(lambda s, a: counted_mask(s, a, k), fullgraph=True, backend=backend)
        assert torch.equal(compiled(score, allowed), expected)
    mapped = torch.compile(torch.vmap(lambda s, a: counted_mask(s, a, k)), fullgraph=True, backend="eager")
    assert torch.equal(mapped(score, allowed), expected)
    torch.library.opcheck(torch.ops.tdconcepts.top_bytes.default, (score, 1))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_few_columns_in_a_graph_are_the_definition(k):
    score = torch.tensor([[0.5, math.nan, 0.5, 3.0, 0.5], [math.inf, math.inf, -math.inf, math.nan, 1.0], [2.0] * 5])
    for scores in (score, score > 1, torch.tensor([[3, 1, 3, 3, 0]])):
        found = torch.compile(lambda s: top_mask(s, k), fullgraph=True, backend="eager")(scores)
        assert found.tolist() == [slow(row, k) for row in scores.tolist()]


@pytest.mark.parametrize("columns", [3, 12])
def test_in_a_graph_a_nan_is_ranked_before_what_is_not_allowed(columns):
    torch._dynamo.reset()
    prepare()
    score, allowed = torch.zeros(2, columns), torch.zeros(2, columns, dtype=torch.bool)
    score[:, 0], score[:, -1] = 5, math.nan
    allowed[:, -2:] = True
    compiled = torch.compile(lambda s, a: counted_mask(s, a, 2), fullgraph=True, backend="eager")
    assert torch.equal(compiled(score, allowed), allowed)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own
@pytest.mark.parametrize("n", [3, 12])
def test_under_the_derivatives_of_torch_func(n):
    """Their wrapped tensors have no memory that numpy could read."""
    score = torch.randn(n)

    def total(values):
        return torch.where(top_mask(values, 2), values.square(), 0).sum()

    expected = torch.where(top_mask(score, 2), 2 * score, 0)
    assert torch.equal(torch.func.grad(total)(score), expected)
    assert torch.equal(torch.func.jacfwd(total)(score), expected)
    assert torch.equal(torch.vmap(torch.func.grad(total))(score[None]), expected[None])
