"""A compiled stage: equal to the stage itself, and whatever a graph has baked in is noticed when it changes."""

import copy
import pickle
import shutil
import types

import pytest
import torch
from hooks.nets import batch, mlp, pipeline
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, set_skip_existing
from torch import nn

from tdconcepts.attribution import Gradient, IntegratedGradients
from tdconcepts.concepts import ConceptBottleneck
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments import Sweep, every
from tdconcepts.hooks import Ablate, Compiled, Patch, Scale, Site, Target, anchor, capture, compiling, patch
from tdconcepts.interventions import GroundTruth, InterventionPipeline, UncertaintyPolicy
from tdconcepts.lrp import LRP, EpsilonPlus, EpsilonPlusFlat, FlatRule, FoldedBatchNorm
from tdconcepts.rl.agents import cartpole_policy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it compiles


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_eager(stage, **options):
    return Compiled(stage, backend="eager", **options)


def same(compiled, td=None, tolerance=1e-6):
    """One call of both; how many graphs it took."""
    td, before = batch() if td is None else td, compiled.compilations
    expected, made = compiled.stage(td.copy()), compiled(td.copy())  # the stage first: it may keep something for later
    for key in compiled.out_keys:
        torch.testing.assert_close(made[key], expected[key], atol=tolerance, rtol=tolerance)
    assert set(made.keys(True, True)) == set(expected.keys(True, True))
    return compiled.compilations - before


# ---------------------------------------------------------------------------------------------- equal to eager


def pipeline_of_interventions():
    return InterventionPipeline(UncertaintyPolicy(), GroundTruth("labels"), fraction=0.5)


STAGES = {
    "LRP": lambda: LRP(mlp(act=nn.ReLU()), EpsilonPlusFlat(), Target("y", "argmax")),
    "LRP in stages, with outputs": lambda: LRP(pipeline(), EpsilonPlus(), Target("y", 0), ["x"], outputs=True),
    "an explainer of several targets": lambda: Gradient(pipeline(), Target("y", [0, 1]), "x"),
    "interventions": pipeline_of_interventions,
    "concepts": lambda: ConceptBottleneck(nn.Linear(4, 3), nn.Linear(3, 2), 3, in_keys=["x"]),
    "a policy": lambda: cartpole_policy(8),
}


def entries(*shape):
    td = batch(*shape)
    td.update({"observation": td["x"], "concepts": td["x"].sigmoid(), "labels": (td["x"] > 0).float()})
    return td


@pytest.mark.parametrize("name", STAGES)
def test_it_equals_the_stage(name):
    torch.manual_seed(0)
    compiled = by_eager(STAGES[name]())
    assert compiled.in_keys == compiled.stage.in_keys
    assert compiled.out_keys == compiled.stage.out_keys
    assert same(compiled, entries(5)) == 1
    assert same(compiled, entries(5)) == 0


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_by_default_the_inductor_compiles():
    compiled = Compiled(STAGES["LRP"]())
    with torch._inductor.config.patch(compile_threads=1):
        assert same(compiled) == 1
        assert same(compiled) == 0
    with torch.no_grad():
        compiled.stage.module.module[0].weight.mul_(2)  # as an optimiser's step
    assert same(compiled) == 0


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_masks_leave_a_graph_of_the_inductor_as_bytes_and_come_as_masks():
    compiled = Compiled(InterventionPipeline(UncertaintyPolicy(), GroundTruth("labels"), fraction=0.5))
    td = TensorDict({"concepts": torch.rand(5, 12), "labels": torch.rand(5, 12).round()}, [5])
    td["labels"][0, :8] = torch.nan
    with torch._inductor.config.patch(compile_threads=1):
        made = compiled(td.copy())
        assert compiled(td["concepts"], td["labels"])[2].dtype is torch.bool
    expected = compiled.stage(td.copy())
    for key in compiled.out_keys:
        assert made[key].dtype is expected[key].dtype
        torch.testing.assert_close(made[key], expected[key], equal_nan=True, rtol=0, atol=0)


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
        nn.init.normal_(self.body[1].running_mean)

    def forward(self, x):
        return self.body(x.unsqueeze(-3))


