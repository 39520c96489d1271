"""Explained rollouts: one batched call equals the loop over steps; masks, shapes, storage, and the errors."""

import contextlib

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, lazy_stack, pad_sequence
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential, set_interaction_type
from tensordict.nn.probabilistic import interaction_type

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Scale, Site, Target, capture, patch
from tdconcepts.lrp import EpsilonPlus
from tdconcepts.rl.agents import cartpole_policy
from tdconcepts.rl.explaining import RolloutExplainer, explain_rollout
from tdconcepts.rl.rollouts import MASK
from tdconcepts.rl.stages import agent_stages
from tdconcepts.rl.targets import chosen_value
from tdconcepts.rl.times import at_time

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


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_ragged_trajectories(chunk_size, tmp_path):
    pieces = [rollout(3), rollout(5), rollout(1)]
    found = explain_rollout(explainer(), lazy_stack(pieces), chunk_size=chunk_size)
    assert found.batch_size == torch.Size([3, -1])
    for piece, one in zip(pieces, found.unbind(0), strict=True):
        assert torch.equal(one[KEY], 2 * piece["observation"])
        assert one["observation"] is piece["observation"]
        assert one["explanation", "exploration_type"] == "deterministic"
        assert KEY not in piece.keys(True)
    with pytest.raises(BadValue, match="pad_sequence"):
        explain_rollout(explainer(), lazy_stack(pieces), into=tmp_path)
    with pytest.raises(BadValue, match="do not stack into one batch"):
        explain_rollout(explainer(), lazy_stack([lazy_stack(pieces), lazy_stack(pieces)]))


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
    with pytest.raises(BadType, match="a rollout is a TensorDict"):
        explain_rollout(explainer(), td["observation"])
    with pytest.raises(BadKey, match="no mask 'ok'"):
        explain_rollout(explainer(), td, mask="ok")
    td["ok"] = torch.ones(2, 5, 2, dtype=torch.bool)
    with pytest.raises(BadValue, match="one truth value for each step"):
        explain_rollout(explainer(), td, mask="ok")
    with pytest.raises(BadValue, match="chunk size"):
        explain_rollout(explainer(), td, chunk_size=0)
    with pytest.raises(BadValue, match="the last of them time"):
        explain_rollout(explainer(), td[0, 0])


# ------------------------------------------------------------------------------------------ masks, memories and disks


