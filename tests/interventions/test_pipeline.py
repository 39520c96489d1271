"""The pipeline: its stages one by one, and all in one go, with the same results."""

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential, set_skip_existing
from torch import nn

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Replace, Target, patch
from tdconcepts.interventions.draws import FromDistribution, Resample
from tdconcepts.interventions.influence import ExpectedInfluencePolicy, GradientPolicy
from tdconcepts.interventions.pipeline import InterventionPipeline
from tdconcepts.interventions.policies import LearnedPolicy, OrderPolicy, RandomPolicy, UncertaintyPolicy, UniformPolicy
from tdconcepts.interventions.selection import SelectStage
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.splicing import intervene
from tdconcepts.interventions.strategies import Do, GroundTruth

GROUPED = Splice(names=("a", "b", "c"), cardinalities=(1, 3, 1))
ENTRIES = [("intervention", name) for name in ("value", "score", "mask", "before")]


def data(*batch, columns=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (*batch, columns), generator=g).float()
    labels[torch.rand(labels.shape, generator=g) < 0.3] = math.nan
    return TensorDict(
        {
            "concepts": torch.rand(*batch, columns, generator=g, dtype=dtype),
            "labels": labels,
            "truth": labels.nan_to_num(1.0),
            "gradient": {"concepts": torch.randn(*batch, columns, generator=g, dtype=dtype)},
            "may": torch.rand(*batch, columns, generator=g) < 0.6,
        },
        batch,
    )


def one_by_one(pipeline, td):
    for stage in pipeline.module.values():
        td = stage(td)
    return td


def learned():
    torch.manual_seed(0)
    return LearnedPolicy(nn.Linear(5, 5), temperature=2.0)


POLICIES = {
    "uniform": UniformPolicy,
    "order": lambda: OrderPolicy([3, 1]),
    "uncertainty": UncertaintyPolicy,
    "random": RandomPolicy,
    "gradient": GradientPolicy,
    "influence": lambda: ExpectedInfluencePolicy(change="value"),
    "learned": learned,
    "callable": lambda: lambda c, td: c.square(),
}
STRATEGIES = {
    "do": lambda: Do(1.0),
    "do some": lambda: Do([1.0, math.nan, 0.0, 0.5, math.nan]),
    "truth": lambda: GroundTruth("truth"),
    "labels": lambda: GroundTruth("labels"),
    "draw": lambda: FromDistribution(torch.distributions.Normal(0.0, 1.0)),
    "other row": Resample,
    "callable": lambda: lambda c, td: 1 - c,
}
SELECTIONS = [{}, {"k": 2}, {"fraction": 0.5}, {"k": 1, "among": [0, 4]}, {"k": 2, "candidates": "may"}]
SELECTIONS += [{"budget": 2.5, "cost": [1, 2, 0.5, 1, 1]}, {"probability": 0.5}, {"k": 2, "only_training": True}]


@pytest.mark.parametrize(
    ("policy", "strategy", "batch"),
    [(policy, "labels", batch) for policy in POLICIES for batch in ((6,), (2, 3), (0,))]
    + [("uncertainty", strategy, (6,)) for strategy in STRATEGIES]
    + [("uniform", strategy, (2, 3)) for strategy in STRATEGIES],
)
def test_in_one_go_is_one_by_one(policy, strategy, batch):
    for select in SELECTIONS:
        pipeline = InterventionPipeline(POLICIES[policy](), STRATEGIES[strategy](), **select)
        for mode in (True, False):
            pipeline.train(mode)
            torch.manual_seed(3)
            fused = pipeline(data(*batch))
            torch.manual_seed(3)
            stages = one_by_one(pipeline, data(*batch))
            assert set(fused.keys(True, True)) == set(stages.keys(True, True))
            for key in ["concepts", *ENTRIES]:
                assert torch.equal(fused[key].nan_to_num(9.0), stages[key].nan_to_num(9.0)), (select, key)
                assert fused[key].dtype is stages[key].dtype
                assert fused[key].requires_grad == stages[key].requires_grad