def test_folded_batch_norms():
    torch.manual_seed(0)
    net = TensorDictModule(Squares().eval(), ["x"], ["y"])
    compiled = by_eager(LRP(net, EpsilonPlusFlat() | FoldedBatchNorm(), Target("y", 0)))
    td = TensorDict(x=torch.randn(4, 5, 5), batch_size=[4])
    with pytest.raises(BadValue, match=r"anchor\(model, \.\.\.\) first"):
        compiled(td)
    with anchor(net, "body.*"):
        assert same(compiled, td) == 1
        assert same(compiled, td) == 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_refused_as_torch_does(kind):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = kind(4, 2, batch_first=True)

        def forward(self, x):
            return self.body(x)[0][:, -1]

    compiled = by_eager(LRP(TensorDictModule(Last(), ["x"], ["y"]), EpsilonPlus(), Target("y", 0)))
    with pytest.raises(BadValue, match="Attempted to wrap RNN, GRU, or LSTM"):
        compiled(TensorDict(x=torch.randn(5, 3, 4), batch_size=[5]))


def test_a_terminal_rule_in_the_middle_is_refused():
    net = mlp()
    explain = LRP(net, EpsilonPlus() | {"2": FlatRule()}, Target("y", 0))
    with anchor(net, "*"):
        compiled = by_eager(explain)
        for td in (batch(), batch(), batch(2, 3)):
            with pytest.raises(BadValue, match="middle of the model"):
                compiled(td)


def test_a_sweep_is_refused():
    sweep = Sweep(mlp(), every(Site("1"), Ablate()))
    with pytest.raises(BadValue, match="can't take Sweep as one graph"):
        by_eager(sweep)(batch())


def test_a_stage_that_trains():
    stage = TensorDictModule(nn.Linear(4, 3), ["x"], ["h"])
    compiled = Compiled(stage, backend="aot_eager")
    x = torch.randn(5, 4, requires_grad=True)
    for _ in range(2):
        loss = compiled(TensorDict(x=x, batch_size=[5]))["h"].square().sum()
        found = torch.autograd.grad(loss, [x, *stage.parameters()])
        expected = torch.autograd.grad(
            stage(TensorDict(x=x, batch_size=[5]))["h"].square().sum(), [x, *stage.parameters()]
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        with torch.no_grad():
            stage.module.weight.sub_(0.1)
    assert compiled.compilations == 1


# ---------------------------------------------------------------------------------------------- what is noticed


def swap_layers(net):
    net.module[0], net.module[1] = nn.Linear(4, 3), nn.Sigmoid()


CHANGES = {
    "train()": lambda net: net.train(),
    "requires_grad_()": lambda net: net.requires_grad_(False),
    "a parameter of another dtype": lambda net: net.double(),
    "another layer": lambda net: setattr(net.module, "1", nn.Sigmoid()),
    "other layers": swap_layers,
    "a layer more": lambda net: net.module.append(nn.Tanh()),
    "an attribute": lambda net: setattr(net.module[3], "p", 0.0),
    "a method of an instance": lambda net: setattr(net.module[1], "forward", torch.sin),
    "a hook": lambda net: net.module[0].register_forward_hook(lambda m, args, out: 2 * out),
    "a hook before": lambda net: net.module[1].register_forward_pre_hook(lambda m, args: (2 * args[0],)),
}


def net_with_dropout():
    net = mlp()
    net.module.append(nn.Dropout(1.0))  # with p=1 training is no chance
    return net.eval()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_model_is_noticed(name):
    net = net_with_dropout()
    compiled = by_eager(TensorDictSequential(net))
    same(compiled)
    CHANGES[name](net)
    td = batch().double() if "dtype" in name else batch()
    assert same(compiled, td) == 1
    assert same(compiled, td) == 0


def test_new_values_are_just_used():
    net = mlp()
    compiled = by_eager(Gradient(net, Target("y", 0)))
    same(compiled)
    net.module[0].weight.data.mul_(2)
    assert same(compiled) == 0
    net.module[0].weight = nn.Parameter(torch.randn(3, 4))
    net.module[2].load_state_dict(nn.Linear(3, 2).state_dict())
    assert same(compiled) == 0


def test_hooks_are_noticed_each():
    net = mlp()
    compiled = by_eager(TensorDictSequential(net))
    same(compiled)
    first = net.module[0].register_forward_hook(lambda m, args, out: 2 * out)
    same(compiled)
    first.remove()
    assert same(compiled) == 0  # that graph is still there
    second = net.module[0].register_forward_hook(lambda m, args, out: 3 * out)
    assert same(compiled) == 1
    second.remove()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda m, *_: _[1] + 1 if isinstance(m, nn.Tanh) else None
    )
    try:
        assert same(compiled) == 1
    finally:
        everywhere.remove()
    assert same(compiled) == 0


