"""What a stage has learned: buffers for each entry, that state dicts carry to stages which are not fitted."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tdconcepts.errors import BadValue

__all__ = ["Learned"]


class Learned(nn.Module):
    """Holds a named tuple of tensors for each of several entries, as buffers ``name_i``.

    Subclasses name the tuple's fields, and are TensorDictModules.
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = tuple(f"{prefix}{name}_" for name in self.learns)
        for key, value in state_dict.items():
            own = key.removeprefix(prefix)
            if key.startswith(names) and own.rpartition("_")[2].isdigit() and isinstance(value, Tensor):
                held = self._buffers.get(own)
                if held is None or held.shape != value.shape:
                    self._buffers[own] = torch.empty_like(value)
        super()._load_from_state_dict(state_dict, prefix, *args)