@pytest.mark.parametrize("keys", [["concepts"], [ENTRIES[2]], ["concepts", ENTRIES[0], ENTRIES[3]]])
@pytest.mark.parametrize("there", [False, True])
def test_selected_keys_in_one_go(keys, there):
    pipeline = InterventionPipeline(UncertaintyPolicy(), GroundTruth("labels"), k=2).select_out_keys(*keys)
    td, expected = data(4), data(4)
    for one in (td, expected) if there else ():
        one["intervention", "mask"] = torch.ones(4, 5, dtype=torch.bool)
    found = pipeline(td)
    assert found is td
    has = {*expected.keys(True, True), *keys}  # the concepts are written in any case, as tensordict does it
    one_by_one(pipeline, expected)
    assert set(td.keys(True, True)) == has
    for key in td.keys(True, True):
        assert torch.equal(td[key].nan_to_num(9.0), expected[key].nan_to_num(9.0)), key


@pytest.mark.parametrize("strategy", ["do", "truth", "draw"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_where_all_are_replaced_nothing_shares_memory(strategy, batch):
    td = data(*batch)
    before = td.clone()
    InterventionPipeline(UncertaintyPolicy(), STRATEGIES[strategy]())(td)
    assert td["intervention", "mask"].all()
    value = td["intervention", "value"].clone()
    assert torch.equal(td["concepts"], value)
    td["concepts"].fill_(7.0)
    assert torch.equal(td["intervention", "value"], value)
    assert torch.equal(td["intervention", "before"], before["concepts"])
    assert torch.equal(td["truth"], before["truth"])


@pytest.mark.parametrize("value", [1.0, [1.0, 0.0, 0.5], torch.ones(4, 3)])
def test_who_writes_into_an_entry_changes_nothing_of_the_next_call(value):
    pipeline, concepts = InterventionPipeline(UniformPolicy(), Do(value)), torch.rand(4, 3)
    first = pipeline(TensorDict({"concepts": concepts}, [4]))
    expected = first.clone()
    for name in ("value", "score", "mask"):
        first["intervention", name][0, 0] = 0
    for other in (
        pipeline(TensorDict({"concepts": concepts}, [4])),
        one_by_one(pipeline, TensorDict(concepts=concepts)),
    ):
        for key in ["concepts", *ENTRIES]:
            assert torch.equal(other[key], expected[key])


@pytest.mark.parametrize("policy", [UniformPolicy(), OrderPolicy([2, 0, 1]), UncertaintyPolicy()])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_place_of_a_mask_can_be_changed(policy, k):
    td = InterventionPipeline(policy, Do(1.0), k=k)(data(4))
    expected = td["intervention", "mask"].tolist()
    expected[1][2] = not expected[1][2]
    td["intervention", "mask"][1, 2].logical_not_()
    assert td["intervention", "mask"].tolist() == expected


class Reversed(UniformPolicy):
    def compute(self, concepts, tensordict):
        return -torch.arange(concepts.shape[-1]).to(concepts).expand(concepts.shape)


@pytest.mark.parametrize("policy", [UniformPolicy(), OrderPolicy([1]), Reversed()])
@pytest.mark.parametrize("strategy", [Do(1.0), GroundTruth("labels"), lambda concepts, td: td["labels"] + 0.0])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("keys", [["concepts"], ["concepts", ("intervention", "before")]])
def test_where_all_are_replaced_and_nobody_asks_which(policy, strategy, grad, there, keys):
    """The same as with the mask and the score, which then need not be made."""
    concepts = torch.rand(4, 3).requires_grad_(grad)
    td = TensorDict({"concepts": concepts, "labels": torch.randint(0, 2, (4, 3)).float()}, [4])
    if there:
        td["intervention"] = {"mask": torch.zeros(4, 3)}
    whole = InterventionPipeline(policy, strategy)(td.copy())
    found = InterventionPipeline(policy, strategy).select_out_keys(*keys)(td.copy())
    assert ("intervention", "mask") not in found.keys(True) or there
    assert found["concepts"].requires_grad == whole["concepts"].requires_grad
    assert found["concepts"].data_ptr() not in (td["labels"].data_ptr(), concepts.data_ptr())
    for key in [*keys, *([("intervention", "mask")] if there else [])]:
        assert torch.equal(found[key], whole[key])


def test_where_all_are_replaced_what_is_wrong_is_still_said():
    td = TensorDict({"concepts": torch.rand(4, 3), "labels": torch.rand(4, 3)}, [4])
    cases = [
        (Splice("concepts", cardinalities=(1, 1)), Do(1.0), "the score is not one of these"),
        ("concepts", lambda concepts, td: concepts[:, :2], "shape"),
        ("concepts", Do([1.0, 0.0]), "does not fit"),
    ]
    for at, strategy, text in cases:
        pipeline = InterventionPipeline(UniformPolicy(), strategy, at)
        for one in (pipeline, copy.deepcopy(pipeline).select_out_keys("concepts")):
            with pytest.raises(BadValue, match=text):
                one(td.copy())
    td["labels"] = td["labels"] + 2
    with pytest.raises(BadValue, match="no probabilities"):
        InterventionPipeline(UniformPolicy(), GroundTruth("labels")).select_out_keys("concepts")(td)


def test_it_does_run_in_one_go_and_not_where_something_hangs_on_a_stage(monkeypatch):
    calls = []
    pipeline = InterventionPipeline(UncertaintyPolicy(), Do(1.0), k=1)
    after_another = TensorDictSequential.forward
    monkeypatch.setattr(
        TensorDictSequential, "forward", lambda self, *args: calls.append("stages") or after_another(self, *args)
    )
    pipeline(data(4))
    assert calls == []
    with pipeline["value"].register_forward_hook(lambda m, args, out: calls.append("hook")):
        pipeline(data(4))
    assert calls == ["stages", "hook"]
    one = SelectStage.forward
    monkeypatch.setattr(SelectStage, "forward", lambda self, td: calls.append("patched") or one(self, td))
    pipeline(data(4))
    assert calls == ["stages", "hook", "stages", "patched"]


def test_an_edit_between_the_stages_is_obeyed():
    pipeline = InterventionPipeline(UncertaintyPolicy(), Do(7.0), k=1)
    mask = torch.tensor([True, False, False, False, True])
    with patch(pipeline, {("intervention", "mask"): Replace(mask)}) as patched:
        assert (patched(data(4))["concepts"] == 7).int().tolist() == [[1, 0, 0, 0, 1]] * 4
    assert (pipeline(data(4))["concepts"] == 7).sum() == 4


def test_a_stage_can_be_exchanged():
    pipeline = InterventionPipeline(UncertaintyPolicy(), Do(7.0), k=1)
    pipeline.module["value"] = Do(8.0)
    assert (pipeline(data(4))["concepts"] == 8).sum() == 4
    pipeline.module["score"] = Mod(nn.Identity(), [("gradient", "concepts")], [("intervention", "score")])
    td = pipeline(data(4))
    assert torch.equal(td["intervention", "score"], td["gradient", "concepts"])


def test_all_the_ways_to_call_it():
    pipeline = InterventionPipeline(UncertaintyPolicy(), GroundTruth("labels"), k=2)
    td = data(4)
    expected = [pipeline(td.copy())[key] for key in pipeline.out_keys]
    by_position = pipeline(td["concepts"], td["labels"])
    by_name = pipeline(labels=td["labels"], concepts=td["concepts"])
    for found in (by_position, by_name):
        torch.testing.assert_close(found, tuple(expected), equal_nan=True)
    out = TensorDict({}, [4])
    assert pipeline(td.copy(), tensordict_out=out) is out
    assert set(out.keys(True, True)) == {("intervention", n) for n in ("value", "score", "mask", "before")} | {
        "concepts"
    }
    with set_skip_existing(True):
        done = pipeline(td.copy())
        done["intervention", "score"] = torch.zeros(4, 5)
        assert not pipeline(done.copy())["intervention", "score"].any()
    pipeline.select_out_keys("concepts")
    assert set(pipeline(td.copy()).keys()) == set(td.keys())
    assert isinstance(
        InterventionPipeline(UniformPolicy(), Do(0.0)).select_subsequence(out_keys=["concepts"]), TensorDictSequential
    )


def test_it_writes_into_a_group_that_is_there_and_a_batch_with_names():
    td = data(4)
    td["intervention", "note"] = torch.ones(4)
    td.names = ["row"]
    pipeline = InterventionPipeline(UniformPolicy(), Do(0.0), k=1)
    assert pipeline(td)["intervention", "note"].sum() == 4
    fresh = data(4)
    fresh.names = ["row"]
    assert pipeline(fresh)["intervention"].names == ["row"]


def test_labels_that_are_missing_keep_their_prediction_and_the_mask_says_so():
    td = data(6)
    td["labels"][2] = math.nan
    known = ~td["labels"].isnan()
    before = td["concepts"].clone()
    out = InterventionPipeline(UniformPolicy(), GroundTruth("labels"))(td)
    assert torch.equal(out["intervention", "mask"], known)
    assert torch.equal(out["concepts"], torch.where(known, td["labels"], before))
    assert not out["intervention", "mask"][2].any()


def test_of_k_labels_the_next_in_line_is_taken():
    """Row by row, by hand: the k least certain of those that are known."""
    td = data(6)
    mask = InterventionPipeline(UncertaintyPolicy(), GroundTruth("labels"), k=2)(td.copy())["intervention", "mask"]
    for concepts, labels, chosen in zip(td["concepts"], td["labels"], mask, strict=True):
        known = [i for i in range(5) if not labels[i].isnan()]
        best = sorted(known, key=lambda i: (abs(float(concepts[i]) - 0.5), i))[:2]
        assert chosen.nonzero().flatten().tolist() == sorted(best)


def test_a_categorical_concept_without_a_state_is_left_whole():
    td = TensorDict({"concepts": torch.full((2, 5), 0.3), "y": torch.tensor([[1, -1, 0], [-1, 2, 1]])}, [2])
    out = InterventionPipeline(UniformPolicy(), GroundTruth("y", missing=-1), GROUPED)(td)
    assert out["intervention", "mask"].int().tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 1, 1]]
    assert out["concepts"].isfinite().all()