def test_hooks_of_modules_that_are_no_children_are_noticed():
    inner = nn.Tanh()

    class Hides(TensorDictModuleBase):
        in_keys, out_keys = ["x"], ["y"]

        def __init__(self):
            super().__init__()
            self.hidden = (inner,)

        def forward(self, tensordict):
            return tensordict.set("y", self.hidden[0](tensordict.get("x")))

    compiled = by_eager(Hides())
    same(compiled)
    inner.register_forward_hook(lambda m, args, out: 2 * out)
    assert same(compiled) == 1


def test_contexts_around_are_noticed(monkeypatch):
    monkeypatch.setattr(compiling, "_KEPT", 2)
    net = mlp()
    compiled = by_eager(TensorDictSequential(net))
    plain = compiled(batch())["y"]
    edit = patch(net, {Site("0"): Scale(2.0)})
    for _ in range(2):
        with edit:
            assert same(compiled) == 1
            assert not torch.allclose(compiled(batch())["y"], plain)
        assert same(compiled) == 0
    for patched in range(2):
        with patch(net, {Site("0"): Scale(patched)}):
            assert same(compiled) == 1
    assert len(compiled._graphs) == 2
    assert same(compiled) == 1  # the first graph was not used for longest
    explain = by_eager(Gradient(net, Target("y", 0)))
    same(explain)
    with EpsilonPlus().on(net):
        assert same(explain) == 1


def test_contexts_at_anchors_do_not_use_up_the_limit():
    net = mlp()
    compiled = by_eager(TensorDictSequential(net), recompile_limit=2)
    with anchor(net, "0"):
        for scale in (2.0, 3.0, 4.0):
            with patch(net, {Site("0"): Scale(scale)}):
                assert same(compiled) == 1


def test_settings_of_a_stage_are_noticed():
    factors = [2.0]
    compiled = by_eager(TensorDictModule(lambda x: factors[0] * x, ["x"], ["y"]))
    same(compiled)
    factors[0] = 3.0
    assert same(compiled) == 1


def test_what_a_users_function_knows_is_noticed():
    factor = types.SimpleNamespace(value=2.0)

    class Times(nn.Module):
        def forward(self, x):
            return factor.value * GLOBAL["factor"] * x

    compiled = by_eager(TensorDictModule(Times(), ["x"], ["y"]))
    same(compiled)
    assert same(compiled) == 0
    factor.value = 3.0
    assert same(compiled) == 1
    GLOBAL["factor"] = 5.0
    try:
        assert same(compiled) == 1
    finally:
        GLOBAL["factor"] = 1.0


GLOBAL = {"factor": 1.0}


