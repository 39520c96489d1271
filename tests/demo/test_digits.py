"""The digits part of the demo: real images, real numbers, the same for the same seed."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from tdconcepts.demo import digits
from tdconcepts.demo.digits import (
    accuracy_by_corrections,
    digits_bottleneck,
    digits_data,
    digits_section,
    train_bottleneck,
)
from tdconcepts.interventions import UncertaintyPolicy, UniformPolicy


@pytest.fixture(scope="module")
def section():
    calls, state = [], torch.get_rng_state()
    made = digits_section(seed=0, quick=True, progress=lambda *call: calls.append(call))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is as before
    return made, calls


@pytest.fixture(scope="module")
def trained():
    train, test = digits._split(digits_data(), 3)
    return digits._trained(digits.PLAIN, train, 3), test


def curves(section):
    return {row[0]: [float(cell) for cell in row[1:]] for row in section.tables[0][1]}


def test_the_data_are_the_bundled_digits_with_the_segments_of_a_display():
    data = digits_data()
    assert data.batch_size == (1797,)
    assert data["pixels"].shape == (1797, 64)
    assert (data["pixels"].min(), data["pixels"].max()) == (0, 1)
    lit = {int(d): data["segments"][data["digit"] == d][0].sum().item() for d in data["digit"].unique()}
    assert lit == {0: 6, 1: 2, 2: 5, 3: 5, 4: 4, 5: 5, 6: 6, 7: 3, 8: 7, 9: 6}  # segments of a calculator's digits
    assert data["segments"].unique(dim=0).shape == (10, 7)


def test_the_split_is_stratified_disjoint_and_by_seed():
    data = digits_data()
    data["row"] = torch.arange(1797)
    train, test = digits._split(data, 0)
    assert train["digit"].bincount().tolist() == [15] * 10
    assert sorted(train["row"].tolist() + test["row"].tolist()) == list(range(1797))
    assert torch.equal(digits._split(data, 0)[0]["row"], train["row"])
    assert not torch.equal(digits._split(data, 1)[0]["row"], train["row"])


def test_correcting_helps_and_the_policies_beat_random(section):
    found = curves(section[0])
    assert set(found) == {"random", "uncertainty", "gradient", "uncertainty, memory"}
    assert all(len(curve) == 8 for curve in found.values())
    assert found["random"][0] == found["uncertainty"][0] == found["gradient"][0]  # nothing corrected: one model
    assert 0.75 < found["random"][0] < 0.95
    for name in ("uncertainty", "gradient"):
        assert found[name][2] > found["random"][2] + 0.02
    assert all(curve[7] > 0.97 for curve in found.values())


def test_the_section_says_what_the_numbers_say(section):
    made, _ = section
    found, text, summary = curves(made), " ".join(made.paragraphs), dict(made.summary)
    for name in ("random", "uncertainty", "gradient"):
        said = summary[f"digits right, 2 of 7 corrected: {name}"]
        assert f"{name} reaches {said}" in text
        assert float(said.rstrip("%")) == pytest.approx(100 * found[name][2], abs=0.1)
    assert summary["digits right, no concept corrected"] in text
    assert len(made.figures) == 1
    assert "2 splits" in made.figures[0][1]
    assert [len(row) for row in made.tables[1][1]] == [8, 8]


def test_progress_reaches_one_for_each_stage(section):
    _, calls = section
    stages = {stage for stage, _, _ in calls}
    for stage in stages:
        fractions = [fraction for name, fraction, _ in calls if name == stage]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1
    assert len(stages) == 2


def test_the_same_seed_gives_the_same_model(trained):
    train, test = digits._split(digits_data(), 3)
    torch.manual_seed(12345)
    again = digits._trained(digits.PLAIN, train, 3)
    for one, other in zip(again.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(*(accuracy_by_corrections(m, test, UncertaintyPolicy()) for m in (again, trained[0])))


def test_accuracy_by_corrections_is_what_a_loop_would_count(trained):
    model, test = trained
    curve = accuracy_by_corrections(model, test, UniformPolicy())
    with torch.no_grad():
        concepts = model(test.copy())["concepts"]
        for k in (0, 3, 7):
            given = torch.cat([test["segments"][:, :k].float(), concepts[:, k:]], -1)
            right = model["head"].module(given).argmax(-1) == test["digit"]
            assert curve[k].item() == pytest.approx(right.double().mean().item(), abs=1e-12)


def test_training_lowers_the_loss_and_the_memory_variant_learns_too():
    train, _ = digits._split(digits_data(), 0)
    for memory in (False, True):
        model = digits_bottleneck(memory)
        assert train_bottleneck(model, train, steps=60) < 0.6 * train_bottleneck(
            digits_bottleneck(memory), train, steps=1
        )
        assert model.concepts.names[0] == "top"


@pytest.mark.parametrize(
    ("curve", "text"), [([0.9, 0.96], "random has to correct 1"), ([0.5, 0.6], "random never corrects enough")]
)
def test_sentences_follow_the_numbers(curve, text):
    assert digits._enough("random", torch.tensor(curve)) == text


def test_a_section_whose_policies_fail_does_not_praise_them():
    flat = torch.full((2, 8), 0.5)
    made = digits._written(
        dict.fromkeys(["random", "uncertainty", "gradient", "uncertainty, memory"], flat),
        {digits.PLAIN: [torch.full((7,), 0.5)], digits.MEMORY: [torch.full((7,), 0.5)]},
        1647,
    )
    text = " ".join(made.paragraphs)
    assert "better than random" not in text
    assert "not in the head" not in text
    assert "50.0%" in text