def test_a_batch_that_changes_size():
    pipeline = InterventionPipeline(UncertaintyPolicy(), GroundTruth("truth"), fraction=0.5)
    for batch in ((4,), (7,), (1,), (0,), (2, 3), ()):
        assert pipeline(data(*batch))["intervention", "mask"].sum(-1).eq(2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ["uniform", "uncertainty", "random", "influence"])
def test_any_dtype(dtype, policy):
    for select in SELECTIONS:
        td = InterventionPipeline(POLICIES[policy](), GroundTruth("labels"), **select)(data(6, dtype=dtype))
        assert td["concepts"].dtype is dtype
        assert td["concepts"].isfinite().all()


@pytest.mark.parametrize("select", SELECTIONS)
def test_it_compiles_in_one_graph(select):
    torch._dynamo.reset()
    pipeline = InterventionPipeline(UncertaintyPolicy(), GroundTruth("labels"), GROUPED, **_for_three(select))
    compiled = torch.compile(pipeline, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = pipeline(data(4))
    torch.manual_seed(0)
    got = compiled(data(4))
    for key in ["concepts", *ENTRIES]:
        assert torch.equal(got[key].nan_to_num(9.0), expected[key].nan_to_num(9.0))


@pytest.mark.parametrize("select", SELECTIONS)
def test_it_maps(select):
    pipeline = InterventionPipeline(UncertaintyPolicy(), GroundTruth("labels"), GROUPED, **_for_three(select))
    td = data(4)

    def row(concepts, labels, may):
        return pipeline(TensorDict({"concepts": concepts, "labels": labels, "may": may}))["concepts"]

    got = torch.vmap(row, randomness="different")(td["concepts"], td["labels"], td["may"])
    assert got.shape == (4, 5)
    if "probability" not in select:
        torch.testing.assert_close(got, pipeline(td)["concepts"])


def _for_three(select):
    """The selection for three concepts."""
    more = {"cost": [1, 2, 0.5]} if "cost" in select else {"among": [0, 2]} if "among" in select else {}
    return select | more


def test_copies_and_pickles():
    pipeline = InterventionPipeline(learned(), GroundTruth("labels"), k=2)
    expected = pipeline(data(4))["concepts"]
    for other in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(other(data(4))["concepts"], expected)


def network():
    torch.manual_seed(0)
    return TensorDictSequential(
        Mod(nn.Linear(6, 4), ["x"], ["concepts"]), Mod(nn.Bilinear(4, 6, 3), ["concepts", "x"], ["logits"])
    )


def test_randint_corrects_while_training_only_each_concept_with_its_probability():
    chances = [0.0, 0.25, 0.5, 1.0]
    model = network()
    fixed = intervene(model, strategy=GroundTruth("labels"), probability=chances, only_training=True)
    td = TensorDict({"x": torch.randn(4000, 6), "labels": torch.ones(4000, 4)}, [4000])
    torch.manual_seed(0)
    mask = fixed(td.copy())["intervention", "mask"]
    assert (mask.float().mean(0) - torch.tensor(chances)).abs().max() < 0.025  # 3 standard errors of p = .5
    assert not torch.equal(mask, fixed(td.copy())["intervention", "mask"])
    assert not fixed.eval()(td.copy())["intervention", "mask"].any()
    assert torch.equal(fixed(td.copy())["logits"], model(td.copy())["logits"])
    g = [torch.Generator().manual_seed(5) for _ in range(2)]
    state = torch.get_rng_state()
    masks = [
        intervene(model, strategy=Do(0.0), probability=0.5, generator=one)(td.copy())["intervention", "mask"]
        for one in g
    ]
    assert torch.equal(*masks)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_in_one_go():
    concepts = torch.rand(3, 4, requires_grad=True)
    for through, expected in ((False, 0.0), (True, 1.0)):
        pipeline = InterventionPipeline(UniformPolicy(), Do(1.0), among=[0], straight_through=through)
        concepts.grad = None
        pipeline(TensorDict({"concepts": concepts}, [3]))["concepts"].sum().backward()
        assert concepts.grad.tolist() == [[expected, 1, 1, 1]] * 3


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: InterventionPipeline(UniformPolicy(), Do(0.0), franction=0.5), BadType, "'fraction'"),
        (lambda: InterventionPipeline(UniformPolicy(), Do(0.0), probability=0.5, sequential=True), BadValue, "order"),
        (lambda: InterventionPipeline(Target("y"), Do(0.0)), BadType, "no keys"),
        (lambda: InterventionPipeline(UniformPolicy(), UniformPolicy()), BadKey, "'value'"),
    ],
)
def test_bad_builds(build, error, text):
    with pytest.raises(error, match=text):
        build()


