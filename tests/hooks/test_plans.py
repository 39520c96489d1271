"""Plans and runs: steps by module, counted calls, what was never reached, and the early stop."""

import pytest
import torch
from hooks.nets import mlp, pipeline, twice
from tensordict import TensorDict

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Site
from tdconcepts.hooks.plans import Bound, Plan, Run, Step, Stop, stopping
from tdconcepts.hooks.sites import places


def place(net, text):
    return places(net, Site.parse(text))[0]


def step(net, text, act=lambda value, run: value, every=False):
    return Step(place(net, text), act, every)


def test_steps_are_grouped_by_module_and_side_in_their_order():
    net = mlp()
    steps = [step(net, text) for text in ("1", "0:in", "1[0]", "0", "1:in")]
    plan = Plan(net, steps)
    assert plan.steps == tuple(steps)
    assert plan.outputs == {net.module[1]: (steps[0], steps[2]), net.module[0]: (steps[3],)}
    assert plan.inputs == {net.module[0]: (steps[1],), net.module[1]: (steps[4],)}
    assert plan.names == {"1", "0:in", "1[0]", "0", "1:in"}
    held = list(plan.modules())
    assert len(held) == len(set(held)), "each side of a module once"
    assert {(net, "input"), (net, "output"), (net.module[0], "input"), (net.module[1], "output")} <= set(held)


@pytest.mark.parametrize("text", [".", ".:in"])
def test_the_root_is_held_once(text):
    net = mlp()
    held = list(Plan(net, [step(net, text)]).modules())
    assert sorted(side for module, side in held if module is net) == ["input", "output"]


def test_an_empty_plan_holds_nothing():
    assert list(Plan(mlp(), ()).modules()) == []
    assert Bound() == Bound()


def test_deaf_modules_are_those_inside_a_compiled_one():
    net = mlp()
    assert Plan(net, ()).deaf() == set()
    net.module.compile(backend="eager")
    assert Plan(net, ()).deaf() == set(net.module.modules())
    plan = Plan(pipeline(), ())
    plan.root[1].compile(backend="eager")
    assert plan.deaf() == set(plan.root[1].modules()), "looked up when it is entered, not when it is bound"


# ---------------------------------------------------------------------------------------------------- runs


def fired(net, text, calls, every=False, standing=False):
    seen = []

    def act(value, run):
        seen.append(value.item())
        return value + 100

    plan = Plan(net, [step(net, text, act, every)])
    run = Run(plan, standing=standing)
    run.active = True
    steps = plan.outputs[place(net, text).module]
    out = [run.fire(steps, torch.tensor(float(i))).item() for i in range(calls)]
    return run, seen, out


@pytest.mark.parametrize(
    ("text", "calls", "seen"),
    [
        ("layer@0", 3, [0]),
        ("layer@1", 3, [1]),
        ("layer@-1", 3, [0, 1, 2]),
        ("layer@all", 3, [0, 1, 2]),
        ("layer", 1, [0]),
    ],
)
def test_which_calls_are_acted_on(text, calls, seen):
    run, found, out = fired(twice(), text, calls)
    assert found == seen
    assert out == [i + 100 if i in seen else i for i in range(calls)]
    run.check_reached()


def test_an_edit_acts_at_each_call_and_a_reading_must_say_which():
    assert fired(twice(), "layer", 3, every=True)[1] == [0, 1, 2]
    with pytest.raises(BadValue, match="'layer' runs several times in one forward") as error:
        fired(twice(), "layer", 2)
    assert "Site('layer', call=0)" in str(error.value)


@pytest.mark.parametrize(
    ("text", "calls"), [("layer", 0), ("layer@0", 0), ("layer@all", 0), ("layer@2", 2), ("layer@-3", 2)]
)
def test_what_was_not_reached(text, calls):
    run = fired(twice(), text, calls)[0]
    with pytest.raises(BadValue, match="never ran" if not calls else "ran 2 times only") as error:
        run.check_reached()
    assert repr(text) in str(error.value)


def test_a_standing_run_edits_and_does_not_read():
    assert fired(twice(), "layer", 2, standing=True)[1] == []
    assert fired(twice(), "layer", 2, every=True, standing=True)[1] == [0, 1]


def test_a_standing_run_starts_anew_at_each_call_of_the_model():
    net = twice()
    run = fired(net, "layer@0", 2, every=True, standing=True)[0]
    td = TensorDict(x=torch.ones(3, 3), batch_size=[3])
    run.begin((td,), {})
    assert run.td is td
    assert run.calls == {}
    run.end()
    assert run.td is None
    run.begin((), {"x": td["x"]})
    assert run.td is None
    run.check_standing()
    run.end()
    with pytest.raises(BadValue, match="counts calls, but the model itself is not called"):
        run.fire(run.plan.outputs[net.module.layer], td["x"])


def test_a_standing_run_that_was_called_must_have_reached_its_edits():
    net = mlp()
    for every in (False, True):
        run = Run(Plan(net, [step(net, "0", every=every)]), standing=True)
        run.check_standing()
        run.begin((), {})
        if every:
            with pytest.raises(BadValue, match="the site '0' never ran"):
                run.check_standing()
        else:
            run.check_standing()


def test_a_stage_tells_a_standing_run_its_tensordict():
    net, seen = pipeline(), []
    run = Run(Plan(net, [step(net, "1", lambda value, run: seen.append(run.td) or value, True)]), standing=True)
    td = TensorDict(h=torch.ones(2, 3), z=torch.ones(2, 3), batch_size=[2])
    run.fire(run.plan.outputs[net[1]], td)
    assert seen[0] is td


def test_edits_that_direct_calls_cannot_obey():
    net = mlp()
    run = Run(Plan(net, (), only_through=("x",)), standing=True)
    with pytest.raises(BadValue, match="can't be obeyed by direct calls of the model: \\['x'\\]"):
        run.begin((), {})
    with pytest.raises(BadValue, match="can't be obeyed"):
        run.anew(Run(Plan(net, ())))
    assert run.anew(Run(Plan(mlp(), ()))).standing, "another model is none of its business"


# ---------------------------------------------------------------------------------------------------- early stop


def test_the_forward_stops_when_each_place_has_been_reached():
    net, seen = mlp(), []
    texts = ("0", "1", "0:in")
    steps = stopping([step(net, t, lambda value, run, t=t: seen.append(t) or value) for t in texts])
    plan = Plan(net, steps)
    run = Run(plan)
    x = torch.ones(1)
    run.fire(plan.inputs[net.module[0]], ((x,), {}))
    run.fire(plan.outputs[net.module[0]], x)
    with pytest.raises(Stop):
        run.fire(plan.outputs[net.module[1]], x)
    assert seen == ["0:in", "0", "1"]


def test_a_stop_is_no_exception_that_a_model_could_swallow():
    assert not issubclass(Stop, Exception)
    assert issubclass(Stop, BaseException)
