"""The laws of the contract, each checked on every row of the conformance table."""

import copy
import functools
import importlib
import itertools
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import TABLE
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from world import STREAM, Fuse, N, Row, World

import tdconcepts
from tdconcepts import anchor
from tdconcepts.errors import TdConceptsError
from tdconcepts.hooks import Hooked
from tdconcepts.tunables import Tunable


def law(check: Callable[..., None]) -> Callable[..., None]:
    """One test for each row; ``exempt`` in a row, under the test's name, is a skip with its reason."""
    name = check.__name__.removeprefix("test_")
    marks = [pytest.mark.skip(reason=f"{r.name}: {r.exempt[name]}") if name in r.exempt else () for r in TABLE]
    rows = [pytest.param(r, marks=mark, id=r.name) for r, mark in zip(TABLE, marks, strict=True)]
    LAWS.append(name)
    return pytest.mark.parametrize("row", rows)(check)


LAWS: list[str] = []


# ---------------------------------------------------------------------------------------- what is looked at


def explained(row: Row, world: World | None = None, td: TensorDictBase | None = None) -> dict[Any, Tensor]:
    """What the row's module writes into ``td``."""
    world = World() if world is None else world
    td = world.td() if td is None else td
    with row.opened(world) as module:
        module(td)
        return written(module, td)


def written(module: TensorDictModuleBase, td: TensorDictBase) -> dict[Any, Tensor]:
    return {key: td.get(key) for key in module.out_keys}


def same(one: dict[Any, Tensor], other: dict[Any, Tensor], tolerance: float = 0.0) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        torch.testing.assert_close(
            value, other[key], rtol=tolerance, atol=tolerance, msg=lambda text, k=key: f"{k}: {text}"
        )


def snapshot(*roots: nn.Module) -> list[Any]:
    """All that must not change in a module; tensors as their bytes."""
    return [
        (
            name,
            module.training,
            {k: None if k.startswith("_") else v for k, v in vars(module).items() if not isinstance(v, Tensor)}.keys(),
            {k: list(hooks) for k, hooks in vars(module).items() if k.endswith("_hooks") and isinstance(hooks, dict)},
            [look(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())],
        )
        for root in roots
        for name, module in root.named_modules()
    ]