@pytest.mark.parametrize(
    ("strategy", "error", "text"),
    [
        (lambda c, td: torch.zeros(3, 3), BadValue, r"value \[3, 3\]"),
        (lambda c, td: "x", BadType, "str"),
        (GroundTruth("none"), BadKey, "labels are missing"),
    ],
)
def test_an_error_leaves_the_tensordict_alone(strategy, error, text):
    td = data(4)
    before = set(td.keys(True, True))
    with pytest.raises(error, match=text):
        InterventionPipeline(UncertaintyPolicy(), strategy, k=1)(td)
    assert set(td.keys(True, True)) == before


@pytest.mark.parametrize("grad", [False, True])
def test_where_all_are_replaced_a_score_of_another_shape_is_refused_too(grad):
    td = TensorDict({"concepts": torch.rand(4, 3, requires_grad=grad)}, [4])
    with pytest.raises(BadValue, match="differ in shape"):
        InterventionPipeline(lambda concepts, td: concepts[:, :2].detach(), Do(1.0))(td)


def test_an_error_of_a_policy_that_reads_the_value_leaves_the_tensordict_alone():
    td = data(4).exclude(("gradient", "concepts"))
    before = set(td.keys(True, True))
    with pytest.raises(BadKey, match="no gradients"):
        InterventionPipeline(ExpectedInfluencePolicy(change="value"), Do(1.0), k=1)(td)
    assert set(td.keys(True, True)) == before


