"""The page of an explained rollout: what is drawn is what was given, and the errors."""

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from tdconcepts.errors import BadKey, BadValue

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from tdconcepts.report.rollouts import Shown, attribution_strip, frame_strip, rollout_sections, write_rollout_page

FEATURES = ["position, m", "angle, rad", "speed, m/s"]


def rollout(batch=(2, 9)):
    generator = torch.Generator().manual_seed(0)
    td = TensorDict({"observation": torch.randn(*batch, 3, generator=generator)}, batch_size=batch)
    td["action"] = torch.arange(9).expand(batch) % 2
    td["attribution", "observation"] = torch.randn(*batch, 3, generator=generator)
    td["attribution", "smoothgrad", "observation"] = torch.randn(*batch, 3, generator=generator)
    td["attribution", "hidden"] = torch.randn(*batch, 8, generator=generator)
    td["next", "reward"] = torch.ones(*batch, 1)
    td["collector", "mask"] = torch.ones(batch, dtype=torch.bool)
    td["collector", "mask"][..., 7:] = False
    td["explanation", "exploration_type"] = NonTensorData("deterministic", batch_size=batch)
    return td


def test_chapters():
    overview, chapter = rollout_sections(rollout(), FEATURES)
    assert dict(overview.summary) == {"trajectories": "2", "steps": "14", "mean return": "7.0"}
    headers, rows, _ = overview.tables[0]
    assert headers == ["feature", "attribution", "smoothgrad"]
    counted = rollout()["attribution", "observation"][:, :7, 1].abs().mean()
    assert rows[1] == ["angle, rad", f"{counted:.3g}", rows[1][2]]
    assert chapter.title == "Trajectory 0, steps 0 to 6"
    series, strip, _ = (figure for figure, _ in chapter.figures)
    assert [axes.get_title() for axes in series.axes[:3]] == ["state", "attribution", "smoothgrad"]
    assert [text.get_text() for text in series.legends[0].get_texts()] == ["action 0", "action 1"]
    drawn = strip.axes[0].get_images()[0].get_array()
    torch.testing.assert_close(torch.as_tensor(drawn), rollout()["attribution", "observation"][0, :7].double().T)


def test_parts_names_and_frames():
    td = rollout()
    td["pixels"] = torch.randint(0, 256, (2, 9, 6, 5, 3), dtype=torch.uint8)
    td["attribution", "pixels"] = torch.randn(2, 9, 6, 5, 3)

    class Highlight(tuple):
        trajectory, start, stop, step, importance = (1,), 2, 6, 4, 3.5

    parts = [Highlight(), Shown((0,), 1, 3)]
    names = ["left", "right"]
    _, first, second = rollout_sections(
        td, FEATURES, attributions=[("attribution", "observation")], actions=names, shown=parts, frames="pixels"
    )
    assert first.title == "Trajectory 1, steps 2 to 5"
    assert "importance of step 4 is 3.5" in first.paragraphs[0]
    assert second.title == "Trajectory 0, steps 1 to 2"
    assert (
        float(first.figures[0][0].axes[0].collections[0].get_offsets()[:, 0].min()) == 2.0
    )  # the left pushes of 2 to 5
    assert [text.get_text() for text in first.figures[0][0].legends[0].get_texts()] == names
    pictures = first.figures[-1][0].axes
    assert [axes.get_title() for axes in pictures[:4]] == [f"step {i}" for i in (2, 3, 4, 5)]
    shown = torch.as_tensor(pictures[0].get_images()[0].get_array())
    torch.testing.assert_close(shown, td["pixels"][1, 2].double() / 255)
    heat = torch.as_tensor(pictures[0].get_images()[1].get_array())
    expected = td["attribution", "pixels"][1, 2].double().abs().sum(-1)
    torch.testing.assert_close(heat, expected / expected.max())


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 1), (3, 3, 4, 5), (3, 4, 5, 3)])
def test_frames_of_every_form(shape):
    figure = frame_strip(torch.rand(shape), torch.rand(shape), columns=2)
    assert len(figure.axes) == 4
    assert all(axes.get_images()[0].get_array().shape == (4, 5, 3) for axes in figure.axes[:3])


def test_a_page(tmp_path):
    path = write_rollout_page(tmp_path / "page.html", rollout((9,)), FEATURES, title="Balance")
    text = path.read_text(encoding="utf-8")
    assert "<h1>Balance</h1>" in text
    assert "&#39;deterministic&#39;" in text
    assert text.count("data:image/svg+xml") == 3


def test_continuous_actions_have_no_groups():
    td = rollout().set("action", torch.randn(2, 9, 1))
    figure, _ = rollout_sections(td, FEATURES)[1].figures[0]
    assert not figure.legends


def test_bad_input():
    td = rollout()
    with pytest.raises(BadKey, match="no entry 'state'"):
        rollout_sections(td, FEATURES, state="state")
    with pytest.raises(BadValue, match="a name for each feature"):
        rollout_sections(td, FEATURES[:2])
    with pytest.raises(BadValue, match="no attributions to show"):
        rollout_sections(td.exclude("attribution"), FEATURES)
    with pytest.raises(BadValue, match="NoneType"):
        rollout_sections(None, FEATURES)
    with pytest.raises(BadValue, match="not a trajectory"):
        rollout_sections(td, FEATURES, shown=[Shown()])
    with pytest.raises(BadValue, match="no steps to show"):
        rollout_sections(td, FEATURES, shown=[Shown((0,), 7, 9)])
    with pytest.raises(BadValue, match="not frames"):
        frame_strip(torch.rand(3, 4))
    with pytest.raises(BadValue, match="heat of another shape"):
        frame_strip(torch.rand(3, 4, 4), torch.rand(3, 4, 5))
    with pytest.raises(BadValue, match="no attributions over time"):
        attribution_strip(torch.rand(3, 4), FEATURES)
