"""The story follows the numbers: other numbers, other sentences."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("matplotlib")
from tdconcepts.demo.agent_story import LOGITS, METHODS, PROBE, RANDOM, Direction, Measured, beyond, tell_story
from tdconcepts.interventions import RemoveDirection
from tdconcepts.representations import RidgeProbe
from tdconcepts.rl import Returns, TrainedAgent
from tdconcepts.rl.rollouts import EXPLANATION, MASK


def probe(r2):
    return RidgeProbe(torch.ones(3), torch.zeros(()), torch.zeros(3), r2, 1000)


def measured(probe_return=500.0, logit_return=9.0, chance=(500.0, 499.0), r2=0.999, mean=500.0, largest=2):
    attributions = TensorDict(batch_size=[2, 30])
    for name in METHODS:
        value = torch.full((2, 30, 4), 0.1)
        value[..., largest] = 0.7
        attributions[name, "observation"] = value
    explained = TensorDict(
        {
            "attribution": attributions,
            "observation": torch.randn(2, 30, 4),
            "action": torch.arange(60).reshape(2, 30) % 2,
        },
        batch_size=[2, 30],
    )
    explained[MASK] = torch.ones(2, 30, dtype=torch.bool)
    explained[MASK][1, 20:] = False
    explained[EXPLANATION, "exploration_type"] = "deterministic"
    names = ("unpatched", PROBE, LOGITS, *(f"{RANDOM} {i}" for i in range(1, len(chance) + 1)))
    spread = torch.tensor([-1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    means = torch.tensor([500.0, probe_return, logit_return, *chance], dtype=torch.float64)
    episodes = TensorDict(
        {"return": means[:, None] + spread, "flips": torch.rand(len(names), 4)}, batch_size=[len(names), 4]
    )
    directions = {name: Direction(RemoveDirection(torch.ones(3)), 0.03, 8e-5) for name in names[1:]}
    agent = TrainedAgent(None, None, 5, 16384, mean, [{"frames": 16384, "mean": mean, "min": 400.0}])
    probes = {0: probe(r2), 20: probe(0.1)}
    return Measured(agent, (6.0, 0.4), explained, probes, 0.99, directions, Returns(names, episodes))


def story(**numbers):
    return " ".join(tell_story(measured(**numbers)).paragraphs)


def test_what_was_expected():
    text = story()
    assert "with seed 5 for 16,384 environment steps" in text
    assert "this reaches the goal of 475" in text
    assert "2 greedy episodes of 20 to 30 steps" in text
    assert "50 logged actions" in text
    assert "the pole angle moves the taken action's logit most, with 70% of the total size" in text
    assert "put the pole angle first as well" in text
    assert "almost exactly: R² = 0.999" in text
    assert "The agent needs the logit-difference direction" in text
    assert "does no more than removing a random one. So the pole angle can be read along that direction" in text
    assert "0.008% of the stage's variance" in text


@pytest.mark.parametrize(
    ("numbers", "said", "not_said"),
    [
        ({"mean": 300.0}, "misses the goal", "reaches the goal"),
        ({"probe_return": 100.0}, "It uses the probe's direction too", "no need of the direction shows"),
        ({"logit_return": 500.0}, "does not show beyond the random controls", "The agent needs"),
        (
            {"probe_return": 100.0, "chance": (100.0, 50.0)},
            "does no more than removing a random one",
            "uses the probe's",
        ),
        ({"r2": 0.5}, "in part: R² = 0.500", "So the pole angle can be read"),
        ({"r2": 0.1}, "hardly: R² = 0.100", "almost exactly"),
        ({"largest": 0}, "the cart position moves the taken action's logit most", "the pole angle moves"),
    ],
)
def test_other_numbers_other_sentences(numbers, said, not_said):
    text = story(**numbers)
    assert said in text
    assert not_said not in text


def test_methods_that_disagree_are_named():
    numbers = measured()
    numbers.explained["attribution", "gradient", "observation"][..., 3] = 9.0
    text = " ".join(tell_story(numbers).paragraphs)
    assert (
        "The methods differ in what they put first: gradient the pole velocity, input × gradient the pole angle" in text
    )


def test_tables_figures_and_summary():
    section = tell_story(measured())
    assert len(section.figures) == 3
    sizes, scores, effects = section.tables
    assert [row[0] for row in sizes[1]] == list(METHODS.values())
    assert sizes[1][0][1:] == ["0.100", "0.100", "0.700", "0.100"]
    assert sizes[1][-1][3] == "0.837"  # the square root of the variance
    assert scores[1] == [["0", "0.999", "1,000"], ["20", "0.100", "1,000"]]
    assert [row[0] for row in effects[1]] == ["unpatched", PROBE, LOGITS, "random direction 1", "random direction 2"]
    assert effects[1][2][2] == "-491.0"
    assert dict(section.summary)["agent: return without 2 random directions"] == "-1.0 to +0.0"


def test_masked_steps_do_not_count():
    numbers = measured()
    for name in METHODS:
        numbers.explained["attribution", name, "observation"][1, 20:] = 1e9
    assert tell_story(numbers).tables[0][1] == tell_story(measured()).tables[0][1]


def test_beyond_needs_the_whole_interval():
    assert beyond((-10.0, -12.0, -8.0), 5.0)
    assert beyond((10.0, 8.0, 12.0), 5.0)
    assert not beyond((-10.0, -20.0, -4.0), 5.0)
    assert not beyond((0.0, -1.0, 1.0), 0.0)
    assert not beyond((-10.0, float("nan"), float("nan")), 5.0)


def test_measured_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        measured().left = 0.0