def look(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    flat = tensor.detach().reshape(-1).double().tolist()
    return id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad is None, tensor._version, flat


def leaves(td: TensorDictBase) -> dict[Any, Any]:
    """Every entry; the tensors themselves, not copies."""
    return {key: td.get(key) for key in td.keys(True, True)}


# ---------------------------------------------------------------------------------------- the entries


@law
def test_entries(row):
    """It writes exactly its ``out_keys``, leaves the rest identical, and returns the TensorDict that it was given."""
    world = World()
    td = world.td()
    before = leaves(td)
    with row.opened(world) as module:
        assert module(td) is td
    assert set(leaves(td)) == set(before) | {key if isinstance(key, str) else tuple(key) for key in module.out_keys}
    assert len(set(module.out_keys)) == len(module.out_keys)
    for key, value in before.items():
        if key not in module.out_keys:
            assert td.get(key) is value or key == "note", f"{key} was replaced"
    assert all(value.shape[: td.batch_dims] == td.batch_size for value in written(module, td).values())


@law
def test_in_keys(row):
    """Its ``in_keys`` are all that it reads."""
    world = World()
    with row.opened(World()) as module:
        optional = getattr(module, "optional_keys", [])
        td = world.td().select(*module.in_keys, *optional, strict=False)
        assert set(module.in_keys) <= set(leaves(td))
        same(written(module, module(td)), explained(row))


@law
def test_callers_tensors(row):
    """The caller's tensors don't change: neither their values, nor ``requires_grad``, nor ``grad``."""
    for differentiable in (False, True):
        world = World()
        td = world.td()
        given = {key: value for key, value in leaves(td).items() if isinstance(value, Tensor)}
        for value in given.values():
            value.requires_grad_(differentiable and value.is_floating_point())
        before = {key: look(value) for key, value in given.items()}
        with row.opened(world) as module:
            module(td)
        assert {key: look(value) for key, value in given.items()} == before


# ---------------------------------------------------------------------------------------- ways to call it


@law
def test_called_with_tensors(row):
    """Tensors in, tensors out: by position and by name."""
    check_call(row, ())


@law
def test_called_with_a_batch(row):
    """The first dim of tensors is the batch."""
    check_call(row, (N,))


def check_call(row: Row, batch: tuple[int, ...]) -> None:
    world = World()
    td = world.td(batch)
    with row.opened(world) as module:
        td = td.exclude(*getattr(module, "optional_keys", []))
        given = [td.get(key) for key in module.in_keys]
        names = ["_".join((key,) if isinstance(key, str) else key) for key in module.in_keys]
        expected = tuple(written(module, module(td)).values())
    for answer in (fresh(row)(*given), fresh(row)(**dict(zip(names, given, strict=True)))):
        torch.testing.assert_close(answer if isinstance(answer, tuple) else (answer,), expected)


def fresh(row: Row) -> Callable[..., Any]:
    """The row's module in a world of its own, so that a generator starts anew."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with row.opened(World()) as module:
            return module(*args, **kwargs)

    return call


@law
def test_sequential(row):
    """It is a stage like any other."""
    world = World()
    with row.opened(world) as module:
        pipeline = TensorDictSequential(TensorDictSequential(module))
        assert set(pipeline.in_keys) == set(module.in_keys)
        assert list(pipeline.out_keys) == list(module.out_keys)
        same(written(module, pipeline(world.td())), explained(row))


@law
def test_select_out_keys(row):
    """``select_out_keys`` leaves the others out, ``reset_out_keys`` brings them back."""
    world = World()
    with row.opened(world) as module:
        *others, last = list(module.out_keys)
        td = module.select_out_keys(last)(world.td())
        assert list(module.out_keys) == [last]
        same({last: td.get(last)}, {last: explained(row)[last]})
        assert [key for key in others if key in leaves(td) and key not in world.entries] == []
        module.reset_out_keys()
        assert list(module.out_keys) == [*others, last]


# ---------------------------------------------------------------------------------------- the model


@law
def test_model_kept(row):
    """The model is bit-identical afterwards."""
    world = World()
    before = snapshot(world.model)
    with row.opened(world) as module:
        inside = snapshot(module)
        module(world.td())
        assert snapshot(module) == inside
    assert snapshot(world.model) == before


@law
def test_model_kept_after_an_error(row):
    """An error in the middle leaves the model and the caller's tensors as they were, and the next call works."""
    Fuse.left = many = 1000
    try:
        explained(row)
        calls = many - Fuse.left
    finally:
        Fuse.left = None
    world = World()
    before = snapshot(world.model)
    td = world.td()
    given = {key: look(value) for key, value in leaves(td).items() if isinstance(value, Tensor)}
    for call in range(min(calls, 3)):
        Fuse.left = call
        try:
            with pytest.raises(Exception, match="the fuse blew"), row.opened(world) as module:
                module(td.copy())
        finally:
            Fuse.left = None
        assert snapshot(world.model) == before
    assert {key: look(value) for key, value in leaves(td).items() if isinstance(value, Tensor)} == given
    same(explained(row, world, td), explained(row))


@law
def test_frozen(row):
    """Parameters that do not require grad make no difference."""
    world = World()
    world.model.requires_grad_(False)
    same(explained(row, world), explained(row))
    assert not any(p.requires_grad for p in world.model.parameters())


# ---------------------------------------------------------------------------------------- the rows


@law
def test_rows(row):
    """Row i of a batch is that row alone."""
    world = World()
    whole = explained(row)
    for i in range(3):
        alone = explained(row, td=world.td((), rows=i))
        one = explained(row, td=world.td((1,), rows=slice(i, i + 1)))
        same({key: value[i] for key, value in whole.items()}, alone, 1e-10)
        same({key: value[i : i + 1] for key, value in whole.items()}, one, 1e-10)


@law
def test_batch_dims(row):
    """Any number of batch dims gives the same rows."""
    flat = explained(row, td=World().td((4,)))
    for batch in ((2, 2), (4, 1), (1, 2, 2)):
        shaped = explained(row, td=World().td(batch))
        same({key: value.reshape(4, *value.shape[len(batch) :]) for key, value in shaped.items()}, flat, 1e-10)


@law
def test_empty(row):
    """An empty batch gives empty results, of the same kind."""
    full = explained(row)
    for batch in ((0,), (2, 0)):
        none = explained(row, td=World().td(batch))
        assert {k: (v.shape, v.dtype) for k, v in none.items()} == {
            k: (torch.Size([*batch, *v.shape[1:]]), v.dtype) for k, v in full.items()
        }


@law
def test_dtypes(row):
    """A result has the dtype of the model."""
    wide = explained(row)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for key, value in explained(row, World(dtype)).items():
            assert value.dtype == (dtype if wide[key].is_floating_point() else wide[key].dtype), key


@law
def test_precision(row):
    """In single precision it is the same to single precision."""
    for (key, wide), value in zip(explained(row).items(), explained(row, World(torch.float32)).values(), strict=True):
        torch.testing.assert_close(
            value.to(wide.dtype), wide, rtol=1e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}"
        )