def test_the_usual_masks_are_found():
    td = rollout(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    collected = td.clone().set(MASK, mask)
    padded = pad_sequence([td[0, :3], td[1]], return_mask=True)
    for one in (collected, padded):
        method = explainer()
        found = explain_rollout(method, one)[KEY]
        assert method.module.rows == [8]
        assert (found[0, 3:] == 0).all()
        assert torch.equal(found[mask], 2 * td["observation"][mask])
    method = explainer()
    explain_rollout(method, collected, mask=False)
    assert method.module.rows == [10]
    with pytest.raises(BadType, match="a mask is the key of an entry"):
        explain_rollout(method, td, mask=True)


def memory():
    torch.manual_seed(0)
    first = TensorDictModule(lambda x: torch.tanh(x.cumsum(-2)), ["observation"], ["z"])
    return TensorDictSequential(first, TensorDictModule(torch.nn.Linear(4, 2), ["z"], ["logits"]))


@pytest.mark.parametrize("chunk_size", [None, 5, 12])
def test_trajectories_as_rows(chunk_size):
    policy, td = memory(), rollout(2, 3, 5)
    explain = Gradient(policy, at_time(Target("logits", by="action"), 3), wrt="observation")
    found = explain_rollout(explain, td, unit="trajectory", chunk_size=chunk_size)[KEY]
    assert torch.allclose(found, explain(td.copy())[KEY])
    assert (found[..., 4, :] == 0).all()
    td[MASK] = torch.ones(2, 3, 5, dtype=torch.bool)
    td[MASK][0, 1, 2:] = False
    masked = explain_rollout(explain, td, unit="trajectory", chunk_size=chunk_size)[KEY]
    assert (masked[0, 1, 2:] == 0).all()
    assert torch.equal(masked[td[MASK]], found[td[MASK]])
    ragged = lazy_stack([td[0, 0], td[0, 2, :4]])
    again = explain_rollout(explain, ragged, unit="trajectory", mask=False)
    assert torch.allclose(again[1][KEY], found[0, 2, :4], atol=1e-6)
    with pytest.raises(BadValue, match="not a unit"):
        explain_rollout(explain, td, unit="episode")


def test_recurrent_modules_run_in_the_mode_of_the_unit():
    modules = pytest.importorskip("torchrl.modules")
    torch.manual_seed(0)
    lstm = modules.LSTMModule(input_size=4, hidden_size=6, in_key="observation", out_key="z")
    policy = TensorDictSequential(lstm, TensorDictModule(torch.nn.Linear(6, 2), ["z"], ["logits"]))
    td = rollout(2, 3, 5).set("is_init", torch.zeros(2, 3, 5, 1, dtype=torch.bool))
    for state in ("recurrent_state_h", "recurrent_state_c"):
        td[state] = torch.zeros(2, 3, 5, 1, 6)
    whole = Gradient(policy, at_time(Target("logits", 0), 3), wrt="observation")
    found = explain_rollout(whole, td, unit="trajectory")[KEY]
    assert (found[..., :4, :] != 0).any(-1).all()
    assert (found[..., 4, :] == 0).all()
    steps = Gradient(policy, Target("logits", 0), wrt="observation")
    alone = explain_rollout(steps, td)[KEY]
    with modules.set_recurrent_mode(True):
        assert torch.equal(explain_rollout(steps, td)[KEY], alone)
    assert torch.allclose(alone[..., 3:4, :], explain_rollout(steps, td[..., 3:4])[KEY])


def test_results_on_disk(tmp_path):
    td = rollout(4, 5)
    td[MASK] = torch.ones(4, 5, dtype=torch.bool)
    td[MASK][3, 1:] = False
    td.memmap(tmp_path / "rollout")
    stored = TensorDict.load_memmap(tmp_path / "rollout")
    found = explain_rollout(explainer(), stored, chunk_size=3, into=tmp_path / "why", fill=-1.0)
    expected = torch.where(td[MASK].unsqueeze(-1), 2 * td["observation"], -1.0)
    assert torch.equal(found[KEY], expected)
    assert torch.equal(TensorDict.load_memmap(tmp_path / "why")[KEY], expected)
    both = TensorDictSequential(explainer(), TensorDictModule(Calls(), ["observation"], [("attribution", "other")]))
    found = explain_rollout(both, stored, into=tmp_path / "both", mask=False)
    for key in both.out_keys:
        assert torch.equal(TensorDict.load_memmap(tmp_path / "both" / "-".join(key))[key], 2 * td["observation"])


def test_saliency_of_8_by_500_steps_equals_the_loop_over_steps():
    policy, td = cartpole_policy(), rollout(8, 500)
    with set_interaction_type(InteractionType.RANDOM):
        policy(td)
    found = explain_rollout(Gradient(policy, Target("logits", by="action"), wrt="observation"), td)[KEY]
    net = torch.nn.Sequential(*(policy[i].module for i in range(3)))
    for i in range(8):
        for t in range(500):
            x = td["observation"][i, t].clone().requires_grad_()
            (slow,) = torch.autograd.grad(net(x)[td["action"][i, t]], x)
            assert torch.allclose(found[i, t], slow, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- with torchrl


def parts():
    return pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")


def value_actor():
    modules, data = parts()
    torch.manual_seed(0)
    net = modules.MLP(4, 2, num_cells=[8])
    return modules.QValueActor(net, in_keys=["observation"], spec=data.Categorical(2))


@pytest.mark.filterwarnings("ignore:split_trajs=True:UserWarning")
def test_after_a_collector_and_in_a_policy():
    collectors, envs = pytest.importorskip("torchrl.collectors"), pytest.importorskip("torchrl.envs")
    modules, _ = parts()
    actor = value_actor()
    explain = Gradient(actor, chosen_value(), wrt="observation")
    noisy = TensorDictSequential(actor, modules.EGreedyModule(eps_init=0.5, eps_end=0.5, spec=actor.spec["action"]))
    make = lambda: envs.GymEnv("CartPole-v1", categorical_action_encoding=True)  # noqa: E731
    counts = {"frames_per_batch": 40, "total_frames": 40, "auto_register_policy_transforms": False}
    after = collectors.Collector(make, noisy, split_trajs=True, postproc=RolloutExplainer(explain), **counts)
    during = collectors.Collector(make, TensorDictSequential(noisy, explain), **counts)
    for collector in (after, during):
        (batch,) = list(collector)
        collector.shutdown()
        counted = batch.get(MASK, torch.ones(batch.batch_size, dtype=torch.bool))
        assert batch["action"][counted].ne(batch["action_value"][counted].argmax(-1)).any()
        expected = explain(batch[counted].select("observation", "action"))[KEY]
        torch.testing.assert_close(batch[KEY][counted], expected)
        assert (batch[KEY][~counted] == 0).all()
        assert not batch[KEY].requires_grad


def test_as_a_transform_of_a_replay_buffer():
    _, data = parts()
    actor, td = value_actor(), rollout(30)
    explain = Gradient(actor, chosen_value(), wrt="observation")
    buffer = data.TensorDictReplayBuffer(storage=data.LazyTensorStorage(30), batch_size=16)
    buffer.append_transform(RolloutExplainer(explain))
    buffer.extend(td)
    sample = buffer.sample()
    assert sample[KEY].abs().sum() > 0
    with torch.no_grad():
        actor.module[0].module[0].weight.mul_(2.0)  # the next sample is explained with the policy as it is now
    sample = buffer.sample()
    assert torch.equal(sample[KEY], explain(sample.select("observation", "action"))[KEY])


def continuous():
    modules, data = parts()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), modules.NormalParamExtractor())
    actor = modules.ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=modules.TanhNormal,
        return_log_prob=True,
        spec=data.Bounded(-1, 1, (2,)),
    )
    q = modules.MLP(6, 1, num_cells=[8])
    critic = modules.ValueOperator(lambda_module(q), in_keys=["observation", "action"])
    return actor, critic, modules.ValueOperator(torch.nn.Linear(4, 1), in_keys=["observation"])


