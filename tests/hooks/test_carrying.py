"""The calls that carry values on: those that write or move values are linear in them."""

import pytest
import torch
from torch.nn import functional as F

from tdconcepts.attribution.products import _LINEAR
from tdconcepts.hooks.carrying import CARRIED
from tdconcepts.lrp.kinds import PLAIN

FIRST = torch.zeros(1, 4, 3, dtype=torch.long)
ARGUMENTS = {
    **dict.fromkeys(["neg", "sum", "mean", "flatten", "squeeze", "unbind", "clone", "contiguous", "double", "cpu"], ()),
    **dict.fromkeys(["tril", "triu", "diagonal", "rot90", "atleast_1d", "detach"], ()),
    **dict.fromkeys(["cumsum", "unsqueeze", "roll"], (1,)),
    **dict.fromkeys(["split", "chunk", "repeat_interleave", "tile"], (2,)),
    **dict.fromkeys(["avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"], (2,)),
    **dict.fromkeys(["view", "reshape"], (2, -1)),
    **dict.fromkeys(["view_as", "reshape_as"], (torch.zeros(4, 12),)),
    **dict.fromkeys(["movedim", "moveaxis", "swapaxes", "swapdims", "transpose"], (0, 2)),
    **dict.fromkeys(["expand", "broadcast_to"], ((5, 4, 4, 3),)),
    "permute": (2, 0, 1),
    "unflatten": (1, (2, 2)),
    "index_select": (0, torch.tensor([0, 2])),
    "gather": (0, FIRST),
    "take_along_dim": (FIRST, 0),
    "expand_as": (torch.zeros(5, 4, 4, 3),),
    "repeat": (2, 1, 1),
    "flip": (0,),
    "unfold": (1, 2, 1),
    "narrow": (1, 0, 2),
    "select": (1, 0),
    "pad": ((1, 2),),
    "interpolate": (6,),
    "type_as": (torch.zeros((), dtype=torch.float64),),
}


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_it_is_linear(name):
    assert name in CARRIED
    a, b = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    call = getattr(torch.Tensor, name, None) or getattr(torch, name, None) or getattr(F, name)

    def of(x):
        found = call(x, *ARGUMENTS[name])
        return torch.cat([part.flatten() for part in (found if isinstance(found, (tuple, list)) else [found])])

    torch.testing.assert_close(of(2 * a - 3 * b), 2 * of(a) - 3 * of(b))


def test_no_product_and_no_function_is_carried_and_methods_add_to_them():
    assert not CARRIED & {"relu", "mul", "matmul", "div", "abs", "max", "softmax", "pow", "where", "dropout", "exp"}
    assert CARRIED < PLAIN
    assert CARRIED < _LINEAR