@law
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_devices(row):
    """A result is where the model is, and the same there."""
    here = explained(row)
    there = explained(row, World(device="cuda"))
    for key, value in there.items():
        assert value.device.type == "cuda", key
        if row.exempt.get("rows") != STREAM:
            torch.testing.assert_close(value.cpu(), here[key], rtol=1e-8, atol=1e-8)


@law
def test_nested(row):
    """Nested keys are keys."""
    flat, nested = explained(row), explained(row, World(nested=True))
    assert len(flat) == len(nested)
    for one, other in zip(flat.values(), nested.values(), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------- randomness


@law
def test_generator(row):
    """The same generator state gives the same answer, and the global one is left alone."""
    state = torch.get_rng_state()
    first = explained(row)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    same(explained(row), first)


@law
def test_chunks(row):
    """Results do not depend on how many rows are in flight."""
    if row.chunks:
        whole = explained(row)
        for size in (1, 2, 7, 1000):
            same(explained(row, World(chunk=size)), whole, 1e-10)


# ---------------------------------------------------------------------------------------- gradients


@law
def test_no_grad(row):
    """Collectors run under ``no_grad``, some under ``inference_mode``."""
    expected = explained(row)
    for mode in (torch.no_grad, torch.inference_mode):
        world = World()
        with row.opened(world) as module, mode():
            td = module(world.td())
            same(written(module, td), expected)


@law
def test_detached(row):
    """What it writes has no graph."""
    world = World()
    td = world.td()
    for value in leaves(td).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    found = explained(row, world, td)
    own = {} if "outputs" in row.name else world.model.out_keys
    assert {key for key, value in found.items() if value.requires_grad and key not in own} == set()


# ---------------------------------------------------------------------------------------- copies


@law
def test_copies(row):
    """Copies and pickles give the same answer; those of a model taken inside a context are not hooked."""
    expected = explained(row)
    with row.opened(world := World()) as module:
        for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            td = world.td()
            with made if hasattr(made, "__enter__") else made_is_open():
                same(written(module, made(td)), expected)
        plain = world.model(world.td()).get(world("logits")) if not hasattr(module, "__enter__") else None
        for made in (copy.deepcopy(world.model), pickle.loads(pickle.dumps(world.model))):
            found = made(world.td()).get(world("logits"))
            assert torch.equal(found, World().model(world.td()).get(world("logits")))
            assert plain is None or torch.equal(found, plain)


class made_is_open:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@law
def test_state_dict(row):
    """``state_dict`` knows nothing of explainers and contexts."""
    world = World()
    before = world.model.state_dict()
    with row.opened(world) as module:
        module(world.td())
        inside = world.model.state_dict()
        own = module.state_dict()
        module.load_state_dict(own)
    assert list(before) == list(inside) == list(world.model.state_dict())
    assert all(torch.equal(value, inside[key]) for key, value in before.items())


# ---------------------------------------------------------------------------------------- other settings


@law
def test_replaced(row):
    """``replace`` makes it anew, with the ends of each tunable's grid too, and knows which names there are."""
    with row.opened(world := World()) as module:
        if not hasattr(module, "tunables"):
            assert type(module).__module__.split(".")[1] not in {"attribution", "lrp", "perturbation"}
            return
        if not isinstance(module, Hooked):
            check_replaced(row, module, world)
            return
    check_replaced(row, module, world)  # inside, what it does to the model would be done to the other's calls too


def check_replaced(row: Row, module: Any, world: World) -> None:
    shared = {id(part) for part in world.model.modules()} & {id(part) for part in module.modules()}
    same(written(module, module.replace()(world.td())), explained(row))
    for tunable in module.tunables:
        for value in (tunable.values()[0], tunable.values()[-1]):
            draws = {"noise": None} if tunable.name == "n_iter" else {}  # a row's own are another number
            with torch.random.fork_rng():
                found = written(module, module.replace(**{tunable.name: value}, **draws)(world.td()))
            assert all(one is not None and one.isfinite().all() for one in found.values()), (tunable, value)
    with pytest.raises(TdConceptsError, match="nonsense"):
        module.replace(nonsense=1)
    assert {id(part) for part in module.replace().modules()} >= shared


# ---------------------------------------------------------------------------------------- compile


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of an autograd.Function that it traces
@law
def test_compiled(row):
    """``torch.compile(fullgraph=True)`` works and equals eager."""
    check_compiled(row, (N,))


@pytest.mark.parametrize("name", ["Gradient", "IntegratedGradients", "capture with gradients", "patch"])
def test_compiled_for_batches_of_any_size(name):
    check_compiled(next(row for row in TABLE if row.name == name), (N,), (3,))


def check_compiled(row: Row, *batches: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    world = World()
    with anchor(world.model, *row.anchors), row.opened(world) as module:
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for batch in batches:
            same(written(module, compiled(world.td(batch))), explained(row, td=World().td(batch)), 1e-10)


# ---------------------------------------------------------------------------------------- bad input


@law
def test_bad_input(row):
    """Bad input gets an error of ours, and nothing has changed."""
    world = World()
    before = snapshot(world.model)
    with row.opened(world) as module:
        inside = snapshot(module)
        bad = [world.td().lock_(), TensorDict({}, batch_size=[3])]
        bad += [world.td().exclude(key) for key in module.in_keys]
        for td in bad:
            entries = leaves(td)
            with pytest.raises(TdConceptsError):
                module(td)
            assert {k: id(v) for k, v in leaves(td).items() if k != "note"} == {
                k: id(v) for k, v in entries.items() if k != "note"
            }
            assert snapshot(module) == inside
    assert snapshot(world.model) == before


# ---------------------------------------------------------------------------------------- the table


ROOMS = [
    importlib.import_module(f"tdconcepts.{found.name}")
    for found in pkgutil.iter_modules(tdconcepts.__path__)
    if found.ispkg and found.name not in {"hooks", "rl", "report", "demo"}
]
NO_STAGES = {"ConceptStage", "SelectorZU"}  # a base class; another name of MemorySelector


def test_every_method_has_a_row():
    """A module that is public in its room is in the table, by itself or inside another; so is every context."""
    covered = {row.name.split()[0] for row in TABLE}
    for row in TABLE:
        with row.opened(World()) as made:
            covered |= {type(module).__name__ for module in made.modules()}
    public = {name: getattr(room, name) for room in ROOMS for name in room.__all__}
    stages = {name for name, c in public.items() if isinstance(c, type) and issubclass(c, TensorDictModuleBase)}
    assert stages - NO_STAGES - covered == set()
    assert {"NeuronGradient", "intervene", "capture", "patch", "anchor"} <= covered
    assert len(stages) > 15


def test_exemptions_name_laws():
    assert {name for row in TABLE for name in row.exempt} <= set(LAWS)
    assert len({row.name for row in TABLE}) == len(TABLE)


# -------------------------------------------------------------------------------------------------- the laws can fail


class Outlaw(TensorDictModuleBase):
    """A stage that writes ``act(self, td, model, x)``, where ``x`` is the observation, into ``("out", "x")``."""

    def __init__(self, world: World, act: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.act, self.key = (world.model,), act, world("observation")
        self.in_keys, self.out_keys = [self.key], [("out", "x")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        x = tensordict.get(self.key)
        if self.act not in (careless, hasty) and (tensordict.is_locked or x is None):
            raise TdConceptsError("bad input")
        result = self.act(self, tensordict, self.model[0], x)
        if isinstance(result, TensorDictBase):
            return result
        return tensordict.set(("out", "x"), result)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], TensorDictBase):
            return super().__call__(*args)
        x = args[0] if args else next(iter(kwargs.values()))
        return super().__call__(TensorDict({self.key: x}, batch_size=x.shape[:-1])).get(("out", "x"))


def lawful(m: Outlaw, td: TensorDictBase, model: nn.Module, x: Tensor) -> Tensor:
    return x.detach().clone()


def careless(m: Outlaw, td: TensorDictBase, model: nn.Module, x: Tensor) -> Tensor:
    return x.detach().clone()


def hasty(m: Outlaw, td: TensorDictBase, model: nn.Module, x: Tensor | None) -> Tensor:
    """Writes before it looks."""
    if not td.is_locked:
        td.set(("out", "x"), torch.zeros(td.batch_size))
    raise TdConceptsError("bad input")


def random(m: Outlaw, td: TensorDictBase, model: nn.Module, x: Tensor) -> Tensor:
    return x.detach() + torch.rand(())


def noted(m: Outlaw, td: TensorDictBase, model: nn.Module, x: Tensor) -> Tensor:
    """Leaves a note on the model where an error comes in between."""
    model.note = 1
    model(td.copy())
    del model.note
    return x.detach().clone()


CALLS = itertools.count()
OUTLAWS: list[tuple[Callable[..., None], Callable[..., Any]]] = [
    (test_entries, lambda m, td, model, x: td.set("more", x).get("more")),
    (test_entries, lambda m, td, model, x: td.set("other", td.get("other").clone()) is None or x),
    (test_entries, lambda m, td, model, x: td.copy().set(("out", "x"), x)),
    (test_in_keys, lambda m, td, model, x: x + td.get("latent", torch.zeros(()))),
    (test_callers_tensors, lambda m, td, model, x: x.detach().add_(1).clone()),
    (test_callers_tensors, lambda m, td, model, x: x.requires_grad_().detach().clone()),
    (test_called_with_tensors, lambda m, td, model, x: x + td.get("latent", 0)),
    (test_called_with_a_batch, lambda m, td, model, x: x + td.get("latent", 0)),
    (test_sequential, lambda m, td, model, x: x + next(CALLS)),
    (test_select_out_keys, lambda m, td, model, x: x + len(m.out_keys) + next(CALLS)),
    (test_model_kept, lambda m, td, model, x: next(model.parameters()).data.add_(1) is None or x),
    (test_model_kept, lambda m, td, model, x: model.register_forward_hook(print) and x),
    (test_model_kept, lambda m, td, model, x: model.eval() and x),
    (test_model_kept, lambda m, td, model, x: setattr(model[0], "note", 1) or x),
    (test_model_kept, lambda m, td, model, x: next(model.parameters()).requires_grad_(False) is None or x),
    (test_model_kept_after_an_error, noted),
    (test_frozen, lambda m, td, model, x: x * next(model.parameters()).requires_grad),
    (test_rows, lambda m, td, model, x: x - x.mean(0)),
    (test_batch_dims, lambda m, td, model, x: x - x.mean(-2, keepdim=True)),
    (test_empty, lambda m, td, model, x: x.float() if x.numel() == 0 else x),
    (test_dtypes, lambda m, td, model, x: x.float()),
    (test_precision, lambda m, td, model, x: x + 0.01 * (x.dtype == torch.float32)),
    (test_nested, lambda m, td, model, x: x + len(str(m.key))),
    (test_generator, lambda m, td, model, x: torch.rand(()) is None or x),
    (test_generator, random),
    (test_no_grad, lambda m, td, model, x: x + torch.is_grad_enabled()),
    (test_no_grad, lambda m, td, model, x: x + torch.is_inference_mode_enabled()),
    (test_detached, lambda m, td, model, x: x * 1),
    (test_copies, random),
    (test_state_dict, lambda m, td, model, x: model.register_buffer("new", torch.ones(1)) or x),
    (test_compiled, lambda m, td, model, x: torch._dynamo.graph_break() or x),
    (test_compiled, lambda m, td, model, x: x + torch.compiler.is_compiling()),
    (test_bad_input, careless),
    (test_bad_input, hasty),
]


@pytest.mark.parametrize(("check", "act"), OUTLAWS, ids=[f"{c.__name__}-{i}" for i, (c, _) in enumerate(OUTLAWS)])
def test_a_law_can_fail(check, act):
    """Each law catches a stage that breaks it, and lets one go that breaks none."""
    check(Row("lawful", lambda w: Outlaw(w, lawful)))
    kinds = (AssertionError, RuntimeError) if check in (test_compiled, test_bad_input) else AssertionError
    with pytest.raises(kinds):
        check(Row("outlaw", lambda w: Outlaw(w, act)))


def test_chunks_can_fail():
    def longer(m, td, model, x, by=0):
        return x + by

    with pytest.raises(AssertionError):
        test_chunks(Row("outlaw", lambda w: Outlaw(w, functools.partial(longer, by=len(w.chunk))), chunks=True))


class Changed(Outlaw):
    """Has ``replace``: what it gives adds ``by``."""

    tunables = (Tunable("by", 0, 1, 1),)

    def __init__(self, world: World, strict: bool = True, **given: float) -> None:
        super().__init__(world, lambda m, td, model, x: x.detach() + given.get("by", 0.0))
        self.again, self.given = functools.partial(Changed, world, strict), given

    def replace(self, by: float = 0.0, **unknown: object) -> "Changed":
        if unknown and self.again.args[1]:
            raise TdConceptsError(f"no argument {list(unknown)}")
        return self.again(by=by)


def test_replaced_can_fail():
    test_replaced(Row("lawful", lambda w: Changed(w, by=0.0)))
    for given in ({"by": 1.0}, {"strict": False}):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_replaced(Row("outlaw", lambda w, given=given: Changed(w, **given)))


def test_every_law_is_seen_to_fail():
    assert {check.__name__.removeprefix("test_") for check, _ in OUTLAWS} | {"chunks", "devices", "replaced"} == set(
        LAWS
    )
