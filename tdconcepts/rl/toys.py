"""Two toy tasks with reference agents: a cue to be remembered (LSTM), and agents that must meet (MultiAgentMLP)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn

from tdconcepts.errors import BadValue, import_extra
from tdconcepts.rl.episodes import episode_returns
from tdconcepts.rl.training import Keeper, TrainedAgent, check_seed

__all__ = ["MEETING_STEPS", "lstm_recall", "meeting_env", "multiagent_meeting", "recall_env"]

MEETING_STEPS, RECALL_WIDTH = 20, 32
Progress = Callable[[str, float, str], None]


def recall_env(num_envs: int = 16, *, delay: int = 6, seed: int | None = None) -> Any:
    r"""A cue is shown at the first step; after ``delay`` steps of noise the action must name it.

    ``observation`` ``[*B, 3]``: the cue (-1 or 1 at the first step, then 0), noise (standard normal), and whether this
    is the step that counts. ``is_init`` ``[*B, 1]``: whether it is the first. ``action`` ``[*B]``: 0 or 1. ``reward``
    ``[*B, 1]``: 1 at the last step if the action is the cue's (1 for a positive cue), -1 if not, else 0. An episode
    has ``delay + 2`` steps. The recurrent state of the reference agent is carried from step to step:
    ``"recurrent_state_h"`` and ``"recurrent_state_c"`` ``[*B, 1, 32]``.

    Args:
        num_envs: how many side by side; 16 by default.
        delay: steps between the cue and the question; 6 by default.
        seed: of cues and noise.

    Raises:
        MissingExtra: torchrl is not installed. BadValue: no environments, a negative delay.

    Examples:
        >>> from tdconcepts import rl
        >>> td = rl.recall_env(4, delay=2, seed=0).rollout(10)
        >>> td["next", "done"][0, :, 0].tolist()
        [False, False, False, True]
    """
    if any(type(n) is not int for n in (num_envs, delay)) or num_envs < 1 or delay < 0:
        raise BadValue("no such environments", got=f"num_envs={num_envs}, delay={delay}", needed="1 or more, 0 or more")
    envs, data = import_extra("torchrl.envs", "rl"), import_extra("torchrl.data", "rl")
    state = data.Unbounded((1, RECALL_WIDTH))
    primer = envs.TensorDictPrimer(
        recurrent_state_h=state, recurrent_state_c=state.clone(), expand_specs=True, default_value=0.0
    )
    return envs.TransformedEnv(_classes()["RecallEnv"](num_envs, delay, seed), primer)


def lstm_recall(seed: int = 0, *, delay: int = 6, updates: int = 300, progress: Progress | None = None) -> TrainedAgent:
    """Train an LSTM policy on :func:`recall_env` by the exact gradient of the expected return.

    ``observation -> embedding -> LSTM -> memory -> logits -> action``, with the recurrent state under
    ``"recurrent_state_h"`` and ``"recurrent_state_c"``. The expected return of a sequence of observations is
    differentiable here, because actions change nothing but the reward: E[R] = 2 p(right) - 1.

    Args:
        seed: of the weights and the sequences.
        delay: steps between the cue and the question.
        updates: of 64 sequences each; 300 by default, it stops earlier when all of 64 judged episodes are right.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Raises:
        MissingExtra: torchrl is not installed. BadValue: no updates.

    Source: Hochreiter and Schmidhuber 1997 for the task (long time lags).

    Examples:
        >>> from tdconcepts import rl
        >>> rl.lstm_recall(seed=0).mean_return
        1.0
    """
    modules = import_extra("torchrl.modules", "rl")
    _check_updates(updates)
    env = recall_env(64, delay=delay, seed=check_seed(seed) + 1_000_000)
    keeper = Keeper(
        lambda policy: episode_returns(env, policy, range(seed, seed + 64), max_steps=delay + 2),
        lambda episodes: bool(episodes.get("return").min() == 1),
        progress,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lstm = modules.LSTMModule(input_size=16, hidden_size=RECALL_WIDTH, in_key="embedding", out_key="memory")
        policy = ProbabilisticTensorDictSequential(
            TensorDictModule(nn.Sequential(nn.Linear(3, 16), nn.Tanh()), ["observation"], ["embedding"]),
            lstm,
            TensorDictModule(nn.Linear(RECALL_WIDTH, 2), ["memory"], ["logits"]),
            ProbabilisticTensorDictModule(
                ["logits"],
                ["action"],
                distribution_class=torch.distributions.Categorical,
                default_interaction_type=InteractionType.DETERMINISTIC,
            ),
        )
        optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3)
        steps = delay + 2
        for update in range(updates):
            cue, observation = _sequences(64, delay)
            td = TensorDict(
                {"observation": observation, "is_init": torch.zeros(64, steps, 1, dtype=torch.bool)},
                batch_size=[64, steps],
            )
            td.get("is_init")[:, 0] = True
            with modules.set_recurrent_mode(True):
                for stage in list(policy)[:-1]:
                    td = stage(td)
            right = td.get("logits")[:, -1].softmax(-1).gather(-1, cue[:, None])
            optimiser.zero_grad()
            (-(2 * right - 1).mean()).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimiser.step()
            if (update % 20 == 19 or update == updates - 1) and keeper.look(
                (update + 1) * 64 * steps, (update + 1) / updates, policy
            ):
                break
    return keeper.agent(seed)


def meeting_env(num_envs: int = 32, *, agents: int = 3, seed: int | None = None) -> Any:
    r"""Agents on a line that must meet: the reward is minus their spread, and each is moved by its own action.

    ``("agents", "observation")`` ``[*B, N, 2]``: the agent's place, and the mean place of the others;
    ``("agents", "action")`` ``[*B, N, 1]`` within [-1, 1]: a tenth of it is added to the place. ``reward`` ``[*B, 1]``:
    :math:`-\frac1N \sum_i |x_i - \bar x|` after the move, shared. An episode has 20 steps. It is differentiable.

    Args:
        num_envs: how many side by side; 32 by default.
        agents: N, 3 by default.
        seed: of the places, uniform in [-1, 1].

    Raises:
        MissingExtra: torchrl is not installed. BadValue: no environments, fewer than two agents.

    Examples:
        >>> from tdconcepts import rl
        >>> rl.meeting_env(4, agents=2, seed=0).rollout(30)["agents", "observation"].shape
        torch.Size([4, 20, 2, 2])
    """
    if any(type(n) is not int for n in (num_envs, agents)) or num_envs < 1 or agents < 2:
        raise BadValue("no such environments", got=f"num_envs={num_envs}, agents={agents}", needed="1 and 2 or more")
    return _classes()["MeetingEnv"](num_envs, agents, seed)


def multiagent_meeting(
    seed: int = 0, *, agents: int = 3, share_params: bool = True, updates: int = 150, progress: Progress | None = None
) -> TrainedAgent:
    """Train agents to meet (:func:`meeting_env`) by the gradient of the return through the environment.

    ``("agents", "observation") -> ("agents", "concept") -> ("agents", "action")``, both stages a ``MultiAgentMLP``.

    Args:
        seed: of the weights and the places.
        agents: how many.
        share_params: whether all agents have one network, or one each.
        updates: episodes of 32 environments; 150 by default, it stops earlier at a mean return above -1.5.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Raises:
        MissingExtra: torchrl is not installed. BadValue: no updates.

    Source: analytic policy gradients as in torchrl's pendulum tutorial; parameter sharing as in Gupta et al. 2017.

    Examples:
        >>> from tdconcepts import rl
        >>> rl.multiagent_meeting(seed=0).mean_return > -2  # unmoved agents have about -8
        True
    """
    modules = import_extra("torchrl.modules", "rl")
    _check_updates(updates)
    check_seed(seed)
    env, judges = meeting_env(32, agents=agents, seed=seed), meeting_env(32, agents=agents, seed=seed + 1_000_000)
    keeper = Keeper(
        lambda policy: episode_returns(judges, policy, range(seed, seed + 32), max_steps=MEETING_STEPS),
        lambda episodes: bool(episodes.get("return").mean() > -1.5),
        progress,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = functools.partial(
            modules.MultiAgentMLP,
            n_agents=agents,
            centralized=False,
            share_params=share_params,
            depth=1,
            num_cells=16,
            activation_class=nn.Tanh,
        )
        head = network(n_agent_inputs=16, n_agent_outputs=1)
        policy = TensorDictSequential(
            TensorDictModule(
                network(n_agent_inputs=2, n_agent_outputs=16), [("agents", "observation")], [("agents", "concept")]
            ),
            TensorDictModule(nn.Sequential(head, nn.Tanh()), [("agents", "concept")], [("agents", "action")]),
        )
        optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
        for update in range(updates):
            rollout = env.rollout(MEETING_STEPS, policy)
            optimiser.zero_grad()
            (-rollout.get(("next", "reward")).mean()).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimiser.step()
            if (update % 25 == 24 or update == updates - 1) and keeper.look(
                (update + 1) * 32 * MEETING_STEPS, (update + 1) / updates, policy
            ):
                break
    return keeper.agent(seed)


def _check_updates(updates: int) -> None:
    if type(updates) is not int or updates < 1:
        raise BadValue("no updates to train with", got=f"updates={updates}", needed="at least one")


def _sequences(count: int, delay: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Cues ``[count]`` as classes, and what is observed ``[count, delay + 2, 3]``."""
    cue = torch.randint(0, 2, (count,), generator=generator)
    observation = torch.zeros(count, delay + 2, 3)
    observation[:, 0, 0] = 2.0 * cue - 1.0
    observation[:, :, 1] = torch.randn(count, delay + 2, generator=generator)
    observation[:, -1, 2] = 1.0
    return cue, observation


