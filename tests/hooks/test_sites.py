"""Sites: their text, their paths, and what a path means in a model."""

import contextlib
import copy
import pickle

import pytest
import torch
from hooks.nets import batch, linear, mlp, pipeline
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Patch, Scale, Site, Target, capture
from tdconcepts.hooks.sites import is_compiled, module_paths, place_of_entry, places

# ---------------------------------------------------------------------------------------------------- text

parts = st.from_regex(r"[a-zA-Z_0-9]{1,4}|\*|\*\*", fullmatch=True)
paths = st.lists(parts, min_size=1, max_size=4).map(".".join) | st.just(".")
ints = st.integers(-20, 20)
bounds = st.none() | ints
plain_indices = ints | st.builds(slice, bounds, bounds, bounds) | st.lists(ints, min_size=1, max_size=3)
indices = st.lists(plain_indices, max_size=3).flatmap(
    lambda some: st.sampled_from([[*some[:i], ..., *some[i:]] for i in range(len(some) + 1)] + ([some] if some else []))
)
names = st.from_regex(r"[a-zA-Z_][a-zA-Z_0-9 -]{0,4}", fullmatch=True)
leaves = st.none() | ints | names | st.lists(ints | names, min_size=1, max_size=3).map(tuple)
sites = st.builds(
    Site,
    paths,
    st.sampled_from(["output", "input"]),
    index=st.none() | indices.map(tuple),
    call=st.none() | ints | st.just("all"),
    leaf=leaves,
)


@given(sites)
def test_parse_reads_what_str_prints(site):
    assert Site.parse(str(site)) == site
    assert str(Site.parse(str(site))) == str(site)
    assert eval(repr(site), {"Site": Site.parse}) == site
    assert site.key == str(site)


@given(sites, sites)
def test_sites_are_equal_exactly_if_their_texts_are(one, other):
    assert (one == other) == (str(one) == str(other))
    if one == other:
        assert hash(one) == hash(other)


@given(sites)
def test_sites_copy_and_pickle(site):
    assert pickle.loads(pickle.dumps(site)) == copy.deepcopy(site) == site


@given(st.text(alphabet="a1.*:[]@,in out-", max_size=12))
def test_any_text_is_a_site_or_a_bad_value(text):
    with contextlib.suppress(BadValue):
        site = Site.parse(text)
        assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("encoder.2", Site("encoder.2")),
        ("encoder.2:out", Site("encoder.2")),
        ("encoder.2:output", Site("encoder.2")),
        ("encoder.2:input", Site("encoder.2", "input")),
        ("encoder.2:in[..., 4]", Site("encoder.2", "input", index=(..., 4))),
        ("a[3]", Site("a", index=3)),
        ("a[1:3, ::2, [0, 2], -1]", Site("a", index=(slice(1, 3), slice(None, None, 2), [0, 2], -1))),
        ("lstm:out.0@-1", Site("lstm", leaf=0, call=-1)),
        ("lstm:out.1.0@all", Site("lstm", leaf=(1, 0), call="all")),
        ("body:in.mask[0]@2", Site("body", "input", leaf="mask", index=0, call=2)),
        (".", Site(".")),
        ("blocks.*.attn", Site("blocks.*.attn")),
    ],
)
def test_the_grammar(text, site):
    assert Site.parse(text) == site


def test_parse_gives_a_site_back():
    site = Site("a")
    assert Site.parse(site) is site


