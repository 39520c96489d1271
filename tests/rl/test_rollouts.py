"""Explained rollouts: one batched call equals the loop over steps; masks, shapes, storage, and the errors."""

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, lazy_stack
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from tensordict.nn.probabilistic import interaction_type

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.rl.agents import cartpole_policy
from tdconcepts.rl.rollouts import MASK, explain_rollout, rollout_episodes

KEY = ("attribution", "observation")


class Calls(torch.nn.Module):
    """Twice the observation; counts the calls, their rows and the interaction type."""

    def __init__(self):
        super().__init__()
        self.rows, self.kinds = [], []

    def forward(self, observation):
        self.rows.append(len(observation))
        self.kinds.append(interaction_type())
        return 2 * observation


def explainer():
    return TensorDictModule(Calls(), ["observation"], [KEY])


def rollout(*batch):
    generator = torch.Generator().manual_seed(0)
    td = TensorDict({"observation": torch.randn(*batch, 4, generator=generator)}, batch_size=batch)
    td["action"] = torch.zeros(*batch, dtype=torch.int64)
    td["next", "observation"] = td["observation"] + 1
    return td


@pytest.mark.parametrize("batch", [(5,), (2, 5), (2, 3, 5), (2, 0)])
def test_one_call_for_any_number_of_batch_dims(batch):
    method, td = explainer(), rollout(*batch)
    found = explain_rollout(method, td)
    assert len(method.module.rows) == 1
    assert found.batch_size == td.batch_size
    assert torch.equal(found[KEY], 2 * td["observation"])


def test_the_rollout_is_left_alone_and_its_tensors_are_shared():
    td = rollout(2, 5)
    keys = set(td.keys(True, True))
    found = explain_rollout(explainer(), td)
    assert set(td.keys(True, True)) == keys
    assert found["observation"].data_ptr() == td["observation"].data_ptr()
    again = explain_rollout(TensorDictModule(Calls(), ["observation"], [("attribution", "other")]), found)
    assert KEY in again.keys(True)
    assert ("attribution", "other") not in found.keys(True)


def test_chunks_do_not_change_the_result_and_bound_the_rows():
    method, td = explainer(), rollout(3, 5)
    assert torch.equal(explain_rollout(method, td, chunk_size=4)[KEY], explain_rollout(explainer(), td)[KEY])
    assert method.module.rows == [4, 4, 4, 3]


