"""Stabilisers: signed, with sign(0) = +1; clip, norm-scaled, callable."""

import pytest
import torch

from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import Stabilizer
from tdconcepts.lrp.stabilizers import check_stabilizer, damped, shared, stabilized


def test_kinds():
    z = torch.tensor([[-2.0, -1e-9, 0.0, 1e-9, 2.0]], dtype=torch.float64)
    e = 0.25
    sign = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert stabilized(z, e).equal(z + e * sign)
    assert (z / stabilized(z, 0)).equal((z != 0).double())
    assert Stabilizer(e)(z).equal(z + e * sign)
    assert Stabilizer(e, clip=True)(z).equal(sign * z.abs().clamp(min=e))
    size = z.square().mean(1, keepdim=True).sqrt()
    assert Stabilizer(e, norm_scale=True)(z).allclose(z + e * size * sign)
    assert Stabilizer(e, clip=True, norm_scale=True)(z).allclose(sign * torch.maximum(z.abs(), e * size))
    each = Stabilizer(e, norm_scale=True, dims=(0,))(z)
    assert each.allclose(torch.where(z == 0, torch.inf, z + e * z.abs() * sign))
    assert stabilized(z, lambda z: z + 7).equal(z + 7)


@pytest.mark.parametrize("options", [{"norm_scale": True}, {"norm_scale": True, "clip": True}])
def test_a_row_of_zeros_has_no_scale(options):
    z = torch.zeros(2, 3)
    assert (z / Stabilizer(0.1, **options)(z)).equal(z)
    assert (z / Stabilizer(0.0, clip=True)(z)).equal(z)


def test_bad():
    with pytest.raises(BadValue, match="epsilon"):
        Stabilizer(-1.0)
    with pytest.raises(BadType, match="stabiliser"):
        check_stabilizer("1e-6")


@pytest.mark.parametrize("by", [0.0, 0.25, Stabilizer(0.1, clip=True), lambda z: z + 3])
@pytest.mark.parametrize("fresh", [False, True])
def test_quotients(by, fresh):
    z = torch.tensor([-2.0, -1e-9, 1e-9, 2.0], dtype=torch.float64)
    before, flow = z.clone(), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(shared(flow, z, by, fresh), flow / stabilized(z, by))
    torch.testing.assert_close(damped(flow, z, by, fresh), flow * z / stabilized(z, by), atol=1e-15, rtol=1e-7)
    assert z.equal(before)