@pytest.mark.parametrize(
    "text", ["", ":in", "a:side", "a[", "a]", "a[]", "a@", "a@x", "a[x]", "a[1.5]", "a[None]", 3, None]
)
def test_texts_that_are_no_sites(text):
    with pytest.raises(BadValue, match="not a") as error:
        Site.parse(text)
    assert "got:" in str(error.value)
    assert "needed:" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"path": 3}, BadType),
        ({"path": "a", "side": "left"}, BadValue),
        ({"path": "a", "call": "last"}, BadValue),
        ({"path": "a", "call": 1.0}, BadValue),
        ({"path": "a", "call": True}, BadValue),
        ({"path": "a", "index": "x"}, BadValue),
        ({"path": "a", "index": 1.5}, BadValue),
        ({"path": "a", "index": True}, BadValue),
        ({"path": "a", "index": ()}, BadValue),
        ({"path": "a", "index": []}, BadValue),
        ({"path": "a", "index": (..., ...)}, BadValue),
        ({"path": "a", "index": None, "side": None}, BadValue),
        ({"path": "a", "index": slice("x")}, BadValue),
    ],
)
def test_arguments_that_are_none(arguments, error):
    with pytest.raises(error) as raised:
        Site(**arguments)
    assert "got:" in str(raised.value)


def test_a_site_is_frozen():
    with pytest.raises(AttributeError):
        Site("a").path = "b"
    assert Site("a", index=3).index == (3,)
    assert Site("") == Site(".")


# ---------------------------------------------------------------------------------------------------- paths


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = linear(3, 3, 0), nn.Sequential(linear(3, 3, 1), nn.Tanh())

    def forward(self, x):
        return self.mlp(self.attn(x))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = linear(4, 3, 0), nn.ModuleList([Block(), Block()]), linear(3, 2, 1)
        self.missing = None
        self.register_module("nothing", None)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def deep():
    return TensorDictModule(Deep(), ["x"], ["y"])


def names_of(model, path):
    return [place.name for place in places(model, Site(path))]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("stem", ["stem"]),
        ("blocks.1.attn", ["blocks.1.attn"]),
        ("blocks.*.attn", ["blocks.0.attn", "blocks.1.attn"]),
        ("blocks", ["blocks"]),
        ("blocks.*", ["blocks.0", "blocks.1"]),
        ("*", ["stem", "head"]),
        ("**.1", ["blocks.0.mlp.1", "blocks.1", "blocks.1.mlp.1"]),
        ("**.mlp.0", ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
        ("blocks.1.**", ["blocks.1.attn", "blocks.1.mlp", "blocks.1.mlp.0", "blocks.1.mlp.1"]),
        ("h*", ["head"]),
        ("*.0.*", ["blocks.0.attn", "blocks.0.mlp"]),
    ],
)
def test_globs(path, expected):
    assert names_of(deep(), path) == expected


def test_a_glob_means_each_entry_of_a_stage_that_has_several():
    split = TensorDictModule(lambda x: (x + 1, x + 2), ["x"], ["a", ("b", "c")])
    add = TensorDictModule(torch.add, ["a", ("b", "c")], ["y"])
    model, td = TensorDictSequential(split, add), TensorDict(x=torch.zeros(2, 3), batch_size=[2])
    out = capture(model, "*")(td.copy())["activation"]
    assert sorted(out.keys()) == sorted([Site("0", leaf="a").key, Site("0", leaf=("b", "c")).key, "1"])
    assert (out[Site("0", leaf=("b", "c")).key] == 2).all()
    read = capture(model, Site("*", side="input"))(td.copy())["activation"]
    assert (read[Site("1", side="input", leaf="a").key] == 1).all()
    with pytest.raises(BadKey, match="several entries"):
        capture(model, "0")(td.copy())
    act = TensorDictModule(lambda y: (y, y.argmax(-1)), ["y"], ["logits", "action"])
    with pytest.raises(BadType, match=r"no gradient of 2:out\.action"):
        capture(TensorDictSequential(split, add, act), "*", gradients=Target("logits", 0))(td.copy())


def test_a_glob_is_anchored_at_both_ends():
    """``1`` is not ``10``, and ``.`` is a dot."""
    net = TensorDictModule(nn.Sequential(*[nn.Identity() for _ in range(12)]), ["x"], ["y"])
    assert names_of(net, "1") == ["1"]
    assert names_of(net, "1*") == ["1", "10", "11"]
    with pytest.raises(BadKey):
        names_of(deep(), "blocks*attn")
    with pytest.raises(BadKey):
        names_of(deep(), "blocks_1")