@pytest.mark.parametrize("name", ["mask", "score"])
def test_where_all_are_replaced_one_may_ask_for_the_mask_or_the_score_alone(name):
    td = InterventionPipeline(UniformPolicy(), Do(1.0)).select_out_keys(("intervention", name))(data(4))
    assert (td["intervention", name] == (name == "mask")).all()


def test_gradients_in_one_go_are_those_of_the_stages():
    """None comes back through what a function computes; what is kept beside the result has its graph."""
    found = []
    for run in (lambda pipeline, td: pipeline(td), one_by_one):
        concepts = torch.rand(3, 4, requires_grad=True)
        pipeline = InterventionPipeline(UniformPolicy(), lambda c, td: c.square(), among=[0])
        td = run(pipeline, TensorDict({"concepts": concepts}, [3]))
        found.append([td["intervention", name].requires_grad for name in ("value", "score", "before")])
        td["concepts"].sum().backward()
        assert concepts.grad.tolist() == [[0, 1, 1, 1]] * 3
    assert found == [[False, False, True]] * 2


def test_a_hook_before_a_stage_and_a_subclass_with_a_way_of_its_own_are_called():
    calls = []
    pipeline = InterventionPipeline(UncertaintyPolicy(), Do(1.0), k=1)
    with pipeline["select"].register_forward_pre_hook(lambda m, args: calls.append("before")):
        pipeline(data(4))
    assert calls == ["before"]

    class Twice(Do):
        def forward(self, tensordict):
            tensordict = super().forward(tensordict)
            return tensordict.set(ENTRIES[0], 2 * tensordict[ENTRIES[0]])

    assert InterventionPipeline(UniformPolicy(), Twice(3.0))(data(4))["concepts"].unique().tolist() == [6]


