"""Small data sets whose concepts and tasks are known: XOR, trigonometry, dot products, a checkmark, digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadType, BadValue, import_extra, nearest
from tdconcepts.hooks.drawing import Source

__all__ = ["SEGMENTS", "ToyData", "digits_data", "toy_data"]

SEGMENTS = ConceptSpec(["top", "upper right", "lower right", "bottom", "lower left", "upper left", "middle"])
# A row for each digit, a column for each segment: what a pocket calculator lights up.
LIT = ["1111110", "0110000", "1101101", "1111001", "0110011", "1011011", "1011111", "1110000", "1111111", "1111011"]


class ToyData(NamedTuple):
    """A data set, its concepts, and what depends on what.

    Args:
        td: ``"observation" [N, F]``, ``"labels" [N, C]`` and ``"task" [N]``, floats.
        concepts: what the columns of the labels mean.
        edges: between concepts, and from concepts to ``"task"``, by name.

    Examples:
        >>> toy_data("checkmark", 5).edges
        [('B', 'C'), ('A', 'task'), ('C', 'task')]
    """

    td: TensorDict
    concepts: ConceptSpec
    edges: Sequence[tuple[str, str]]


def toy_data(
    name: Literal["xor", "trigonometry", "dot", "checkmark"], n: int = 3000, generator: Generator | None = None
) -> ToyData:
    r"""Draw ``n`` rows of a data set.

    ================  ==========================================================================================
    ``xor``           :math:`x \sim U[0,1]^2,\ c_i = [x_i > 0.5],\ y = c_1 \oplus c_2`
    ``trigonometry``  :math:`h \sim N(0, 2^2)^3,\ x = (\sin h_i + h_i, \cos h_i + h_i)_i, \|h\|^2,\ c_i = [h_i > 0],\
                      y = [h_1 + h_2 + h_3 > 1]`
    ``dot``           :math:`u, v \sim N(0, 2^2)^2` independent, :math:`x = (u + v, u - v),\ c_1 = [u_1 + u_2 > 0],\
                      c_2 = [v_1 + v_2 < 0],\ y = [u \cdot v > 0]`
    ``checkmark``     :math:`A, B \sim` fair coins, :math:`C = \neg B,\ D = A \wedge C`,
                      :math:`x = 2 (A, B, C, D) - 1 + 0.1\epsilon`; A, B and C are the concepts, D the task
    ================  ==========================================================================================

    (In torch_concepts 1.0.0a7 the two vectors of ``dot`` are drawn from one seed and are the same, so its task is
    always 1.)

    Args:
        name: the data set.
        n: rows.
        generator: what they are drawn from. Default: torch's own.

    Raises:
        BadValue: for an unknown name, with the nearest, and an ``n`` below 0.

    Source: Espinosa Zarlenga et al., Concept Embedding Models, NeurIPS 2022, appendix A.1 (the first three); Dominici
    et al., Causal Concept Graph Models, ICLR 2025 (checkmark).

    Examples:
        >>> data = toy_data("xor", 100, torch.Generator().manual_seed(0))
        >>> sorted(data.td.keys()), data.concepts.names, data.td["observation"].shape
        (['labels', 'observation', 'task'], ('x1 > 0.5', 'x2 > 0.5'), torch.Size([100, 2]))
    """
    if name not in TOYS:
        raise BadValue("no such data set", got=repr(name), needed=nearest(name, list(TOYS)))
    if type(n) is not int or n < 0:
        raise BadType("not a number of rows", got=repr(n), needed="an int of 0 or more")
    names, edges, draw = TOYS[name]
    x, labels, task = draw(n, Source(generator))
    entries = {"observation": x, "labels": labels.float(), "task": task.float()}
    return ToyData(TensorDict(entries, [n]), ConceptSpec(names), edges)


def digits_data() -> TensorDict:
    """scikit-learn's 1797 bundled digits: ``pixels [N, 64]`` in [0, 1], ``digit [N]``, ``segments [N, 7]`` of 0 and 1.

    ``SEGMENTS`` names the seven concepts.

    Raises:
        MissingExtra: without scikit-learn.

    Examples:
        >>> data = digits_data()
        >>> data["pixels"].shape, data["segments"][data["digit"] == 7][0].tolist()
        (torch.Size([1797, 64]), [1, 1, 1, 0, 0, 0, 0])
    """
    images, digits = import_extra("sklearn.datasets", "probe").load_digits(return_X_y=True)
    digit = torch.from_numpy(digits).long()
    segments = torch.tensor([[int(lit) for lit in row] for row in LIT])
    entries = {"pixels": torch.from_numpy(images).float() / 16, "digit": digit, "segments": segments[digit]}
    return TensorDict(entries, [len(digit)])


def _xor(n: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    x = source.uniform(n, 2)
    c = x > 0.5
    return x, c, c[:, 0] ^ c[:, 1]


def _trigonometry(n: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    h = 2 * source.normal(n, 3)
    waves = torch.stack([h.sin() + h, h.cos() + h], -1).flatten(1)
    return torch.cat([waves, h.square().sum(1, keepdim=True)], 1), h > 0, h.sum(1) > 1


def _dot(n: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    u, v = 2 * source.normal(n, 2), 2 * source.normal(n, 2)
    return torch.cat([u + v, u - v], 1), torch.stack([u.sum(1) > 0, v.sum(1) < 0], 1), (u * v).sum(1) > 0


def _checkmark(n: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (source.uniform(n, 2) < 0.5).unbind(1)
    every = torch.stack([a, b, ~b, a & ~b], 1)
    return 2.0 * every - 1 + 0.1 * source.normal(n, 4), every[:, :3], every[:, 3]


Draw = Callable[[int, Source], tuple[Tensor, Tensor, Tensor]]
TOYS: dict[str, tuple[list[str], list[tuple[str, str]], Draw]] = {
    "xor": (["x1 > 0.5", "x2 > 0.5"], [("x1 > 0.5", "task"), ("x2 > 0.5", "task")], _xor),
    "trigonometry": (
        ["h1 > 0", "h2 > 0", "h3 > 0"],
        [("h1 > 0", "task"), ("h2 > 0", "task"), ("h3 > 0", "task")],
        _trigonometry,
    ),
    "dot": (["u1 + u2 > 0", "v1 + v2 < 0"], [("u1 + u2 > 0", "task"), ("v1 + v2 < 0", "task")], _dot),
    "checkmark": (["A", "B", "C"], [("B", "C"), ("A", "task"), ("C", "task")], _checkmark),
}
