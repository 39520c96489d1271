"""What a stage has learned: buffers for each entry, that state dicts carry to stages which are not fitted; its use."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from tensordict import TensorDictBase
from tensordict.nn import set_skip_existing
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.hooks import check_td, dispatch_rows
from tdconcepts.hooks.calling import missing_entries
from tdconcepts.keys import NestedKey, as_key, as_keys, check_writable, join, key_text
from tdconcepts.representations.reading import check_keys

__all__ = ["Learned"]


class Learned(nn.Module):
    """Holds a named tuple of tensors for each of several entries, as buffers ``name_i``.

    Subclasses name the tuple's fields, and are TensorDictModules. One that writes an entry for each says so by
    :meth:`about`, and by :meth:`readout` what it writes; its fields have a ``mean``, whose shape is the rows' width.
    """

    learns: ClassVar[tuple[str, ...]]

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` has run, or a state was loaded."""
        return f"{self.learns[0]}_0" in self._buffers

    def check_fitted(self) -> None:
        """Raise where there is nothing yet.

        Raises:
            BadValue: before the first fit.
        """
        if not self.fitted:
            raise BadValue(f"{type(self).__name__} is not fitted", needed="a fit", fix=".fit(data)")

    def keep(self, i: int, values: Any) -> Self:
        """Hold the tensors of the i-th entry."""
        for name, value in zip(self.learns, values, strict=True):
            self._buffers.pop(f"{name}_{i}", None)
            self.register_buffer(f"{name}_{i}", value.detach().clone())
        return self

    def kept(self, i: int) -> list[Tensor]:
        """The tensors of the i-th entry."""
        return [self.get_buffer(f"{name}_{i}") for name in self.learns]

    def about(self, keys: NestedKey | list[NestedKey], out_key: NestedKey) -> None:
        """Read ``keys``, and write an entry for each."""
        self.keys = check_keys(as_keys(keys))
        self.in_keys = list(self.keys)
        self.out_keys = [as_key(join(out_key, key)) for key in self.keys]
        self._written = list(self.out_keys)  # select_out_keys changes those
        check_writable(self.out_keys, self.in_keys)

    def place(self, key: NestedKey | None) -> int:
        """The number of an entry; without a key of the only one."""
        self.check_fitted()
        if key is None and len(self.keys) == 1:
            return 0
        if key is None or as_key(key) not in self.keys:
            raise BadKey("which of the entries?", got=repr(key), needed=nearest(key, self.keys))
        return self.keys.index(as_key(key))

    def sources(self, i: int) -> list[NestedKey]:
        """The entries that the i-th is made of."""
        return [self.keys[i]]

    def readout(self, x: list[Tensor], kept: list[Tensor]) -> Tensor:
        """What is written, from the sources ``[*B, F]`` and what was learned of them."""
        raise NotImplementedError

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write what is read out of each entry."""
        check_td(tensordict)
        self.check_fitted()
        missing = [key for key in self.in_keys if tensordict.get(key) is None]
        if missing:
            raise missing_entries(missing, tensordict)
        found = []
        for i in range(len(self.keys)):
            x = [tensordict.get(key) for key in self.sources(i)]
            for key, value, width in zip(self.sources(i), x, self.get_buffer(f"mean_{i}").shape, strict=True):
                if value.shape[-1:] != (width,):
                    got, needed = list(value.shape), f"[*B, {width}]"
                    raise BadValue(f"{key_text(key)} has another width than was fitted", got=got, needed=needed)
            found.append(self.readout(x, [tensor.to(x[0]) for tensor in self.kept(i)]))
        for out_key, value in zip(self._written, found, strict=True):
            tensordict.set(out_key, value)
        return tensordict

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = tuple(f"{prefix}{name}_" for name in self.learns)
        for key, value in state_dict.items():
            own = key.removeprefix(prefix)
            if key.startswith(names) and own.rpartition("_")[2].isdigit() and isinstance(value, Tensor):
                held = self._buffers.get(own)
                if held is None or held.shape != value.shape:
                    self._buffers[own] = torch.empty_like(value)
        super()._load_from_state_dict(state_dict, prefix, *args)
