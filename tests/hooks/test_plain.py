"""Stages that are called without tensordict's wrapping: the same entries, hooks and errors."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, set_skip_existing
from torch import nn

from tdconcepts import Gradient, Target
from tdconcepts.hooks.plain import call_stage


class Two(nn.Module):
    """A tuple, a dict, or one tensor."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, a, b=None):
        """Return a sum and a difference."""
        b = torch.ones_like(a) if b is None else b
        found = {"s": a + b, ("n", "d"): a - b}
        return found if self.kind is dict else tuple(found.values()) if self.kind is tuple else a + b


def given(**more):
    return TensorDict(a=torch.arange(6.0).view(3, 2), b=torch.full((3, 2), 2.0), **more, batch_size=[3])


def stage(kind=tuple, in_keys=("a", "b"), out_keys=("s", ("n", "d")), **options):
    in_keys = in_keys if isinstance(in_keys, dict) else list(in_keys)
    return TensorDictModule(Two(kind), in_keys, list(out_keys), **options)


@pytest.mark.parametrize(
    "one",
    [
        stage(),
        stage(dict),
        stage(None, out_keys=["s"]),
        stage(out_keys=["_", ("n", "d")]),
        stage(out_keys=["a", "b"]),
        stage(None, ["a"], ["s"]),
        stage(in_keys={"a": "a", "b": "b"}),
        stage(inplace=False),
        stage(method="forward"),
        stage(None, ["a", "missing"], ["s"]),
        TensorDictModule(lambda a: a + 1, ["a"], ["s"]),
        TensorDictModule(nn.Identity(), ["text"], ["again"]),
    ],
)
def test_what_is_written(one):
    direct, whole = given(text="words"), given(text="words")
    a, b = call_stage(one, direct), one(whole)
    assert (a is direct) is (b is whole)
    assert set(a.keys(True, True)) == set(b.keys(True, True))
    assert all(a[key].equal(b[key]) if torch.is_tensor(b[key]) else a[key] == b[key] for key in b.keys(True, True))


def test_hooks_of_others_and_existing_entries():
    one, seen = stage(), []
    handle = one.register_forward_hook(lambda *_: seen.append("stage"))
    one.module.register_forward_hook(lambda *_: seen.append("module"))
    call_stage(one, given())
    handle.remove()
    call_stage(one, given())
    assert seen == ["module", "stage", "module"]
    kept = given(s=torch.zeros(3)).set(("n", "d"), torch.zeros(3))
    with set_skip_existing(True):
        assert call_stage(one, kept)["s"].eq(0).all()
    assert len(seen) == 3


def test_a_hook_of_all_modules_hears_the_stage():
    one, seen = stage(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        call_stage(one, given())
    finally:
        handle.remove()
    assert seen == [one.module, one]


def test_errors_come_out_as_they_are():
    net = TensorDictModule(nn.Sequential(nn.Linear(4, 2)), ["x"], ["y"])
    with pytest.raises(RuntimeError, match="shapes"):
        Gradient(net, Target("y", 0))(TensorDict(x=torch.randn(3, 5), batch_size=[3]))