def __getattr__(name: str) -> Any:  # so that the classes are found where a pickle names them
    if name in ("RecallEnv", "MeetingEnv"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _classes() -> dict[str, type]:
    """The environments' classes, made when torchrl is wanted."""
    base: Any = import_extra("torchrl.envs", "rl").EnvBase
    data = import_extra("torchrl.data", "rl")

    class Toy(base):
        """What both share: done flags, and a generator for each environment."""

        _batch_locked = True

        def __init__(self, num_envs: int, seed: int | None) -> None:
            super().__init__(batch_size=torch.Size([num_envs]))
            flag = data.Binary(1, shape=(num_envs, 1), dtype=torch.bool)
            self.done_spec = data.Composite(done=flag, terminated=flag.clone(), shape=(num_envs,))
            self.reward_spec = data.Unbounded((num_envs, 1))
            self.generator = torch.Generator().manual_seed(0 if seed is None else seed)

        def _set_seed(self, seed: int | None) -> None:
            self.generator.manual_seed(0 if seed is None else seed)

        def _flags(self, done: Tensor) -> dict[str, Tensor]:
            flag = done.reshape(-1, 1).expand(*self.batch_size, 1).clone()
            return {"done": flag, "terminated": flag.clone()}

    class RecallEnv(Toy):
        """See :func:`recall_env`."""

        def __init__(self, num_envs: int, delay: int, seed: int | None) -> None:
            super().__init__(num_envs, seed)
            self.delay = delay
            self.observation_spec = data.Composite(
                observation=data.Unbounded((num_envs, 3)),
                is_init=data.Binary(1, shape=(num_envs, 1), dtype=torch.bool),
                shape=(num_envs,),
            )
            self.action_spec = data.Categorical(2, shape=(num_envs,))

        def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
            count = self.batch_size[0]
            self.cue, self.shown = _sequences(count, self.delay, self.generator)
            self.time = 0
            return self._state(torch.ones(count, 1, dtype=torch.bool), torch.tensor(False))

        def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
            last = self.time == self.delay + 1
            right = tensordict.get("action").reshape(-1) == self.cue
            reward = (2.0 * right.float() - 1.0).unsqueeze(-1) * float(last)
            self.time = min(self.time + 1, self.delay + 1)
            first = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
            return self._state(first, torch.tensor(last)).set("reward", reward)

        def _state(self, first: Tensor, done: Tensor) -> TensorDict:
            entries = {"observation": self.shown[:, self.time].clone(), "is_init": first}
            return TensorDict(entries | self._flags(done), batch_size=self.batch_size)

    class MeetingEnv(Toy):
        """See :func:`meeting_env`."""

        def __init__(self, num_envs: int, agents: int, seed: int | None) -> None:
            super().__init__(num_envs, seed)
            self.agents = agents
            self.observation_spec = data.Composite(
                agents=data.Composite(observation=data.Unbounded((num_envs, agents, 2)), shape=(num_envs, agents)),
                shape=(num_envs,),
            )
            self.action_spec = data.Composite(
                agents=data.Composite(action=data.Bounded(-1.0, 1.0, (num_envs, agents, 1)), shape=(num_envs, agents)),
                shape=(num_envs,),
            )

        def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
            self.place = 2.0 * torch.rand(*self.batch_size, self.agents, generator=self.generator) - 1.0
            self.time = 0
            return self._state(torch.tensor(False))

        def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
            self.place = self.place + 0.1 * tensordict.get(("agents", "action")).squeeze(-1)
            self.time += 1
            spread = (self.place - self.place.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True)
            return self._state(torch.tensor(self.time >= MEETING_STEPS)).set("reward", -spread)

        def _state(self, done: Tensor) -> TensorDict:
            others = (self.place.sum(-1, keepdim=True) - self.place) / (self.agents - 1)
            seen = TensorDict(
                {"observation": torch.stack([self.place, others], -1)}, batch_size=[*self.batch_size, self.agents]
            )
            return TensorDict({"agents": seen} | self._flags(done), batch_size=self.batch_size)

    for found in (RecallEnv, MeetingEnv):
        found.__qualname__ = found.__name__
    return {"RecallEnv": RecallEnv, "MeetingEnv": MeetingEnv}
