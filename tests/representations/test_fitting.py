"""What probes share: shapes, streams and folds give one answer; directions; errors."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.representations import LinearProbe, LogisticProbe, MassMeanProbe, reading
from tdconcepts.representations.fitting import moments_of
from tdconcepts.representations.reading import Reader, Rows, Stream

KINDS = [LinearProbe, MassMeanProbe, LogisticProbe]


def make(n=40, labels=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator).double()
    y = (x[:, :labels] + torch.randn(n, labels, generator=generator) > 0).long()
    z = torch.randn(n, 2, generator=generator).double()
    return TensorDict({("activation", "0"): x, "z": z, "w": x.flip(-1), "y": y}, batch_size=[n])


@pytest.mark.parametrize("kind", KINDS)
def test_sites_and_labels_in_one_solve_equal_one_by_one(kind):
    td, keys = make(), [("activation", "0"), "z", "w"]
    together = kind(keys, "y").fit(td)
    found = together(td.clone())
    for key in keys:
        for label in range(3):
            alone = kind(key, "one").fit(td.clone().set("one", td["y"][:, label]))
            one = alone(td.clone())["probe", *alone.out_keys[0][1:]]
            assert one.shape == (40,)
            torch.testing.assert_close(found["probe", *alone.out_keys[0][1:]][:, label], one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_and_shapes_make_no_difference(kind, monkeypatch):
    td = make()
    whole = kind(["z", "w"], "y").fit(td)
    monkeypatch.setattr(reading, "_CHUNK", 1)
    monkeypatch.setattr(reading, "_LEAST", 9)
    for data in ([td[:7], td[7:8], td[8:]], td.reshape(5, 8), [part.reshape(2, 5) for part in td.split(10)]):
        for key in ("z", "w"):
            for one, other in zip(kind(["z", "w"], "y").fit(data).of(key), whole.of(key), strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_training_sets_are_the_rows_of_the_other_folds(kind):
    td, fold = make(), torch.arange(40) % 3
    probe = kind(["z", "w"], "y")
    stream = Stream(Reader(probe.keys_read, "y"), td)
    dealt = stream.changed(lambda rows: Rows(rows.x, rows.y, rows.start, fold[rows.start : rows.start + len(rows.y)]))
    for left_out, sets in enumerate(probe.solve(dealt, 3)):
        alone = kind(["z", "w"], "y").fit(td[fold != left_out])
        for key, one in zip(("z", "w"), sets, strict=True):
            torch.testing.assert_close(one.weight, alone.of(key).weight, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.bias, alone.of(key).bias, atol=1e-4, rtol=1e-4)


def test_moments_come_in_one_pass():
    passes = []

    class Once(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    td = make()
    [(group, [m])] = moments_of(Stream(Reader(["w"], "y"), Once([td[:9], td[9:]])))
    assert (group, m.count, passes) == ([0], 40, [1])


def test_predictions_keep_dtype_shape_and_graph():
    td = make()
    probe = LinearProbe("z", "y").fit(td.float())
    assert probe.of().weight.dtype == torch.float64
    z = torch.randn(2, 3, 2, requires_grad=True)
    found = probe(TensorDict(z=z, batch_size=[2, 3]))["probe", "z"]
    assert (found.shape, found.dtype) == ((2, 3, 3), torch.float32)
    found.sum().backward()
    torch.testing.assert_close(z.grad, probe.of().weight.sum(-1).float().expand(2, 3, 2))


def test_directions():
    probe = LinearProbe(["z", "w"], "y").fit(make())
    assert probe.direction("w").shape == (3, 4)
    torch.testing.assert_close(probe.direction("w").norm(dim=-1), torch.ones(3).double())
    for key in (None, "nonsense"):
        with pytest.raises(BadKey, match="which of the entries"):
            probe.direction(key)
    flat = make().set("z", torch.zeros(40, 2).double())
    with pytest.raises(BadValue, match="no direction"):
        LinearProbe("z", "y").fit(flat).direction()


def test_another_width_is_refused():
    with pytest.raises(BadValue, match="another width"):
        LinearProbe("z", "y").fit(make())(TensorDict(z=torch.ones(3, 5), batch_size=[3]))
