"""What explainers share: keys, options, chunks, and how results are written."""

import pytest
import torch
from hooks.nets import batch, hook_count, mlp, pipeline
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Site, Target
from tdconcepts.hooks.explaining import HELD, Explaining, check_options, finite


def explaining(net=None, target=None, wrt=None, **options):
    return Explaining(net or pipeline(), target or Target("y", 0), wrt, options)


def test_keys():
    this = explaining(wrt=["x", "h", Site("1", index=2)])
    assert this.in_keys == ["x"]
    assert this.out_keys == [("attribution", "x"), ("attribution", "h"), ("attribution", "1[2]")]
    assert explaining(out_key="mine").out_keys == [("mine", "x")]
    assert explaining(out_key=("a", "b"), wrt="h").out_keys == [("a", "b", "h")]
    assert explaining(outputs=True).out_keys == [("attribution", "x"), "h", "z", "y"]
    assert explaining(target=Target("y", by="action")).in_keys == ["x", "action"]


def test_nested_keys():
    net = TensorDictModule(nn.Linear(4, 2), [("agents", "x")], [("agents", "y")])
    this = Explaining(net, Target(("agents", "y"), 0), None, {})
    assert this.in_keys == [("agents", "x")]
    assert this.out_keys == [("attribution", "agents", "x")]


def test_further_keys():
    this = Explaining(
        mlp(), Target("y", 0), None, {}, extra=lambda this: [("delta", *key) for key in this.attribution_keys]
    )
    assert this.out_keys == [("attribution", "x"), ("delta", "attribution", "x")]


def test_keys_that_clash():
    net = TensorDictModule(lambda x, g: x, ["x", ("x_", "y")], ["y"])
    with pytest.raises(BadKey, match="can't have one name"):
        Explaining(net, Target("y", 0), ["x", ("x_", "y")], {"out_key": "x"})
    with pytest.raises(BadKey, match="written under one key"):
        Explaining(mlp(), Target("y", 0), None, {}, extra=lambda this: [("attribution", "x")])


# ---------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("shape", [(5,), (3, 2), ()])
@pytest.mark.parametrize("held", [False, True])
def test_chunks_are_put_together_again(chunk_size, shape, held):
    this = explaining(chunk_size=chunk_size)
    td = batch(*shape) if shape else batch(1)[0]
    if held:
        td[HELD] = torch.arange(td.numel()).reshape(shape)
    sizes = []

    def attribute(part, index):
        sizes.append(part.numel())
        assert (index is None) != held
        return {("attribution", "x"): part["x"] * 2 + (0 if index is None else index.unsqueeze(-1))}

    assert this.run(td, attribute) is td
    assert td["attribution", "x"].equal(td["x"] * 2 + (td[HELD].unsqueeze(-1) if held else 0))
    assert sum(sizes) == td.numel()
    if chunk_size is None:
        assert len(sizes) == 1
    elif shape:
        assert max(sizes) <= chunk_size


def test_targets_at_once():
    td, both = batch(), Target("y", [0, 1])
    assert [explaining(None, both, chunk_size=c).width(td) for c in (None, 1, 5, 11, 64)] == [3276, 1, 1, 2, 12]
    assert explaining(None, both, chunk_size=3).width(batch(1)[0]) == 3
    assert explaining(None, both, chunk_size=3).width(batch()[:0]) == 3
    assert explaining(chunk_size=64).width(td) == 1, "of one there is nothing to choose"


def test_outputs_of_the_module():
    td = batch()
    for outputs in (False, True):
        this = explaining(outputs=outputs)
        pulled = this.pullback(td)
        found = this.written(pulled.outputs)
        assert set(found) == ({"h", "z", "y"} if outputs else set())
        if outputs:
            assert found["y"].equal(pipeline()(batch())["y"])


def test_a_failure_writes_nothing():
    td = batch()

    def attribute(part, held):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        explaining(chunk_size=2).run(td, attribute)
    assert set(td.keys()) == {"x"}


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("shape", "row", "text"), [((5,), (3,), "3"), ((2, 3), (1, 0), "[1, 0]"), ((), (), "[]")])
def test_a_number_that_is_none_is_named(bad, shape, row, text):
    td = TensorDict(x=torch.randn(*shape, 4), batch_size=shape)
    td["x"][(*row, 2)] = bad
    with pytest.raises(BadValue, match="'x' is not finite") as error:
        explaining().run(td, lambda part, held: {})
    assert f"{bad} in row {text}, at [2]" in str(error.value)
    explaining(check_finite=False).run(td, lambda part, held: {})
    explaining(pipeline(), Target("y", 0), Site("1")).run(td, lambda part, held: {})  # x is not what is explained


def test_what_is_finite():
    finite(batch(), ["x", "missing"], None)
    finite(TensorDict(x=torch.ones(3, dtype=torch.long), batch_size=[3]), ["x"], True)
    finite(TensorDict(x=torch.full((3, 4), 3e38), batch_size=[3]), ["x"], True)  # the sum of these is not
    finite(TensorDict(x=torch.zeros(0, 4), batch_size=[0]), ["x"], True)
    torch.vmap(lambda x: finite(TensorDict(x=x, batch_size=[]), ["x"], True) or x)(torch.ones(2, 3))


def test_bars_on_request(capsys):
    seen = []

    def bar(pieces, desc):
        seen.append((desc, len(pieces)))
        return pieces

    explaining(chunk_size=2, progress=bar).run(batch(), lambda part, held: {("attribution", "x"): part["x"]})
    assert seen == [("rows", 3)]
    explaining(chunk_size=2, progress=True).run(batch(), lambda part, held: {("attribution", "x"): part["x"]})
    assert "rows" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("options", [{"progress": 3}, {"progress": "yes"}, {"check_finite": 1}, {"check_finite": "no"}])
def test_options_that_are_none(options):
    with pytest.raises(BadType, match=r"not a progress bar|check_finite= is a bool"):
        explaining(**options)


def test_options_that_do_not_exist():
    with pytest.raises(BadType, match="no option 'chunk'") as error:
        explaining(chunk=3)
    assert "did you mean 'chunk_size'" in str(error.value)
    check_options({"a": 1}, ["a", "b"])
    with pytest.raises(BadType, match="no option 'c'"):
        check_options({"c": 1}, ["a", "b"])


@pytest.mark.parametrize("chunk_size", [0, -3, 1.5, "all"])
def test_chunk_sizes_that_are_none(chunk_size):
    with pytest.raises(BadValue, match="not a chunk size"):
        explaining(chunk_size=chunk_size)


@pytest.mark.parametrize("out_key", [3, "", (), ("a", 1)])
def test_out_keys_that_are_none(out_key):
    with pytest.raises(BadKey):
        explaining(out_key=out_key)


def test_what_cannot_be_written_to():
    this = explaining()
    with pytest.raises(BadValue, match="locked"):
        this.run(batch().lock_(), lambda part, held: {})
    with pytest.raises(BadType, match="not a TensorDict"):
        this.run({"x": torch.ones(5, 4)}, lambda part, held: {})
    with pytest.raises(BadType, match="a bare Linear"):
        Explaining(nn.Linear(2, 2), Target("y", 0), None, {})


def test_no_taps_stay():
    net = pipeline()
    this = explaining(net, wrt=Site("1"))
    this.pullback(TensorDict(x=torch.ones(2, 4), batch_size=[2]))
    assert not hook_count(net)