def test_modes_are_noticed():
    compiled = by_eager(pipeline())
    td = batch().requires_grad_()
    assert same(compiled, td) == 1
    with torch.no_grad():
        assert same(compiled, td) == 1
        assert not compiled(td.copy())["y"].requires_grad
    with torch.inference_mode():
        same(compiled, td)
        own = batch()
    assert compiled(td.copy())["y"].requires_grad
    torch.testing.assert_close(compiled(own)["y"], compiled.stage(batch())["y"])
    ones = by_eager(TensorDictModule(lambda x: x + torch.ones(3, 4), ["x"], ["y"]))
    td = batch(3).to(torch.float32)
    assert same(ones, td) == 1
    torch.set_default_dtype(torch.float64)
    try:
        assert same(ones, td) == 1
        assert ones(td)["y"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_kinds_of_interaction_are_noticed():
    nn_, params = pytest.importorskip("tensordict.nn"), nn.Linear(4, 2)
    net = TensorDictModule(lambda x: (params(x), torch.full_like(params(x), 1e-3)), ["x"], ["loc", "scale"])
    normal = torch.distributions.Normal
    last = nn_.ProbabilisticTensorDictModule(["loc", "scale"], ["y"], distribution_class=normal)
    compiled = by_eager(nn_.ProbabilisticTensorDictSequential(net, last))
    with nn_.set_interaction_type(nn_.InteractionType.DETERMINISTIC):
        found = compiled(batch())
        assert torch.equal(found["y"], found["loc"])
    with nn_.set_interaction_type(nn_.InteractionType.RANDOM):
        found = compiled(batch())
        assert not torch.equal(found["y"], found["loc"])


def in_training(net):
    net.train()
    return batch()


def without_grad(net):
    net.requires_grad_(False)
    return batch()


def another_layer(net):
    net.module[1] = nn.Sigmoid()
    return batch()


LAWS = {"CONSTANT_MATCH": in_training, "TYPE_MATCH": another_layer, "TENSOR_MATCH": lambda net: batch(7)}


@pytest.mark.parametrize("kind", LAWS)
def test_the_guards_that_are_kept_are_needed(kind, monkeypatch):
    """Without these the laws above would not hold."""
    needed = compiling._needed
    less = lambda found: [k and e.guard_type != kind for k, e in zip(needed(found), found, strict=True)]  # noqa: E731
    monkeypatch.setattr(compiling, "_needed", less)
    net = net_with_dropout()
    compiled = by_eager(TensorDictSequential(net))
    same(compiled)
    td = LAWS[kind](net)
    before = compiled.compilations
    try:
        wrong = not torch.equal(compiled(td.copy())["y"], compiled.stage(td.copy())["y"])
    except RuntimeError:
        wrong = True
    assert wrong or compiled.compilations == before


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("G['__import_tensordict_dot_utils']._lazy_legacy", None, False),
        ("G['__import_tensordict_dot_nn_dot_utils']._skip_existing._mode", True, False),
        ("G['__import_tdconcepts_dot_hooks_dot_contexts']._ACTIVE.runs", (), False),
        ("G['__import_tdconcepts_dot_hooks_dot_batching']._COPIES", 7, True),
        ("G['__import_tensordict_dot_utils']._MEMO[list(dict.keys(G['x']._MEMO))[4]]", True, True),
        ("G['__import_torch_dot_func'].vjp.__kwdefaults__['has_aux']", False, True),
        ("G['__import_my_dot_model'].scale", 2.0, False),
        ("G['__import_my_dot_model'].act.__defaults__[0]", 2.0, False),
        ("G['__import_my_dot_model'].Net", Squares, False),
        ("G['__import_torch'].nn", torch.nn, True),
        ("stage.module.forward.__closure__[0].cell_contents", 2.0, False),
        ("dict(type(stage).__dict__)['forward'].__closure__[0].cell_contents", 2.0, True),
        ("dict(type(stage.mine).__dict__)['forward'].__closure__[0].cell_contents", 2.0, False),
        ("stage.module.training", True, False),
        ("", None, False),
    ],
)
def test_what_is_code(name, value, code):
    entry = types.SimpleNamespace(name=name, value=value, guard_type="CONSTANT_MATCH")
    assert compiling._is_code(entry, {"stage": nn.Linear(1, 1), "stage.mine": Squares()}) is code


