"""torchrl: agents, rollouts and returns. Importing this room does not import torchrl; using an environment does."""

from tdconcepts.rl.agents import cartpole_env, cartpole_policy, ppo_cartpole
from tdconcepts.rl.counterfactual import counterfactual, restore_state
from tdconcepts.rl.distributional import distribution_mean, distribution_quantile
from tdconcepts.rl.episodes import episode_returns
from tdconcepts.rl.explaining import RolloutExplainer, explain_rollout
from tdconcepts.rl.factors import Factor, FactorTest, factor_test
from tdconcepts.rl.faithfulness import Partial, ReturnCurves, return_curves
from tdconcepts.rl.importance import Highlight, StateImportance, highlights
from tdconcepts.rl.influence import PolicyGradient, SquaredError, TracIn
from tdconcepts.rl.marking import Marked, check_marked
from tdconcepts.rl.objectives import ConceptObjective
from tdconcepts.rl.observing import edit_observation
from tdconcepts.rl.references import CARTPOLE_CONCEPTS, cartpole_concepts, concept_cartpole, dqn_cartpole, ppo_pendulum
from tdconcepts.rl.returns import Returns, compare_returns
from tdconcepts.rl.rewards import RewardDifference
from tdconcepts.rl.rollouts import rollout_episodes
from tdconcepts.rl.saliency import Greydanus, Sarfa, Spots, object_saliency
from tdconcepts.rl.specs import concept_spec, concepts_composite
from tdconcepts.rl.stages import AgentStages, Stage, agent_stages
from tdconcepts.rl.sverl import Hidden, Sverl, sverl_outcome
from tdconcepts.rl.targets import advantage, chosen_value, contrast, entropy, log_prob, probability, state_value
from tdconcepts.rl.temporal import TemporalProbe
from tdconcepts.rl.times import at_time
from tdconcepts.rl.toys import lstm_recall, meeting_env, multiagent_meeting, recall_env
from tdconcepts.rl.training import TrainedAgent, gym_envs

__all__ = [
    "CARTPOLE_CONCEPTS",
    "AgentStages",
    "ConceptObjective",
    "Factor",
    "FactorTest",
    "Greydanus",
    "Hidden",
    "Highlight",
    "Marked",
    "Partial",
    "PolicyGradient",
    "ReturnCurves",
    "Returns",
    "RewardDifference",
    "RolloutExplainer",
    "Sarfa",
    "Spots",
    "SquaredError",
    "Stage",
    "StateImportance",
    "Sverl",
    "TemporalProbe",
    "TracIn",
    "TrainedAgent",
    "advantage",
    "agent_stages",
    "at_time",
    "cartpole_concepts",
    "cartpole_env",
    "cartpole_policy",
    "check_marked",
    "chosen_value",
    "compare_returns",
    "concept_cartpole",
    "concept_spec",
    "concepts_composite",
    "contrast",
    "counterfactual",
    "distribution_mean",
    "distribution_quantile",
    "dqn_cartpole",
    "edit_observation",
    "entropy",
    "episode_returns",
    "explain_rollout",
    "factor_test",
    "gym_envs",
    "highlights",
    "log_prob",
    "lstm_recall",
    "meeting_env",
    "multiagent_meeting",
    "object_saliency",
    "ppo_cartpole",
    "ppo_pendulum",
    "probability",
    "recall_env",
    "restore_state",
    "return_curves",
    "rollout_episodes",
    "state_value",
    "sverl_outcome",
]
