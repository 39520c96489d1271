"""What would have happened: another action at one step of a logged episode, from the simulator's true state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.keys import NestedKey, as_key, join, key_text
from tdconcepts.rl.episodes import Policy, check_env, done_key, interaction, seeded_reset, wrapped_env

__all__ = ["Restore", "counterfactual", "restore_state"]

Restore: TypeAlias = Literal["set_state", "replay", "unwrapped"]

_CLOSE = 1e-5  # what float32 logs of a float64 simulator leave open, relative


def counterfactual(
    env: Any,
    episode: TensorDictBase,
    step: int,
    actions: Tensor | Sequence[Any],
    policy: Policy,
    *,
    seed: int | None = None,
    restore: Restore | None = None,
    state_key: NestedKey = "observation",
    max_steps: int = 1000,
    greedy: bool = True,
) -> TensorDictBase:
    """Put the environment back to a step of a logged episode, take other actions there, and let the policy go on.

    The simulator is really put back (:func:`restore_state`), and checked: the logged action is one of the branches, and
    has to lead to the logged next state. (``rollout(auto_reset=False, tensordict=step)`` of a Gym environment does
    *not* do that: it echoes the logged observation, while the simulator goes on from wherever it was.)

    | reads | gives |
    |---|---|
    | ``episode`` ``[T]``: observations, ``action``, ``("next", ...)`` | batch ``[1 + A]``, the logged action first: |
    | | ``"action"``; ``"return"`` (undiscounted, from ``step`` on), ``"length"``, ``"finished"``; |
    | | ``"difference"``: to the logged action's return; ``"rollout"`` ``[1 + A, T']`` with its mask |

    Args:
        env: a torchrl environment. A vectorised gymnasium one plays as many branches at a time as it has slots.
        episode: one logged episode, ``[T]``.
        step: of the episode, counted from the end where negative.
        actions: the other actions, ``[A, ...]``.
        policy: goes on after ``step``; state of its own (a memory) is taken from the log.
        seed: of the episode's start, for ``"replay"``.
        restore: how; default: the first way that the environment has. See :func:`restore_state`.
        state_key: for ``"unwrapped"``, the entry that holds the simulator's state.
        max_steps: a branch is cut after so many steps.
        greedy: act deterministically after the branch (the default), or sample, with the same torch seed for each.

    Raises:
        BadValue: a step that is not in the episode, no actions, no way to restore the state, or a state that is not
            restored exactly. BadKey: a log without actions or next states.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.rl import cartpole_env, rollout_episodes
        >>> lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
        >>> env = cartpole_env(2)
        >>> log = rollout_episodes(env, lean, seeds=[0, 1])
        >>> found = counterfactual(env, log[0], 20, 1 - log[0, 20:21]["action"], lean, seed=0)
        >>> found["action"].tolist() == [log[0, 20]["action"].item(), 1 - log[0, 20]["action"].item()]
        True
    """
    length = _checked(episode, env)
    if not -length <= step < length:
        raise BadValue("no such step", got=f"step={step}", needed=f"a step of an episode of {length}")
    step %= length
    logged = episode.get(env.action_key)[step]
    others = actions if isinstance(actions, Tensor) else torch.as_tensor(actions)
    if not len(others) or others.shape[1:] != logged.shape:
        needed = f"[A, *{list(logged.shape)}], A >= 1"
        raise BadValue("not the other actions", got=f"shape {list(others.shape)}", needed=needed)
    specs = getattr(env, "full_action_spec_unbatched", None)
    rounded = not logged.is_floating_point() and bool((others.to(logged) != others).any())
    if rounded or (specs is not None and not specs[env.action_key].is_in(others.to(logged))):
        raise BadValue("not actions of this environment", got=others.tolist(), needed="actions of env.action_spec")
    branches = torch.cat([logged.unsqueeze(0), others.to(logged)])
    width, found = max(1, env.batch_size.numel()), []
    for start in range(0, len(branches), width):
        part = branches[start : start + width]
        padded = torch.cat([part, part[-1:].expand(width - len(part), *part.shape[1:])])
        td = restore_state(env, episode, step, seed=seed, restore=restore, state_key=state_key)
        for key in getattr(policy, "in_keys", []):
            if td.get(key, None) is None and episode.get(key, None) is not None:
                td.set(key, _spread(episode.get(key)[step], env))
        with torch.no_grad(), interaction(greedy), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if seed is None else seed)
            found.append(_played(env, td, padded, policy, max_steps)[: len(part)])
    longest = max(one.get("rollout").batch_size[1] for one in found)
    result: Any = torch.cat([_padded(one, longest) for one in found])
    _same_as_logged(result.get("rollout")[0, 0], episode, step, env, "the logged action leads elsewhere")
    return result.set("difference", result.get("return") - result.get("return")[0])


def restore_state(
    env: Any,
    episode: TensorDictBase,
    step: int,
    *,
    seed: int | None = None,
    restore: Restore | None = None,
    state_key: NestedKey = "observation",
) -> TensorDictBase:
    """Put the simulator into the state that it had at a step of a logged episode; what it then observes.

    * ``"set_state"``: the environment can be told its state (torchrl's own, stateless ones): exact.
    * ``"replay"``: ``seed`` starts the episode again, and the logged actions before ``step`` are taken again: exact
      where the environment is a function of its seed, which is checked observation by observation.
    * ``"unwrapped"``: gymnasium's classic control keeps ``unwrapped.state``, which is set from ``state_key``. Exact up
      to the log's rounding; where the observation is *not* the state (Acrobot, Pendulum) it is refused, unless
      ``state_key`` holds it.

    Args:
        env, episode, step, seed, restore, state_key: as for :func:`counterfactual`.

    Returns:
        What the environment observes there, of its batch size.

    Raises:
        BadValue: there is no way to do it exactly.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.rl import cartpole_env, rollout_episodes
        >>> lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
        >>> env = cartpole_env(1)
        >>> log = rollout_episodes(env, lean, seeds=[7])[0]
        >>> torch.equal(restore_state(env, log, 5, seed=7)["observation"][0], log[5]["observation"])
        True
    """
    length = _checked(episode, env)
    if not 0 <= step < length:
        raise BadValue("no such step", got=f"step={step}", needed=f"a step of an episode of {length}")
    ways = {
        "set_state": bool(getattr(env, "_supports_set_state", False)),
        "replay": seed is not None,
        "unwrapped": bool(_simulators(env)) and env.batch_size.numel() in (0, 1, len(_simulators(env))),
    }
    way = restore if restore is not None else next((name for name, there in ways.items() if there), None)
    if way not in ways or not ways[way]:
        raise BadValue(
            "the state of this environment can't be restored" if restore is None else f"no way {restore!r} here",
            got=f"{type(env).__name__}, seed={seed}",
            needed="an environment with set_state, or the seed of the episode, or gymnasium's classic control",
            fix="seed=, the one that the episode was started with",
        )
    with torch.no_grad():
        if way == "set_state":
            state = TensorDict({}, batch_size=env.batch_size)
            for key in episode.keys(True, True):
                if join(key)[0] != "next" and isinstance(episode.get(key), Tensor):
                    state.set(key, _spread(episode.get(key)[step], env))
            td = env.reset(state, set_state=True)
        elif way == "replay":
            td = _replayed(env, episode, step, int(seed or 0))
        else:
            td = _told(env, episode, step, as_key(state_key))
    return td


def _replayed(env: Any, episode: TensorDictBase, step: int, seed: int) -> TensorDictBase:
    td = seeded_reset(env, [seed] * max(1, env.batch_size.numel()))
    for at in range(step):
        _same(td, episode, at, env, exact=True)
        td.set(env.action_key, _spread(episode.get(env.action_key)[at], env))
        td = env.step_and_maybe_reset(td)[1]
    _same(td, episode, step, env, exact=True)
    return td


def _told(env: Any, episode: TensorDictBase, step: int, key: NestedKey) -> TensorDictBase:
    held = episode.get(key, None)
    if held is None:
        raise BadKey(f"no entry {key_text(key)} with the state", got=f"{list(episode.keys(True, True))}")
    state = held[step].detach().cpu().double().numpy()
    simulators, before = _simulators(env), episode.get(env.action_key)[:step]
    td = env.reset()

    def put() -> None:
        for simulator in simulators:
            inner = simulator.unwrapped
            own = getattr(inner, "state", None)
            if own is None or len(own) != state.size or state.ndim != 1:
                raise BadValue(
                    "the entry does not hold the simulator's state",
                    got=f"{key_text(key)} of shape {list(held.shape[1:])}, a state of {0 if own is None else len(own)}",
                    needed="the same numbers",
                    fix="seed=, to replay the episode, or state_key=",
                )
            inner.state = state.copy()
            for name, value in (("steps_beyond_terminated", None), ("_elapsed_steps", len(before))):
                for wrapper in _wrappers(simulator):
                    if name in vars(wrapper):
                        setattr(wrapper, name, value)

    _check_clock(env)
    put()
    trial = td.copy()
    trial.set(env.action_key, _spread(episode.get(env.action_key)[step], env))
    _same_as_logged(env.step(trial), episode, step, env, "the state that was set is not the simulator's")
    put()
    for name in _observed(env, episode):
        td.set(name, _spread(episode.get(name)[step], env))
    return td


def _played(env: Any, td: TensorDictBase, actions: Tensor, policy: Policy, max_steps: int) -> TensorDictBase:
    width, done_at = len(actions), join("next", done_key(env))
    alive, total = torch.ones(width, dtype=torch.bool), torch.zeros(width, dtype=torch.float64)
    steps, masks = [], []
    for number in range(max_steps):
        td = (
            td.set(env.action_key, actions.reshape((*env.batch_size, *actions.shape[1:]))) if not number else policy(td)
        )
        td, following = env.step_and_maybe_reset(td)
        reward, done = td.get(join("next", env.reward_key)).cpu(), td.get(done_at).cpu()
        if reward.numel() != width or done.numel() != width:
            got = f"reward {list(reward.shape)}, done {list(done.shape)} for {width} environments"
            raise BadValue("the return needs one reward and one done flag for each environment", got=got)
        keys = [k for k in (*_observed(env, td), env.action_key, env.reward_key) if td.get(k, None) is not None]
        seen = td.select(*keys, "next", strict=False).reshape(width).clone()
        steps.append(seen.select(*keys, *(join("next", k) for k in (*keys, done_at[1:])), strict=False))
        masks.append(alive)
        total += torch.where(alive, reward.reshape(-1).double(), 0.0)
        alive = alive & ~done.reshape(-1)
        if not alive.any():
            break
        td = following
    rollout: Any = torch.stack(steps, 1)
    mask = torch.stack(masks, 1)
    rollout.set(("collector", "mask"), mask)
    return TensorDict(
        {"action": actions, "return": total, "length": mask.sum(1), "finished": ~alive, "rollout": rollout}, [width]
    )


def _padded(branches: Any, length: int) -> TensorDictBase:
    """The branches' steps up to ``length``: the last is repeated, and does not count."""
    rollout: Any = branches.get("rollout")
    short = length - rollout.shape[1]
    if short:
        rollout = torch.cat([rollout, *([rollout[:, -1:]] * short)], 1)
        mask = rollout.get(("collector", "mask")).clone()
        mask[:, length - short :] = False
        rollout.set(("collector", "mask"), mask)
    found: TensorDictBase = branches.copy().set("rollout", rollout)
    return found


def _checked(episode: TensorDictBase, env: Any) -> int:
    check_env(env)
    if not isinstance(episode, TensorDictBase) or episode.ndim != 1:
        got = f"batch_size {list(episode.batch_size)}" if isinstance(episode, TensorDictBase) else repr(type(episode))
        raise BadType("one logged episode is a TensorDict of batch [T]", got=got, fix="rollout[0]")
    for key in (env.action_key, "next"):
        if episode.get(key, None) is None:
            raise BadKey(f"the episode has no {key_text(key)}", got=f"entries {list(episode.keys(True, True))}")
    return len(episode)


def _observed(env: Any, td: TensorDictBase) -> list[NestedKey]:
    """The environment's observations that the log has."""
    keys = [as_key(key) for key in env.observation_spec.keys(True, True)]
    return [key for key in keys if isinstance(td.get(key, None), Tensor)]


def _same(td: TensorDictBase, episode: TensorDictBase, step: int, env: Any, exact: bool) -> None:
    for key in _observed(env, episode):
        here, there = td.get(key), _spread(episode.get(key)[step], env).to(td.get(key))
        near = torch.equal(here, there) if exact else bool(torch.isclose(here, there, rtol=_CLOSE, atol=_CLOSE).all())
        if not near:
            raise BadValue(
                "the episode is not the one that this seed starts" if exact else "the state is another",
                got=f"{key_text(key)} at step {step} is off by {float((here - there).abs().max()):.3g}",
                needed="an environment that repeats its episodes for a seed, and that episode's seed",
            )


def _same_as_logged(td: TensorDictBase, episode: TensorDictBase, step: int, env: Any, what: str) -> None:
    """After the logged action the next state has to be the logged one."""
    for key in _observed(env, episode):
        here, there = td.get(join("next", key)), episode.get(join("next", key), None)
        if there is None:
            raise BadKey(f"the episode has no {key_text(join('next', key))}", needed="the logged next states")
        there = there[step].to(here).expand_as(here)
        if not torch.allclose(here, there, rtol=_CLOSE, atol=_CLOSE):
            raise BadValue(
                what,
                got=f"{key_text(key)} after step {step} is off by {float((here - there).abs().max()):.3g}",
                needed="the logged next state",
                fix="seed=, to replay the episode, or the environment that it was logged in",
            )


def _spread(value: Tensor, env: Any) -> Tensor:
    """One row for each slot of the environment."""
    return value.expand((*env.batch_size, *value.shape)).clone()


def _simulators(env: Any) -> list[Any]:
    """The gymnasium environments with a settable state, one for each slot."""
    held = wrapped_env(env)
    found = list(getattr(held, "envs", [])) or [held]
    return found if all(hasattr(getattr(one, "unwrapped", None), "state") for one in found) else []


def _wrappers(simulator: Any) -> list[Any]:
    found = [simulator]
    while "env" in vars(found[-1]):
        found.append(found[-1].env)
    return found


def _check_clock(env: Any) -> None:
    """Refuse transforms that count steps: only a replay counts them again."""
    transform = getattr(env, "transform", None)
    for one in [] if transform is None else getattr(transform, "transforms", [transform]):
        if hasattr(one, "step_count_key"):
            raise BadValue(
                "a StepCounter can't be put back", got=type(one).__name__, fix="seed=, to replay the episode"
            )