def test_what_a_module_does_not_know_keeps_its_prediction():
    strategy = Mod(nn.Identity(), ["labels"], [ENTRIES[0]])
    td, expected = data(6), InterventionPipeline(UniformPolicy(), GroundTruth("labels"))(data(6))
    InterventionPipeline(UniformPolicy(), strategy)(td)
    assert torch.equal(td["concepts"], expected["concepts"])
    assert torch.equal(td["intervention", "mask"], expected["intervention", "mask"])


def test_a_locked_tensordict_is_refused_before_anything_is_written():
    for pipeline in (
        InterventionPipeline(UniformPolicy(), Do(1.0)),
        InterventionPipeline(UncertaintyPolicy(), Do(1.0)),
    ):
        with pytest.raises(BadValue, match="locked"):
            pipeline(data(4).lock_())


def test_a_subclass_is_what_it_computes():
    """What its parent says of its own formula does not hold for another one."""

    class Flipped(GroundTruth):
        def compute(self, concepts, tensordict):
            return 1 - super().compute(concepts, tensordict)

    class Undecided(UniformPolicy):
        def compute(self, concepts, tensordict):
            return -concepts

    class Sometimes(Do):
        def compute(self, concepts, tensordict):
            return torch.where(concepts > 0.5, torch.nan, super().compute(concepts, tensordict))

    td = TensorDict({"concepts": torch.tensor([[0.9, 0.1], [0.1, 0.9]]), "labels": torch.ones(2, 2)}, [2])
    for hooked in (False, True):
        flipped = InterventionPipeline(UniformPolicy(), Flipped("labels"))
        undecided = InterventionPipeline(Undecided(), Do(0.0), k=1)
        sometimes = InterventionPipeline(UniformPolicy(), Sometimes(0.0))
        for pipeline in (flipped, undecided, sometimes) if hooked else ():
            pipeline["select"].register_forward_hook(lambda m, args, out: None)
        assert (flipped(td.copy())["concepts"] == 0).all()
        assert undecided(td.copy())["intervention", "mask"].tolist() == [[False, True], [True, False]]
        assert sometimes(td.copy())["intervention", "mask"].tolist() == [[False, True], [True, False]]


