"""The world of the conformance table: the model and data that every row is built in, and what a row says.

A new method adds a row to ``rows/<room>.py``, a few lines that build it in a :class:`World`, and gets all the laws of
``test_conformance.py``. Where a law can't hold, the row says so, with the reason:
``row("patch with the batch's mean", ..., rows="the mean is over the batch")``.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from tdconcepts import Target

N = 5  # rows that a world has
DRAWS = 3  # of noise


class Fuse(nn.Module):
    """A layer that raises at its ``left + 1``-th call, to see what an error in the middle leaves behind."""

    left: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Fuse.left is not None:
            Fuse.left -= 1
            if Fuse.left < 0:
                raise ZeroDivisionError("the fuse blew")
        return x


class Shift(nn.Module):
    """A layer with a buffer, and with an operation that is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(-0.2, 0.2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.shift)


class World:
    """A model, and the entries that rows read: the same for each world with the same arguments.

    The model is ``observation [4] -> hidden [5] -> concepts [3] -> logits [3]``, with an in-place ReLU, a buffer, and
    modules in both modes. ``w("logits")`` is a key, a nested one where the world is ``nested``; ``w.chunk`` are the
    options that bound the rows in flight.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        nested: bool = False,
        chunk: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.dtype, self.nested, self.device = dtype, nested, device
        self.chunk: dict[str, Any] = {} if chunk is None else {"chunk_size": chunk}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), Shift())
            bottleneck = nn.Sequential(nn.Linear(5, 3), nn.Sigmoid())
            head = nn.Sequential(nn.Linear(3, 6), Fuse(), nn.GELU(), nn.Dropout(), nn.Linear(6, 3)).eval()
            self.model = TensorDictSequential(
                TensorDictModule(body, [self("observation")], [self("hidden")]),
                TensorDictModule(bottleneck, [self("hidden")], [self("concepts")]),
                TensorDictModule(head, [self("concepts")], [self("logits")]),
            ).to(device, dtype)
            self.body, self.bottleneck, self.head = body, bottleneck, head
            self.entries = {
                self("observation"): torch.randn(N, 4).to(dtype),
                self("action"): torch.randint(0, 3, (N,)),
                self("labels"): torch.randint(0, 2, (N, 3)),
                self("donor"): torch.randn(N, 6).to(dtype),
                self("latent"): torch.randn(N, 4).to(dtype),
                self("concepts"): torch.rand(N, 3).to(dtype),
                self("concepts_logits"): torch.randn(N, 3).to(dtype),
                self("observation", group="baseline"): torch.randn(N, 4).to(dtype),
                self("hidden", group="baseline"): torch.randn(N, 5).to(dtype),
                self("observation", group="noise"): torch.randn(N, DRAWS, 4).to(dtype),
                self("observation", group="clean"): torch.randn(N, 4).to(dtype),
                self("observation", group="corrupt"): torch.randn(N, 4).to(dtype),
                self("observation", group="base"): torch.randn(N, 4).to(dtype),
                self("observation", group="source"): torch.randn(N, 4).to(dtype),
            }

    def __call__(self, name: str, group: str | None = None) -> Any:
        """The key of an entry, in a group such as ``"baseline"`` or not: a nested one in a nested world."""
        path = (*([group] if group else []), *(["agents"] if self.nested else []), name)
        return path if len(path) > 1 else name

    @property
    def generator(self) -> torch.Generator:
        """A new generator, always from the same seed."""
        return torch.Generator(self.device).manual_seed(7)

    def td(self, batch: tuple[int, ...] = (N,), rows: slice | int = slice(None)) -> TensorDict:
        """The first rows of the world under a batch size, and entries that nobody reads."""
        count = int(torch.tensor(batch).prod()) if batch else 1
        td = TensorDict({}, batch_size=batch)
        for key, value in self.entries.items():
            some = value[rows] if isinstance(rows, int) else value[rows][:count]
            td.set(key, some.clone().reshape((*batch, *value.shape[1:])).to(self.device))
        td.set("other", torch.ones(*batch, 2))
        td.set(("group", "other"), torch.zeros(batch))
        td.set_non_tensor("note", "a word")
        return td


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: of the test; it starts with the name that it is about.
        make: builds the module in a world; a context is given back unentered, and entered for each law.
        chunks: whether ``make`` passes ``w.chunk`` on.
        anchors: sites to anchor before compiling.
        exempt: laws (the part of the test's name after ``test_``) that can't hold, with the reason.
    """

    name: str
    make: Callable[[World], Any]
    chunks: bool = False
    anchors: tuple[str, ...] = ()
    exempt: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def opened(self, world: World) -> Iterator[TensorDictModuleBase]:
        """The module, inside its context if it is one."""
        made = self.make(world)
        with made if hasattr(made, "__enter__") else contextlib.nullcontext(made) as module:
            yield module


def explainer(name: str, make: Callable[[World], Any], *anchors: str, **exempt: str) -> Row:
    return Row(name, make, chunks=True, anchors=anchors, exempt=exempt)


def row(name: str, make: Callable[[World], Any], **exempt: str) -> Row:
    return Row(name, make, exempt=exempt)


STREAM = "one stream of random numbers serves the whole batch"
DIFFERENTIABLE = "its results are part of the model and keep its graph, as they must for training"
GRAPH = "create_graph=True asks for the graph"
TENSORDICTS = "the first stage is tensordict's own module, which has its own errors"
GENERATOR = "torch.compile can't trace a torch.Generator"
RANDOM32 = "the draws are float32 in every model"
DATA_DEPENDENT = "masks become numbers of groups, which a graph can't hold"
GROUPS = torch.tensor([0, 0, 1, 2])

argmax = lambda w: Target(w("logits"), "argmax")  # noqa: E731


def seeded(cls: type[nn.Module], w: World, *args: Any, **options: Any) -> nn.Module:
    """A module with parameters that are the same in every world."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return cls(*args, **options).to(w.device, w.dtype)