def test_most_guards_are_left_out():
    counts = []
    compiled = by_eager(LRP(mlp(), EpsilonPlusFlat(), Target("y", 0)))
    filtered = compiled._filter
    compiled._filter = lambda found: counts.append((len(found), sum(kept := filtered(found)))) or kept
    compiled(batch())
    ((met, kept),) = counts
    assert kept < 0.45 * met


# ---------------------------------------------------------------------------------------------- shapes and entries


def test_batches_of_any_size_and_number_of_dims():
    compiled = by_eager(Gradient(mlp(), Target("y", 0)))
    for size in (5, 3, 7, 2, 11, 4):
        same(compiled, batch(size))
    assert compiled.compilations == 2  # the second leaves the size open
    for shape in ((), (2, 3), (0,), (1,)):
        same(compiled, TensorDict(x=torch.randn(*shape, 4), batch_size=shape))


def test_a_limit_of_graphs():
    compiled = by_eager(pipeline(), dynamic=False, recompile_limit=2)
    same(compiled, batch(2))
    same(compiled, batch(3))
    with pytest.raises(BadValue, match="compiled anew too often"):
        compiled(batch(4))
    compiled.reset()
    assert same(compiled, batch(4)) == 1


def test_entries_that_are_optional():
    explain = IntegratedGradients(mlp(), Target("y", 0), n_steps=3)
    compiled = by_eager(explain)
    assert ("baseline", "x") in compiled.optional_keys
    td = batch()
    assert same(compiled, td) == 1
    td.set(("baseline", "x"), torch.ones(5, 4))
    assert same(compiled, td) == 1
    assert same(compiled, batch()) == 0


def test_float64_and_nested_keys():
    net = TensorDictModule(mlp().module.double(), [("agents", "x")], [("agents", "y")])
    compiled = by_eager(Gradient(net, Target(("agents", "y"), 0)))
    td = TensorDict({"agents": {"x": torch.randn(5, 4, dtype=torch.float64)}}, batch_size=[5])
    same(compiled, td, 1e-12)
    assert compiled(td)["attribution", "agents", "x"].dtype == torch.float64
    torch.testing.assert_close(compiled(agents_x=td["agents", "x"]), td["attribution", "agents", "x"])


