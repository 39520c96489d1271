"""The options that change no result, for every method: bars for long loops, numbers that are none."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts import Gradient, IntegratedGradients, Site, Target, VarGrad
from tdconcepts.attribution import Conductance, ExpectedGradients, GradCAM, InternalInfluence, NeuronConductance
from tdconcepts.errors import BadType, BadValue
from tdconcepts.perturbation import (
    FeatureAblation,
    FeaturePermutation,
    KernelShap,
    Lime,
    Occlusion,
    ShapleyExact,
    ShapleySampling,
)

Y = Target("logits", 1)
LONG = {
    "path": [
        lambda net, **o: IntegratedGradients(net, Y, n_steps=10, **o),
        lambda net, **o: Conductance(net, Y, Site("0"), n_steps=10, **o),
        lambda net, **o: InternalInfluence(net, Y, Site("0"), n_steps=10, **o),
        lambda net, **o: NeuronConductance(net, Y, "0", 1, n_steps=10, **o),
    ],
    "samples": [lambda net, **o: ExpectedGradients(net, Y, baselines=rows(), n_samples=10, **o)],
    "draws": [lambda net, **o: VarGrad(Gradient(net, Y), n_iter=10, **o)],
    "rows": [lambda net, **o: Gradient(net, Y, **o), lambda net, **o: GradCAM(net, Y, "0", **o)],
    "forward passes": [
        lambda net, **o: FeatureAblation(net, Y, **o),
        lambda net, **o: FeaturePermutation(net, Y, **o),
        lambda net, **o: Occlusion(net, Y, window=2, **o),
        lambda net, **o: ShapleySampling(net, Y, **o),
        lambda net, **o: ShapleyExact(net, Y, **o),
        lambda net, **o: KernelShap(net, Y, **o),
        lambda net, **o: Lime(net, Y, **o),
    ],
}
METHODS = [(name, make) for name, makes in LONG.items() for make in makes]


def rows():
    return TensorDict(x=torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4), batch_size=[3])


@pytest.mark.parametrize(("name", "make"), METHODS)
def test_a_bar_for_each_long_loop(net, batch, name, make, capsys):
    seen = []

    def bar(pieces, desc):
        seen.append(desc)
        for _ in range(10):
            yield from pieces
            return

    td = batch(5)
    torch.manual_seed(0)
    plain = make(net, chunk_size=4)(td.copy())
    torch.manual_seed(0)
    shown = make(net, chunk_size=4, progress=bar)(td.copy())
    assert name in seen
    assert capsys.readouterr().err == ""
    for key in plain.keys(True, True):
        assert torch.equal(plain[key], shown[key])
    make(net, chunk_size=4, progress=True)(td.copy())
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(("name", "make"), METHODS)
def test_a_number_that_is_none_is_named(net, batch, name, make):
    td = batch(5)
    td["x"][3, 2] = float("nan")
    sites = type(make(net)).__name__ in ("Conductance", "InternalInfluence", "GradCAM")
    if not sites:  # there the input is not what is explained
        with pytest.raises(BadValue, match=r"'x' is not finite(.|\n)*nan in row 3, at \[2\]"):
            make(net)(td.copy())
        assert set(td.keys()) == {"x", "z", "action"}


def test_what_is_no_option_of_noise(net):
    with pytest.raises(BadType, match="no option 'chunk'"):
        VarGrad(Gradient(net, Y), chunk=3)
    with pytest.raises(BadType, match="not a progress bar"):
        VarGrad(Gradient(net, Y), progress=3)
    with pytest.raises(BadValue, match="not a chunk size"):
        VarGrad(Gradient(net, Y), chunk_size=0)
