"""What an agent is made of: its networks, also those behind a loss, their stages, and the entries between stages."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import nn

from tdconcepts.errors import BadKey, BadType, nearest
from tdconcepts.hooks.sites import module_paths
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["AgentStages", "Stage", "agent_stages"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One TensorDictModule of a network that holds no other.

    Args:
        network: the network that it belongs to.
        path: its place there, as ``Site(path)`` takes it.
        kind: the class of what it wraps.
        reads: its entries.
        writes: its entries.
        sites: the paths of the layers inside, as a ``Site`` in the network takes them.

    Examples:
        >>> from tdconcepts.rl import cartpole_policy
        >>> stage = agent_stages(cartpole_policy()).stages[0]
        >>> stage.network, stage.path, stage.reads, stage.writes
        ('policy', '0', ('observation',), ('hidden',))
    """

    network: str
    path: str
    kind: str
    reads: tuple[NestedKey, ...]
    writes: tuple[NestedKey, ...]
    sites: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AgentStages(Mapping[str, TensorDictModuleBase]):
    """The networks of an agent by name, and what they are made of.

    Args:
        networks: name -> network; a mapping of these is what this is.
        stages: of all networks, in the order in which they run.

    Examples:
        >>> from tdconcepts.rl import cartpole_policy
        >>> found = agent_stages(cartpole_policy())
        >>> list(found), found.latents
        (['policy'], ['hidden', 'concept', 'logits'])
        >>> found.stages[0].sites, found.writer("concept").path
        (('0.0', '0.1'), '1')
    """

    networks: dict[str, TensorDictModuleBase]
    stages: tuple[Stage, ...]

    def __getitem__(self, name: str) -> TensorDictModuleBase:
        if name not in self.networks:
            raise BadKey(f"no network {name!r}", got=name, needed=nearest(name, list(self.networks)))
        return self.networks[name]

    def __iter__(self) -> Any:
        return iter(self.networks)

    def __len__(self) -> int:
        return len(self.networks)

    @property
    def latents(self) -> list[NestedKey]:
        """The entries that one stage writes and a later stage of the same network reads."""
        found: list[NestedKey] = []
        for number, stage in enumerate(self.stages):
            later = [key for s in self.stages[number + 1 :] if s.network == stage.network for key in s.reads]
            found += [key for key in stage.writes if key in later and key not in found]
        return found

    def writer(self, key: NestedKey, network: str | None = None) -> Stage:
        """The last stage that writes ``key``.

        Raises:
            BadKey: none does.
        """
        key = as_key(key)
        found = [stage for stage in self.stages if key in stage.writes and network in (None, stage.network)]
        if not found:
            known = [written for stage in self.stages for written in stage.writes]
            raise BadKey(f"no stage writes {key_text(key)}", got=key_text(key), needed=nearest(key, known))
        return found[-1]

    def table(self) -> str:
        """The stages as aligned text: network, path, kind, what it reads and writes."""
        head = ("network", "path", "kind", "reads", "writes")
        rows = [
            (
                s.network,
                s.path,
                s.kind,
                *(", ".join(key_text(key).strip("'") for key in keys) for keys in (s.reads, s.writes)),
            )
            for s in self.stages
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        return "\n".join(lines)


def agent_stages(agent: nn.Module) -> AgentStages:
    """The networks and stages of a policy, an actor-critic, or a torchrl loss.

    * A policy is one network, ``"policy"``.
    * ``ActorValueOperator``, ``ActorCriticOperator``, ``ActorCriticWrapper``: ``"agent"`` is all of it, ``"policy"``
      and ``"value"`` are its two ways, each with the shared trunk.
    * A loss hides its networks: they are no submodules of it, only their parameters are. Here they are by the names
      that the loss gives them (``"actor_network"``, ``"qvalue_network"``, ``"value_network"``). Where a loss trains
      several copies (SAC, TD3, REDQ), each is a network, ``"qvalue_network.0"``; target networks are
      ``"target_qvalue_network.0"``. A copy has the loss's live parameters (it shares their memory), so it can be
      explained at any time of the training; the module that the user gave *is* the network where the loss trains that.

    Args:
        agent: the policy or the loss.

    Raises:
        BadType: what has no TensorDictModule in it.

    Examples:
        >>> from tdconcepts.rl import cartpole_policy
        >>> print(agent_stages(cartpole_policy()).table())
        network  path  kind                          reads        writes
        policy   0     Sequential                    observation  hidden
        policy   1     Sequential                    hidden       concept
        policy   2     Linear                        concept      logits
        policy   3     ProbabilisticTensorDictModule  logits       action, action_log_prob
    """
    networks = _networks(agent)
    return AgentStages(networks, tuple(s for name, module in networks.items() for s in _stages(name, module)))


def _networks(agent: nn.Module) -> dict[str, TensorDictModuleBase]:
    if isinstance(agent, TensorDictModuleBase) and not _behind_loss(agent):
        if not hasattr(agent, "get_policy_operator"):
            return {"policy": agent}
        return {"agent": agent, "policy": agent.get_policy_operator(), "value": agent.get_value_operator()}
    found = _behind_loss(agent) if isinstance(agent, nn.Module) else {}
    if not found:
        raise BadType(
            "no agent",
            got=type(agent).__name__,
            needed="a policy that is a TensorDictModule, or a loss of torchrl",
            fix='TensorDictModule(net, ["observation"], ["action"])',
        )
    return found


def _behind_loss(loss: nn.Module) -> dict[str, TensorDictModuleBase]:
    """The networks whose parameters a functional loss holds; of a loss that is not functional, its submodules."""
    networks: dict[str, TensorDictModuleBase] = {}
    for name, child in loss._modules.items():
        held: Any = child
        if isinstance(held, TensorDictModuleBase) and name.endswith("_network"):
            networks[name] = held
        if not (isinstance(held, TensorDictBase) or hasattr(held, "_param_td")) or not name.endswith("_params"):
            continue
        name = name.removesuffix("_params")
        module = getattr(loss, name.removeprefix("target_"), None)
        if not isinstance(module, TensorDictModuleBase):
            continue
        copies = held.batch_size[0] if held.batch_size else None
        if copies is None:
            networks[name] = _holding(module, held)
        for number in range(copies or 0):
            networks[f"{name}.{number}"] = _holding(module, held[number])
    return networks


def _holding(module: TensorDictModuleBase, params: Any) -> TensorDictModuleBase:
    """``module`` if these are its parameters, else a copy of it that shares their memory."""
    own = {key: value for key, value in params.items(True, True) if isinstance(value, torch.Tensor)}
    mine = dict(module.state_dict(keep_vars=True))
    flat = {".".join((key,) if isinstance(key, str) else key): value for key, value in own.items()}
    if all(name in mine and mine[name].data_ptr() == value.data_ptr() for name, value in flat.items()):
        return module
    twin = copy.deepcopy(module)
    for name, value in flat.items():
        path, _, last = name.rpartition(".")
        holder = twin.get_submodule(path)
        if last in holder._parameters:
            holder._parameters[last] = nn.Parameter(value.data, requires_grad=False)
        elif last in holder._buffers:
            holder._buffers[last] = value.data
    return twin


def _stages(network: str, module: TensorDictModuleBase) -> list[Stage]:
    paths = module_paths(module)
    found = []
    for path, inner in paths.items():
        below = [m for m in inner.modules() if m is not inner and isinstance(m, TensorDictModuleBase)]
        if not isinstance(inner, TensorDictModuleBase) or below:
            continue
        layers = (m for m in inner.modules() if m is not inner and not isinstance(m, TensorDictParams))
        held = {id(m) for m in layers if not m._modules}
        wrapped = inner._modules.get("module")
        alone = isinstance(wrapped, nn.Module) and not wrapped._modules  # the stage is the layer, under its own path
        sites = (path,) if alone else tuple(p for p, m in paths.items() if id(m) in held)
        kind = type(wrapped if isinstance(wrapped, nn.Module) else inner).__name__
        reads, writes = (tuple(as_key(key) for key in keys) for keys in (inner.in_keys, inner.out_keys))
        found.append(Stage(network, path, kind, reads, writes, sites))
    return found