class lambda_module(torch.nn.Module):  # noqa: N801
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def transitions(action):
    td = rollout(12).set("action", action)
    zero = torch.zeros(12, 1)
    td["next", "reward"], td["next", "done"], td["next", "terminated"] = zero + 1.0, zero.bool(), zero.bool()
    return td


@pytest.mark.parametrize("kind", ["PPO", "DQN", "SAC"])
def test_what_is_left_on_does_not_break_training(kind):
    """A capture and a patch that changes nothing, a rule and an explainer, all left open around a real loss."""
    objectives = pytest.importorskip("torchrl.objectives")

    def updated(loss):
        objectives.SoftUpdate(loss, tau=0.1)
        return loss

    def loss_of():
        if kind == "DQN":
            actor = value_actor()
            return actor, updated(objectives.DQNLoss(actor, delay_value=True)), torch.ones(12).long()
        actor, critic, value = continuous()
        if kind == "SAC":
            return actor, updated(objectives.SACLoss(actor, critic)), torch.zeros(12, 2)
        loss = objectives.ClipPPOLoss(actor, value)
        loss.make_value_estimator(objectives.ValueEstimators.GAE, gamma=0.9, lmbda=0.9)
        return actor, loss, torch.zeros(12, 2)

    def gradients(contexts):
        actor, loss, action = loss_of()
        td = transitions(action)
        if kind == "PPO":
            td["action_log_prob"] = torch.zeros(12)
        with contextlib.ExitStack() as stack:
            for context in contexts(actor, loss):
                stack.enter_context(context)
            torch.manual_seed(1)
            out = loss(td.clone())
            sum(value for key, value in out.items() if key.startswith("loss")).backward()
        return [p.grad.clone() for p in loss.parameters() if p.grad is not None]

    def left_on(actor, loss):
        networks = agent_stages(loss)
        explain = Gradient(actor, Target("action_value", 0) if kind == "DQN" else Target("loc", 0))
        explain_rollout(explain, rollout(2, 3))
        yield capture(actor, "0.0")
        yield patch(actor, {Site("0.0"): Scale(1.0)})
        yield EpsilonPlus().on(actor)
        for name, network in networks.items():
            if network is not actor:
                yield capture(network, "**")
                yield EpsilonPlus().on(network) if name.startswith("target") else contextlib.nullcontext()

    plain, hooked = gradients(lambda *_: []), gradients(left_on)
    assert len(plain) == len(hooked) > 0
    assert all(one.isfinite().all() for one in hooked)
    after = gradients(lambda *_: [])
    for one, other in zip(plain, after, strict=True):
        assert torch.equal(one, other)
    same = gradients(lambda actor, loss: [capture(actor, "0.0"), patch(actor, {Site("0.0"): Scale(1.0)})])
    for one, other in zip(plain, same, strict=True):
        torch.testing.assert_close(one, other)
