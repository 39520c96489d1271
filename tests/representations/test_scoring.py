"""Scores: cross-validation against scikit-learn's, no leaks between groups, control tasks."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.representations import LinearProbe, LogisticProbe, MassMeanProbe, cross_validate, ridge_direction, score


def make(episodes=8, steps=15):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(episodes, steps, 4, generator=generator).double()
    y = x[..., 0] + torch.randn(episodes, steps, generator=generator)
    c = torch.stack([y > 0, x[..., 1] > 0], -1).long()
    group = torch.arange(episodes).unsqueeze(-1).expand(episodes, steps) * 3 - 5
    return TensorDict(x=x, y=y, c=c, group=group, batch_size=[episodes, steps])


def test_it_equals_scikit_learns_cross_validation_by_groups():
    linear, model = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.model_selection")
    td = make().reshape(-1)
    fold = torch.arange(8).repeat_interleave(15) % 4
    split = model.PredefinedSplit(fold.numpy())
    expected = model.cross_val_score(
        linear.LogisticRegression(), td["x"].numpy(), td["c"][:, 0].numpy(), cv=split, scoring="accuracy"
    )
    for groups, data in (("group", td), (0, make()), ("group", list(td.split(15))), (0, list(make().split(2)))):
        scores = cross_validate(LogisticProbe("x", "c"), data, folds=4, groups=groups)
        torch.testing.assert_close(scores.folds["x"][:, 0], torch.from_numpy(expected))
        torch.testing.assert_close(scores.score["x"][0], torch.from_numpy(expected).mean())
        assert scores.rows == 120


def test_r2_is_that_of_the_ridge_probe_over_episodes():
    td = make()
    expected = ridge_direction(td["x"], td["y"], 2.0, folds=4).r2
    scores = cross_validate(LinearProbe("x", "y", 2.0), td, folds=4, groups=0)
    assert float(scores.score["x"]) == pytest.approx(expected, abs=1e-9)
    assert scores.score["x"].shape == ()
    assert scores.folds["x"].shape == (4,)


def test_no_group_is_on_both_sides():
    """A unit for each episode tells it by heart: rows held out at random would score near 1, episodes don't."""
    name = torch.eye(8).unsqueeze(1).expand(8, 30, 8)
    label = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).expand(8, 30) + 1e-3 * torch.randn(8, 30)
    td = TensorDict(x=name, y=label, batch_size=[8, 30])
    generator = torch.Generator().manual_seed(0)
    assert cross_validate(LinearProbe("x", "y", 1e-3), td, generator=generator).score["x"] > 0.9
    assert cross_validate(LinearProbe("x", "y", 1e-3), td, groups=0, folds=8).score["x"] < 0.1


def test_a_control_task_shows_memory():
    """A one-hot word tells each word's label, the true and the random; a feature tells the true one alone."""
    words = torch.arange(400) % 20
    label = (words % 3 == 0).long()
    td = TensorDict(
        word=torch.nn.functional.one_hot(words, 20).double(),
        meaning=label.unsqueeze(-1).double(),
        y=label,
        type=words,
        batch_size=[400],
    )
    scores = cross_validate(
        LogisticProbe(["word", "meaning"], "y"), td, control="type", generator=torch.Generator().manual_seed(0)
    )
    assert scores.score["word"] == scores.control["word"] == scores.score["meaning"] == 1.0
    assert scores.selectivity["word"] == 0.0
    assert scores.selectivity["meaning"] > 0.2
    again = cross_validate(
        LogisticProbe(["word", "meaning"], "y"), td, control="type", generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(again.control["meaning"], scores.control["meaning"])
    assert "control" in repr(scores)


def test_masked_steps_do_not_count():
    td = make()
    td["mask"] = torch.rand(8, 15, generator=torch.Generator().manual_seed(0)) > 0.3
    kept = td[td["mask"]]
    expected = cross_validate(MassMeanProbe("x", "c"), kept, groups="group", folds=4)
    td["x"][~td["mask"]] = float("nan")
    found = cross_validate(MassMeanProbe("x", "c"), td, groups=0, folds=4, mask="mask")
    assert torch.equal(found.score["x"], expected.score["x"])
    assert found.rows == int(td["mask"].sum())


def test_the_score_of_a_fitted_probe():
    metrics = pytest.importorskip("sklearn.metrics")
    td = make().reshape(-1)
    probe = LinearProbe(["x"], "y").fit(td[:60])
    expected = metrics.r2_score(td[60:]["y"], probe(td[60:].clone())["probe", "x"])
    assert float(score(probe, td[60:])["x"]) == pytest.approx(expected)
    kinds = LogisticProbe("x", "c").fit(td[:60])
    right = ((kinds(td[60:].clone())["probe", "x"] > 0.5) == td[60:]["c"].bool()).double().mean(0)
    torch.testing.assert_close(score(kinds, [td[60:70], td[70:]])["x"], right)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"folds": 1}, BadValue, "folds"),
        ({"groups": 2}, BadValue, "no such batch dim"),
        ({"groups": "x"}, BadValue, "names no groups"),
        ({"groups": "nothing"}, BadKey, "nothing"),
        ({"control": "y"}, BadValue, "names no groups"),
        ({"groups": "one"}, BadValue, "held out from itself"),
    ],
)
def test_bad_input(options, error, text):
    with pytest.raises(error, match=text):
        cross_validate(LinearProbe("x", "y"), make().set("one", torch.ones(8, 15, dtype=torch.int64)), **options)


def test_what_is_no_probe():
    with pytest.raises(BadType, match="not a probe"):
        cross_validate("x", make())
    with pytest.raises(BadType, match="not a probe"):
        score(None, make())


def test_a_constant_label_has_no_r2():
    td = make().set("y", torch.ones(8, 15))
    for act in (lambda: cross_validate(LinearProbe("x", "y"), td), lambda: score(LinearProbe("x", "y").fit(td), td)):
        with pytest.raises(BadValue, match="constant"):
            act()