def test_it_is_called_as_the_stage_is():
    compiled = by_eager(pipeline())
    x = torch.randn(5, 4)
    for mine, theirs in zip(compiled(x), compiled.stage(x), strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(compiled(x=x[0]), compiled.stage(x[0]), strict=True):  # one row, by name
        torch.testing.assert_close(mine, theirs)
    made = compiled.compilations
    td = batch()
    assert compiled(td) is td
    assert compiled.compilations == made  # tensors and entries share their graphs
    assert compiled(tensordict=td) is td
    compiled.select_out_keys("y")
    assert set(compiled(batch()).keys()) == {"x", "y"}
    torch.testing.assert_close(compiled(x), compiled.stage(x)[list(compiled.stage.out_keys).index("y")])
    compiled.reset_out_keys()
    assert "h" in TensorDictSequential(compiled)(batch())
    locked = batch().lock_()
    with pytest.raises(BadValue, match="locked"):
        compiled(locked)


def test_settings_are_constants():
    class Times(TensorDictModuleBase):
        in_keys, out_keys = ["x"], ["y"]

        def forward(self, tensordict, by=1):
            return tensordict.set("y", by * tensordict.get("x"))

    compiled = by_eager(Times())
    assert compiled(batch(), by=2.0)["y"].equal(2 * batch()["x"])
    assert compiled(batch(), by=3.0)["y"].equal(3 * batch()["x"])
    with pytest.raises(BadType, match="by= can't be one"):
        compiled(batch(), by=torch.ones(5))


def test_what_exists_is_skipped():
    compiled = by_eager(pipeline())
    given = batch().set("h", torch.ones(5, 3))
    with set_skip_existing(True):
        made, expected = compiled(given.copy()), compiled.stage(given.copy())
    assert made["h"].equal(given["h"])
    assert made["y"].equal(expected["y"])
    assert not compiled(given.copy())["h"].equal(given["h"])


def test_copies_have_no_graphs():
    compiled = by_eager(TensorDictSequential(mlp()))
    same(compiled)
    for made in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert not made._graphs
        assert same(made) == 1
        made.stage.module[0].module[0].register_forward_hook(lambda m, args, out: 2 * out)
        assert same(made) == 1
    assert same(compiled) == 0
    assert set(compiled.state_dict()) == {f"stage.{key}" for key in compiled.stage.state_dict()}
    compiled.load_state_dict(compiled.state_dict())
    assert same(compiled) == 0


def test_inside_another_compiler_and_under_transforms_it_is_the_stage():
    compiled = by_eager(pipeline())
    x = torch.randn(5, 4)
    outer = torch.compile(TensorDictSequential(compiled), backend="eager", fullgraph=True)
    expected = compiled.stage(batch())
    torch.testing.assert_close(outer(batch())["y"], expected["y"])
    found = torch.vmap(lambda row: compiled(TensorDict(x=row))["y"])(x)
    torch.testing.assert_close(found, compiled.stage(TensorDict(x=x, batch_size=[5]))["y"])
    assert compiled.compilations == 0


def test_what_is_inside_can_be_hooked_before():
    compiled = by_eager(mlp())
    for hooked in (
        lambda: capture(compiled, "**")(batch()),
        lambda: Patch({Site("stage.0"): Scale(2.0)}).on(compiled)(batch()),
    ):
        with pytest.raises(BadValue, match="compiled before the hooks came"):
            hooked()
    inside = by_eager(Gradient(net := mlp(), Target("y", 0), ["x", Site("0")]))
    with pytest.raises(BadValue, match="anchor"):
        inside(batch())
    with anchor(net, "0"):
        assert same(inside) == 1
        assert same(inside) == 0


# ---------------------------------------------------------------------------------------------- agents


@pytest.mark.parametrize("explained", [False, True])
def test_in_a_rollout_and_in_a_collector(explained):
    collectors, envs = pytest.importorskip("torchrl.collectors"), pytest.importorskip("torchrl.envs")
    torch.manual_seed(0)
    policy = cartpole_policy(8)
    stage = Gradient(policy, Target("logits", 0), "observation", outputs=True) if explained else policy
    compiled, rollouts = by_eager(stage), []
    for module in (compiled, stage):
        env = envs.GymEnv("CartPole-v1")
        env.set_seed(0)
        rollouts.append(env.rollout(6, module))
    for key in compiled.out_keys:
        torch.testing.assert_close(rollouts[0][key], rollouts[1][key])
    assert compiled.compilations == 1
    if explained:
        counts = {"frames_per_batch": 5, "total_frames": 5, "auto_register_policy_transforms": False}
        collector = collectors.Collector(lambda: envs.GymEnv("CartPole-v1"), compiled, **counts)
        (found,) = list(collector)
        collector.shutdown()
        assert found["attribution", "observation"].shape == (5, 4)


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input():
    compiled = by_eager(Gradient(mlp(), Target("y", 0)))
    with pytest.raises(BadType, match="bare Linear"):
        Compiled(nn.Linear(4, 2))
    with pytest.raises(BadType, match="no option 'mode'"):
        Compiled(mlp(), mode="max-autotune")
    with pytest.raises(BadType, match="no option 'backnd'"):
        Compiled(mlp(), backnd="eager")
    with pytest.raises(BadKey, match="no entry 'x'"):
        compiled(TensorDict(batch_size=[3]))
    with pytest.raises(BadType, match="'x' is no tensor"):
        compiled(TensorDict(x="a word"))
    with pytest.raises(BadType, match="a group of entries"):
        compiled(TensorDict(x={"y": torch.zeros(3)}, batch_size=[3]))
    with pytest.raises(BadType, match="not a TensorDict"):
        compiled({"x": torch.zeros(3, 4)})
    assert same(compiled) == 1