def test_a_function_that_scores_by_the_value():
    """The strategy runs first: its value is there, also where another one is from an earlier run."""
    pipeline = InterventionPipeline(
        lambda concepts, td: (td["intervention", "value"] - concepts).abs(), GroundTruth("labels"), k=1
    )
    td = TensorDict({"concepts": torch.tensor([0.6, 0.1]), "labels": torch.tensor([0.0, 0.0])})
    assert pipeline(td)["intervention", "mask"].tolist() == [True, False]
    td["labels"] = torch.tensor([0.0, 1.0])
    assert pipeline(td)["intervention", "mask"].tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_concepts_without_a_nan(dtype):
    td = TensorDict({"concepts": torch.tensor([0, 1, 1]).to(dtype), "labels": torch.tensor([1.0, torch.nan, 0.0])})
    for strategy in (GroundTruth("labels"), Do([1.0, torch.nan, 0.0])):
        for pipeline in (InterventionPipeline(UniformPolicy(), strategy), staged(UniformPolicy(), strategy)):
            out = pipeline(td.copy())
            assert out["concepts"].dtype is dtype
            assert out["concepts"].tolist() == [1, 1, 0]
            assert out["intervention", "mask"].tolist() == [True, False, True]
    for strategy in (Do(0.5), lambda concepts, td: torch.full(concepts.shape, 0.5)):
        with pytest.raises(BadValue, match=r"(?s)the value does not fit.*0.5 for 'concepts'"):
            InterventionPipeline(UniformPolicy(), strategy)(td.copy())


def staged(*args, **kwargs):
    """The same pipeline, run stage by stage."""
    pipeline = InterventionPipeline(*args, **kwargs)
    pipeline["select"].register_forward_hook(lambda m, args, out: None)
    return pipeline


def test_a_strategy_that_may_miss_can_be_put_in_later():
    pipeline = staged(UniformPolicy(), Do(1.0), k=1)
    pipeline.module["value"] = GroundTruth("labels").bind(Splice())
    td = pipeline(TensorDict({"concepts": torch.tensor([0.2, 0.3]), "labels": torch.tensor([torch.nan, 1.0])}))
    assert td["concepts"].tolist() == pytest.approx([0.2, 1.0])
    assert td["intervention", "mask"].tolist() == [False, True]


def test_a_forward_of_one_stage_and_hooks_of_one_pipeline():
    policy, calls = UncertaintyPolicy(), []
    first, second = (InterventionPipeline(policy, Do(0.0), k=1) for _ in range(2))
    first["score"].register_forward_hook(lambda m, args, out: calls.append("hook"))
    second(data(2))
    assert calls == []
    first(data(2))
    assert calls == ["hook"]
    before = second["value"].forward
    second["value"].forward = lambda td: calls.append("own") or before(td)
    second(data(2))
    assert calls == ["hook", "own"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own
@pytest.mark.parametrize("policy", [UniformPolicy(), UncertaintyPolicy()])
def test_the_derivatives_of_torch_func(policy):
    pipeline = InterventionPipeline(policy, GroundTruth("labels"), k=3)
    td = data(1)[0]

    def total(concepts):
        return pipeline(td.copy().set("concepts", concepts))["concepts"].square().sum()

    mask = pipeline(td.copy())["intervention", "mask"]
    expected = torch.where(mask, 0, 2 * td["concepts"])
    assert torch.equal(torch.func.grad(total)(td["concepts"]), expected)
    assert torch.equal(torch.func.jacfwd(total)(td["concepts"]), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_scores_that_are_no_floats(dtype):
    spec = ConceptSpec(["a", "b", "c"], cardinalities=[1, 3, 1])
    score = torch.tensor([0, 0, 0, 0, 1]).to(dtype)
    splice = Splice.described("concepts", spec)
    pipeline = InterventionPipeline(lambda concepts, td: score.expand(concepts.shape), Do(1.0), splice, k=1)
    td = TensorDict({"concepts": torch.zeros(2, 5)}, [2])
    assert pipeline(td)["intervention", "mask"].tolist() == [[False] * 4 + [True]] * 2
