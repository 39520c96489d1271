"""torchrl: agents, rollouts and returns. Importing this room does not import torchrl; using an environment does."""

from tdconcepts.rl.agents import TrainedAgent, cartpole_env, cartpole_policy, ppo_cartpole
from tdconcepts.rl.episodes import episode_returns
from tdconcepts.rl.returns import Returns, compare_returns
from tdconcepts.rl.rollouts import explain_rollout, rollout_episodes

__all__ = [
    "Returns",
    "TrainedAgent",
    "cartpole_env",
    "cartpole_policy",
    "compare_returns",
    "episode_returns",
    "explain_rollout",
    "ppo_cartpole",
    "rollout_episodes",
]
