"""A page for an explained rollout: states beside their attributions, frames under theirs, numbers for each episode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.keys import ATTRIBUTION, NestedKey, as_key, join, key_text
from tdconcepts.report.figures import new_figure, numbers_in, over_time
from tdconcepts.report.page import Section, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Shown", "attribution_strip", "frame_strip", "rollout_sections", "write_rollout_page"]

MASK, ACTION, REWARD = ("collector", "mask"), "action", ("next", "reward")
_GROUPS = 7  # actions that get a mark of their own


class Shown(NamedTuple):
    """A part of a rollout: the trajectory (an index for each batch dim but time), and the steps ``start`` to ``stop``.

    The highlights of ``tdconcepts.rl.highlights`` have these fields too.

    Args:
        trajectory: an index for each batch dim but time; ``()`` where the rollout is one trajectory.
        start: the first step that is shown.
        stop: the step after the last; None: the end of the trajectory.

    Examples:
        >>> part = Shown((3,), 100, 200)  # of a rollout [*B, T]: trajectory 3, a hundred steps
        >>> part.trajectory, part.stop - part.start
        ((3,), 100)
    """

    trajectory: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None


def attribution_strip(
    attribution: Tensor, features: Sequence[str], *, xlabel: str = "step", title: str = "", start: int = 0
) -> Figure:
    """Attributions ``[T, F]`` as a band of colours, a row for each feature and a column for each step; red is positive.

    The colours are symmetric around zero, to the largest size that is drawn.

    Args:
        attribution: ``[T, F]``; NaN is left blank.
        features: F names.
        xlabel, title: texts.
        start: the number of the first step.

    Raises:
        BadValue: another shape. MissingExtra: matplotlib is not installed.

    Examples:
        >>> figure = attribution_strip(torch.randn(30, 2), ["angle, rad", "velocity, rad/s"], start=100)
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['angle', 'velocity']
    """
    attribution = numbers_in(attribution, "the attribution")
    if attribution.ndim != 2 or attribution.shape[1] != len(features) or not attribution.numel():
        raise BadValue(
            "no attributions over time", got=f"shape {list(attribution.shape)}", needed=f"[T, {len(features)}]"
        )
    value = attribution.double().T
    top = float(value.nan_to_num(0.0).abs().max()) or 1.0
    figure, ((axes,),) = new_figure(size=(8.4, 0.42 * len(features) + 1.3))
    extent = (start - 0.5, start + value.shape[1] - 0.5, len(features) - 0.5, -0.5)
    drawn = axes.imshow(
        value.numpy(), aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top, extent=extent, interpolation="nearest"
    )
    axes.set_yticks(range(len(features)), [name.split(",")[0] for name in features])
    axes.grid(visible=False)
    axes.set(xlabel=xlabel, title=title)
    figure.colorbar(drawn, ax=axes, pad=0.01)
    return figure


def frame_strip(frames: Tensor, heat: Tensor | None = None, *, titles: Sequence[str] = (), columns: int = 6) -> Figure:
    """Frames side by side, and over them what was important in each.

    Args:
        frames: ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with 1 or 3 channels; bytes, or numbers in [0, 1].
        heat: attributions of the same frames, in their shape or ``[N, H, W]``: their size, summed over channels.
        titles: one for each frame.
        columns: frames in a row.

    Raises:
        BadValue: what is no frame, or heat of another shape. MissingExtra: matplotlib is not installed.

    Examples:
        >>> frames, heat = torch.rand(4, 8, 8, 3), torch.zeros(4, 8, 8)
        >>> heat[:, 2:4, 2:4] = 1.0
        >>> figure = frame_strip(frames, heat, titles=["before", "", "", "after"])
        >>> len(figure.axes), figure.axes[3].get_title()
        (4, 'after')
    """
    pictures, last = _pictures(frames), frames.ndim == 4 and frames.shape[-1] in (1, 3)
    shown = None
    if heat is not None:
        size = heat.detach().cpu().double().abs()
        size = size.sum(-1 if last else 1) if size.ndim == 4 else size
        if size.shape != pictures.shape[:3]:
            raise BadValue("heat of another shape", got=f"{list(heat.shape)}", needed=f"{list(frames.shape)}")
        shown = size / size.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]
    wide = min(columns, len(pictures))
    rows = -(-len(pictures) // wide)
    tall = 1.55 * pictures.shape[1] / pictures.shape[2] + 0.35
    figure, grid = new_figure(rows, wide, size=(1.55 * wide, tall * rows))
    for number, axes in enumerate(grid.flat):
        axes.axis("off")
        if number >= len(pictures):
            continue
        axes.imshow(pictures[number].numpy(), interpolation="nearest")
        if shown is not None:
            axes.imshow(shown[number].numpy(), cmap="inferno", alpha=(0.75 * shown[number]).numpy(), vmin=0, vmax=1)
        if number < len(titles):
            axes.set_title(titles[number], fontsize=9)
    return figure


def rollout_sections(
    rollout: TensorDictBase,
    features: Sequence[str],
    *,
    state: NestedKey = "observation",
    attributions: Sequence[NestedKey] | None = None,
    actions: Sequence[str] | None = None,
    shown: Sequence[Any] | None = None,
    frames: NestedKey | None = None,
) -> list[Section]:
    """The chapters of a rollout's page: what it is, and each trajectory with its states, attributions and frames.

    | reads | |
    |---|---|
    | ``state`` ``[*B, T, F]``; its attributions ``[*B, T, F]`` | drawn over time |
    | ``"action"`` ``[*B, T]``, or one-hot ``[*B, T, A]`` | a mark for each action, where there are few |
    | ``("next", "reward")``, ``("collector", "mask")`` | where they are there: return and length |

    Args:
        rollout: ``[*B, T]``, as ``tdconcepts.rl.explain_rollout`` gives it.
        features: the names of the F features, with their units after a comma.
        state: the entry.
        attributions: the entries with attributions of it; default: all under ``"attribution"`` of its shape.
        actions: the names of the actions.
        shown: which parts: :class:`Shown`, or highlights; default: the first trajectory, 200 steps of it.
        frames: an entry with pictures, ``[*B, T, H, W, C]``; its own attributions are laid over them.

    Raises:
        BadKey: an entry that is not there. BadValue: one of another shape, no attributions.

    Examples:
        >>> from tensordict import TensorDict
        >>> rollout = TensorDict(observation=torch.randn(3, 20, 2), batch_size=[3, 20])
        >>> rollout["attribution", "observation"] = rollout["observation"] ** 2
        >>> sections = rollout_sections(rollout, ["angle, rad", "velocity, rad/s"], shown=[Shown((2,), 5, 15)])
        >>> [section.title for section in sections], sections[0].summary
        (['The rollout', 'Trajectory 2, steps 5 to 14'], [('trajectories', '3'), ('steps', '60')])
    """
    if not isinstance(rollout, TensorDictBase) or not rollout.batch_dims:
        got = "batch_size []" if isinstance(rollout, TensorDictBase) else type(rollout).__name__
        raise BadValue("a rollout is a TensorDict with batch dims, the last of them time", got=got)
    values = _entry(rollout, state)
    if values.shape != (*rollout.batch_size, len(features)):
        needed = f"{[*rollout.batch_size, len(features)]}: a name for each feature"
        raise BadValue(f"the state {key_text(state)}", got=f"shape {list(values.shape)}", needed=needed)
    keys = [as_key(key) for key in attributions] if attributions is not None else _attributions(rollout, values)
    if not keys:
        fix = "explain_rollout(explainer, rollout)"
        raise BadValue("no attributions to show", got=f"{list(rollout.keys(True, True))}", fix=fix)
    parts = [Shown((0,) * (rollout.batch_dims - 1), 0, 200)] if shown is None else list(shown)
    chapters = [_overview(rollout, features, keys)]
    for number, part in enumerate(parts):
        chapters.append(_chapter(rollout, features, as_key(state), keys, actions, part, frames, number))
    return chapters


def write_rollout_page(
    path: str | Path,
    rollout: TensorDictBase,
    features: Sequence[str],
    *,
    title: str = "An explained rollout",
    **more: Any,
) -> Path:
    """Write :func:`rollout_sections` as one self-contained HTML page and return its absolute path.

    Args:
        path: of the page.
        rollout, features: as for :func:`rollout_sections`.
        title: of the page.
        more: ``state``, ``attributions``, ``actions``, ``shown``, ``frames``, as for :func:`rollout_sections`.

    Raises:
        BadKey, BadValue: as there. MissingExtra: matplotlib or jinja2 is not installed.

    Examples:
        >>> import tempfile
        >>> from tensordict import TensorDict
        >>> rollout = TensorDict(observation=torch.randn(20, 2), batch_size=[20])
        >>> rollout["attribution", "observation"] = rollout["observation"] ** 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_rollout_page(f"{folder}/agent.html", rollout, ["angle", "velocity"], title="My agent")
        ...     path.name, path.read_text(encoding="utf-8").count("<img")
        ('agent.html', 2)
    """
    kind = rollout.get(("explanation", "exploration_type"), None)
    word = getattr(kind, "data", kind)
    how = f" The policy ran with the exploration type {word!r} while it was explained." if word is not None else ""
    intro = ["Each step was explained for the action that was logged." + how]
    return write_page(path, title, rollout_sections(rollout, features, **more), intro=intro)


def _overview(rollout: TensorDictBase, features: Sequence[str], keys: Sequence[NestedKey]) -> Section:
    alive = _alive(rollout)
    lengths = alive.sum(-1).flatten()
    summary = [("trajectories", str(len(lengths))), ("steps", f"{int(lengths.sum()):,}")]
    reward = rollout.get(REWARD, None)
    if isinstance(reward, Tensor) and reward.numel() == alive.numel():
        returns = (reward.reshape(alive.shape).cpu().double() * alive).sum(-1)
        summary.append(("mean return", f"{float(returns.mean()):.1f}"))
    rows = []
    for number, feature in enumerate(features):
        sizes = [_entry(rollout, key).cpu().double()[alive][:, number].abs().mean() for key in keys]
        rows.append([feature, *(f"{float(size):.3g}" for size in sizes)])
    table = (["feature", *map(_name, keys)], rows, "Mean size of the attribution over all steps that count.")
    return Section("The rollout", tables=[table], summary=summary)


def _chapter(
    rollout: TensorDictBase,
    features: Sequence[str],
    state: NestedKey,
    keys: Sequence[NestedKey],
    actions: Sequence[str] | None,
    part: Any,
    frames: NestedKey | None,
    number: int,
) -> Section:
    where = tuple(part.trajectory)
    if len(where) != rollout.batch_dims - 1:
        raise BadValue("not a trajectory", got=f"{where}", needed=f"an index for each of {rollout.batch_dims - 1} dims")
    length = int(_alive(rollout)[where].sum())
    start, stop = part.start, min(length, length if part.stop is None else part.stop)
    if not 0 <= start < stop:
        raise BadValue("no steps to show", got=f"{start} to {part.stop}", needed=f"steps of a trajectory of {length}")
    steps = rollout[where][start:stop]
    columns = {"state": _entry(steps, state), **{_name(key): _entry(steps, key) for key in keys}}
    figures = [
        (
            over_time(features, columns, groups=_groups(steps, actions), start=start),
            "The state, and what explains the action.",
        )
    ]
    for key in keys:
        strip = attribution_strip(_entry(steps, key), features, start=start)
        figures.append((strip, f"{_name(key)}: red speaks for the logged action, blue against it."))
    if frames is not None:
        figures.append(_frames(steps, as_key(frames), start))
    title = f"Trajectory {', '.join(map(str, where)) or '0'}, steps {start} to {stop - 1}"
    facts = [f"{stop - start} of the trajectory's {length} steps."]
    importance = getattr(part, "importance", None)
    if importance is not None:
        facts.append(f"Highlight {number + 1}: the importance of step {part.step} is {importance:.3g}.")
    return Section(title, [" ".join(facts)], figures)


def _frames(steps: TensorDictBase, key: NestedKey, start: int) -> tuple[Figure, str]:
    pictures = _entry(steps, key)
    at = torch.linspace(0, len(pictures) - 1, min(12, len(pictures))).round().long()
    heat = steps.get(as_key(join(ATTRIBUTION, key)), None)
    heat = None if heat is None else heat[at]
    figure = frame_strip(pictures[at], heat, titles=[f"step {start + int(i)}" for i in at])
    return figure, "Frames" + (
        " under the size of their attribution: bright is important." if heat is not None else "."
    )


def _groups(steps: TensorDictBase, names: Sequence[str] | None) -> dict[str, Tensor] | None:
    action = steps.get(ACTION, None)
    if not isinstance(action, Tensor) or action.is_floating_point():
        return None
    if action.ndim == 2 and action.shape[-1] > 1:
        if not bool((action.count_nonzero(-1) == 1).all()):
            return None
        action = action.long().argmax(-1)
    action = action.reshape(len(steps)).long()
    count = len(names) if names is not None else int(action.max()) + 1
    if count > _GROUPS or int(action.max()) >= count:
        return None
    return {(names[i] if names else f"action {i}"): action == i for i in range(count)}


def _attributions(rollout: TensorDictBase, values: Tensor) -> list[NestedKey]:
    held = rollout.get(ATTRIBUTION, None)
    if not isinstance(held, TensorDictBase):
        return []
    keys = [as_key(join(ATTRIBUTION, key)) for key in held.keys(True, True)]
    return [key for key in keys if rollout.get(key).shape == values.shape]


def _entry(td: TensorDictBase, key: NestedKey) -> Tensor:
    value = td.get(as_key(key), None)
    if not isinstance(value, Tensor):
        have = list(td.keys(True, True))
        raise BadKey(f"the rollout has no entry {key_text(key)}", got=f"{have}", needed=nearest(key, have))
    return value


def _alive(rollout: TensorDictBase) -> Tensor:
    mask = rollout.get(MASK, None)
    if isinstance(mask, Tensor) and mask.numel() == rollout.batch_size.numel():
        return mask.reshape(rollout.batch_size).bool().cpu()
    return torch.ones(rollout.batch_size, dtype=torch.bool)


def _pictures(frames: Tensor) -> Tensor:
    """``[N, H, W, 3]`` numbers in [0, 1]."""
    value = frames.detach().cpu()
    if value.ndim == 4 and value.shape[-1] not in (1, 3) and value.shape[1] in (1, 3):
        value = value.movedim(1, -1)
    value = value.unsqueeze(-1) if value.ndim == 3 else value
    if value.ndim != 4 or value.shape[-1] not in (1, 3) or not value.numel():
        raise BadValue(
            "not frames", got=f"shape {list(frames.shape)}", needed="[N, H, W, 3], [N, 3, H, W] or [N, H, W]"
        )
    scale = 1.0 if value.is_floating_point() else 255.0
    return (value.double() / scale).clamp(0.0, 1.0).expand(*value.shape[:3], 3)


def _name(key: NestedKey) -> str:
    path = [part for part in join(key) if part != ATTRIBUTION]
    return "attribution" if len(path) < 2 else " ".join(path[:-1])
