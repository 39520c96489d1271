"""What is learned travels in state dicts, also to a stage that is not fitted."""

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.representations import PCA, LinearProbe


def test_a_state_dict_fits_another_stage():
    td = TensorDict(x=torch.randn(9, 3), z=torch.randn(9, 2), y=torch.randn(9, 2), batch_size=[9])
    for make in (lambda: LinearProbe(["x", "z"], "y"), lambda: PCA(["x", "z"], 2)):
        one, other = make().fit(td), make()
        nn.Sequential(other).load_state_dict(nn.Sequential(one).state_dict())
        for key in one.out_keys:
            assert torch.equal(one(td.clone())[key], other(td.clone())[key])
        wider = td.clone().set("x", torch.randn(9, 5))
        copy.deepcopy(one).load_state_dict(make().fit(wider).state_dict())
        assert one.fit(wider).kept(0)[0].shape[0] == 5


def test_unfitted_stages_say_so():
    with pytest.raises(BadValue, match="LinearProbe is not fitted"):
        LinearProbe("x", "y")(TensorDict(x=torch.ones(2, 3), batch_size=[2]))