def test_the_options_of_a_glob_hold_for_each():
    found = places(deep(), Site("blocks.*", "input", index=2, call="all", leaf=0))
    assert [place.name for place in found] == [f"blocks.{i}:in.0[2]@all" for i in (0, 1)]
    assert {(p.side, p.part, p.call, p.leaf) for p in found} == {("input", (2,), "all", 0)}


def test_every_module_of_a_model_can_be_captured():
    """What can't be called, a ModuleList for instance, is not meant; its own name is an error that says so."""
    net = deep()
    td = capture(net, "**")(batch())
    inside = [f"blocks.{i}{part}" for i in (0, 1) for part in ("", ".attn", ".mlp", ".mlp.0", ".mlp.1")]
    assert set(td["activation"].keys()) == {"stem", "head", *inside}
    with pytest.raises(BadValue, match="the site 'blocks' never ran"):
        capture(net, "blocks")(batch())


def test_a_path_that_matches_nothing_names_the_nearest():
    for path in ("hed", "blocks.*.atn", "stem.weight"):
        with pytest.raises(BadKey, match="no module at path") as error:
            places(deep(), Site(path))
        text = str(error.value)
        assert all(word in text for word in ("got:", "needed:", "way out:", repr(path)))
    with pytest.raises(BadKey, match=r"did you mean 'head'\?"):
        places(deep(), Site("hed"))


def test_the_layers_that_tensordict_adds_are_hidden_and_can_be_named():
    nested = TensorDictSequential(pipeline(), TensorDictModule(mlp().module, ["x"], ["w"]))
    assert list(module_paths(nested)) == [".", "0", "0.0", "0.1", "0.2", "1", "1.0", "1.1", "1.2"]
    assert set(module_paths(nested, full=True)) == {name or "." for name, _ in nested.named_modules()}
    assert names_of(nested, "module.0.module.2.module") == ["module.0.module.2.module"]
    linear_layer = places(nested, Site("module.0.module.2.module"))[0].module
    assert linear_layer is nested[0][2].module
    assert places(nested, Site("0.2"))[0].module is nested[0][2], (
        "a hidden layer's path is that of its TensorDictModule"
    )


def test_a_stage_and_the_module_in_it_agree():
    net = pipeline()
    td = capture(net, "0", "module.0.module")(batch())
    assert td["activation", "0"].equal(td["activation", "module.0.module"])


def test_sequentials_with_names():
    net = TensorDictSequential({"enc": pipeline()[0], "act": pipeline()[1]})
    assert list(module_paths(net)) == [".", "enc", "act"]
    assert capture(net, "enc")(batch())["activation", "enc"].shape == (5, 3)


def test_a_context_can_be_hooked_itself():
    net = pipeline()
    inner = capture(net, "0")
    outer = Patch({Site("0"): Scale(2.0)}).on(inner)
    assert list(module_paths(inner)) == list(module_paths(net))
    td, plain = outer(batch()), net[0].module(batch()["x"])
    assert td["activation", "0"].equal(plain)  # what is wrapped reads first,
    assert td["h"].equal(2 * plain)  # what wraps it edits what that makes


def test_modules_that_hold_each_other():
    net = mlp()
    net.module.owner = [net]  # not a module
    net.module[0].parent = net.module
    assert {"0", "1", "2"} <= set(module_paths(net))
    assert len(module_paths(net)) < 10
    assert names_of(net, "2") == ["2"]


def test_place_of_an_entry():
    net = pipeline()
    place = place_of_entry(net[1], "z")
    assert (place.module, place.leaf, place.out_keys, place.name) == (net[1], "z", ("z",), "'z'")


def test_is_compiled():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not any(is_compiled(module) for module in net.modules())
    assert is_compiled(torch.compile(net, backend="eager"))
    net[0].compile(backend="eager")
    assert [is_compiled(module) for module in net.modules()] == [False, True, False]
