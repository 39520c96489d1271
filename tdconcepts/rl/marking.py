"""Marks: proof in the data that a worker ran the policy that was meant, interventions included."""

from __future__ import annotations

import re
import zlib
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import check_module, check_td, dispatch_rows
from tdconcepts.keys import INTERVENTION, NestedKey, check_writable

__all__ = ["MARK", "Marked", "check_marked"]

MARK: NestedKey = (INTERVENTION, "mark")
_FOREIGN = {"torch", "tensordict", "torchrl"}  # whose settings are no interventions
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Marked(TensorDictModuleBase):
    r"""A policy that writes at every step which interventions it ran under, wherever it runs.

    The mark is a checksum of the policy's structure and of the programs and edits in it, not of its weights, so it
    stays while the policy learns. It is computed where the policy runs, from what has arrived there: a worker that got
    the policy without its interventions writes another mark.

    | reads | writes |
    |---|---|
    | what the policy reads | what the policy writes, ``("intervention", "mark")`` ``[*B]``, int64 |

    Args:
        policy: a TensorDictModule: ``patch(policy, {...})``, ``intervene(policy, ...)``, any other.

    Raises:
        BadType: for a bare ``nn.Module``.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tdconcepts import Ablate, patch, rl
        >>> policy = rl.cartpole_policy(8)
        >>> acting = Marked(patch(policy, {"concept": Ablate([3])}))
        >>> td = acting(TensorDict(observation=torch.zeros(2, 4), batch_size=[2]))
        >>> check_marked(td, acting)  # the collector's batch; a policy without the patch has another mark
        >>> acting.mark == Marked(policy).mark
        False
    """

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = check_module(policy, "policy")
        self.in_keys = list(policy.in_keys)
        self.out_keys = [*policy.out_keys, MARK]
        check_writable([MARK], self.in_keys)

        self.mark = _checksum(self.policy)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark = _checksum(self.policy)  # of what has arrived

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the policy, and write the mark."""
        check_td(tensordict)
        out = self.policy(tensordict)
        return out.set(MARK, torch.full(out.batch_size, self.mark, dtype=torch.int64, device=out.device))


def check_marked(data: TensorDictBase, acting: Marked) -> None:
    """Raise where a step of collected data was not made by this policy with its interventions.

    Args:
        data: a rollout or a collector's batch.
        acting: the marked policy, as it was given to the collector.

    Raises:
        BadKey: the data has no marks. BadValue: some step has another mark; says how many.

    Examples:
        >>> from tdconcepts import Ablate, patch, rl
        >>> policy = rl.cartpole_policy(8)
        >>> acting = rl.Marked(patch(policy, {"concept": Ablate([3])}))
        >>> check_marked(rl.cartpole_env(2, seed=0).rollout(3, acting), acting)
    """
    if not isinstance(data, TensorDictBase):
        raise BadType("not data", got=type(data).__name__, needed="a TensorDict")
    marks = data.get(MARK)
    if marks is None:
        raise BadKey(
            "the data has no marks",
            got=f"entries {list(data.keys())}",
            needed="steps of a marked policy",
            fix="Collector(env, Marked(policy), ...)",
        )
    wrong = int((marks != acting.mark).sum())
    if wrong:
        raise BadValue(
            "steps were made by another policy, or without its interventions",
            got=f"{wrong} of {marks.numel()} steps with another mark",
            needed=f"the mark {acting.mark} everywhere",
            fix="give the workers the marked policy itself, and make a new collector after changing an intervention",
        )


def _checksum(policy: TensorDictModuleBase) -> int:
    return zlib.crc32("\n".join(_described(policy)).encode())


def _described(module: Any) -> list[str]:
    """A line for each module: what it is and reads and writes, and how ours and the caller's own are set."""
    lines = []
    for path, child in module.named_modules():
        keys = f"{getattr(child, 'in_keys', '')} {getattr(child, 'out_keys', '')}"
        lines.append(f"{path} {type(child).__qualname__} {child.extra_repr()} {keys}")
        if type(child).__module__.split(".")[0] not in _FOREIGN:
            settings = {name: value for name, value in vars(child).items() if name[0] != "_" and name != "training"}
            settings |= {name: value.tolist() for name, value in child.named_buffers(recurse=False)}
            lines += [f"{path} {name} {_ADDRESS.sub('', repr(settings[name]))}" for name in sorted(settings)]
    return lines