@pytest.mark.parametrize("last", [(), (1,)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_masked_steps_are_not_computed(last, chunk_size):
    method, td = explainer(), rollout(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    td["observation"][~mask] = float("nan")
    td["ok"] = mask.reshape(2, 5, *last)
    found = explain_rollout(method, td, mask="ok", chunk_size=chunk_size)[KEY]
    assert torch.equal(found[mask], 2 * td["observation"][mask])
    assert (found[~mask] == 0).all()
    assert sum(method.module.rows) == int(mask.sum())
    assert 0 not in method.module.rows
    assert explain_rollout(method, td, mask="ok", fill=float("nan"))[KEY][~mask].isnan().all()


def test_all_steps_masked_out():
    td = rollout(2, 3)
    td["ok"] = torch.zeros(2, 3, dtype=torch.bool)
    assert (explain_rollout(explainer(), td, mask="ok")[KEY] == 0).all()


@pytest.mark.parametrize("kind", [InteractionType.DETERMINISTIC, InteractionType.MEAN])
def test_the_exploration_type_is_set_and_recorded(kind):
    method = explainer()
    with set_interaction_type(InteractionType.RANDOM):
        found = explain_rollout(method, rollout(2, 3), exploration_type=kind)
    assert method.module.kinds == [kind]
    assert found["explanation", "exploration_type"] == kind.name.lower()
    assert explain_rollout(method, rollout(2, 3))["explanation", "exploration_type"] == "deterministic"


def test_locked_memory_mapped_and_lazily_stacked_rollouts(tmp_path):
    td = rollout(2, 5)
    expected = 2 * td["observation"]
    assert torch.equal(explain_rollout(explainer(), td.clone().lock_())[KEY], expected)
    td.memmap(tmp_path)
    assert torch.equal(explain_rollout(explainer(), TensorDict.load_memmap(tmp_path), chunk_size=3)[KEY], expected)
    lazy = lazy_stack(list(td.unbind(0)))
    assert isinstance(lazy, LazyStackedTensorDict)
    assert torch.equal(explain_rollout(explainer(), lazy)[KEY], expected)


def test_ragged_trajectories_say_how_to_pad():
    ragged = lazy_stack([rollout(3), rollout(5)])
    with pytest.raises(BadValue, match="pad_sequence"):
        explain_rollout(explainer(), ragged)


def test_the_logged_action_is_explained_not_a_new_one():
    policy, td = cartpole_policy(8), rollout(2, 50)
    with set_interaction_type(InteractionType.RANDOM):
        policy(td)
    assert 0 < int((td["action"] != td["logits"].argmax(-1)).sum()) < 100
    found = explain_rollout(Gradient(policy, Target("logits", by="action"), wrt="observation"), td)
    for i in range(2):
        for t in range(50):
            x = td["observation"][i, t].clone().requires_grad_()
            logits = policy[2].module(policy[1].module(policy[0].module(x)))
            (slow,) = torch.autograd.grad(logits[td["action"][i, t]], x)
            assert torch.allclose(found[KEY][i, t], slow, atol=1e-6)
    for key in td.keys(True, True):
        assert torch.equal(found[key], td[key])


def test_a_latent_is_explained_by_wrt():
    policy, td = cartpole_policy(8), rollout(2, 5)
    found = explain_rollout(Gradient(policy, Target("logits", by="action"), wrt="concept"), td)
    assert torch.allclose(found["attribution", "concept"], policy[2].module.weight.detach()[td["action"]])


def test_bad_input():
    td = rollout(2, 5)
    with pytest.raises(BadType, match="the explainer is not a TensorDictModule"):
        explain_rollout(torch.nn.Linear(4, 2), td)
    with pytest.raises(BadKey, match="no entry 'observation', which the explainer reads"):
        explain_rollout(explainer(), td.exclude("observation"))
    with pytest.raises(BadKey, match="no mask 'ok'"):
        explain_rollout(explainer(), td, mask="ok")
    td["ok"] = torch.ones(2, 5, 2, dtype=torch.bool)
    with pytest.raises(BadValue, match="one truth value for each step"):
        explain_rollout(explainer(), td, mask="ok")
    with pytest.raises(BadValue, match="chunk_size"):
        explain_rollout(explainer(), td, chunk_size=0)
    with pytest.raises(BadValue, match="the last of them time"):
        explain_rollout(explainer(), td[0, 0])


# ----------------------------------------------------------------------------------------------------- with torchrl


def test_rollout_episodes_masks_the_first_episode(env):
    lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
    from tdconcepts.rl import episode_returns

    td = rollout_episodes(env, lean, seeds=range(8))
    lengths = episode_returns(env, lean, range(8))["length"]
    assert td[MASK].sum(-1).tolist() == lengths.tolist()
    assert td.batch_size == torch.Size([8, int(lengths.max())])
    assert td["next", "done"].squeeze(-1)[torch.arange(8), lengths - 1].all()
    assert not td["observation"].requires_grad
    assert torch.equal(td["observation"], rollout_episodes(env, lean, seeds=range(8))["observation"])
    assert rollout_episodes(env, lean, max_steps=3).batch_size == torch.Size([8, 3])
    with pytest.raises(BadValue, match="8 seeds"):
        rollout_episodes(env, lean, seeds=range(3))


def test_rollout_episodes_of_one_environment():
    GymEnv = pytest.importorskip("torchrl.envs").GymEnv  # noqa: N806

    lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
    td = rollout_episodes(GymEnv("CartPole-v1", categorical_action_encoding=True), lean, seeds=[1])
    assert td.ndim == 1
    assert td[MASK].all()
    assert td["next", "done"][-1].all()
