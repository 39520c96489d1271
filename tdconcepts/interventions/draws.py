"""Strategies that draw: from a distribution, or another row's concepts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.distributions import Categorical, Distribution

from tdconcepts.errors import BadType, BadValue
from tdconcepts.interventions.spaces import Space, as_space, is_visible, written
from tdconcepts.interventions.stages import ConceptStage, in_kind

__all__ = ["FromDistribution", "Resample", "check_generator", "drawing_from"]


class FromDistribution(ConceptStage):
    """Writes a draw: concept ~ p, anew for every row and at every call.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "value")``                 ``[*B, C]``
    =======  ============================================  ===========

    Args:
        distribution: one for all columns (of batch shape ``[]``), one for the whole block (of batch or event shape
            ``[C]``), or a list with one for each concept, of shape ``[]`` for one column or event shape ``[n]`` for n.
            The states of a ``Categorical`` become one-hot columns; two states are the labels of a binary concept.
        reparameterised: whether the draws keep a gradient to the distribution's parameters (``rsample``). Default:
            False, ``sample``.
        generator: where the draws come from; the global generator is then left as it was. Default: the global one.
        space: None (default) or ``"continuous"``: a draw is written as it is. Else a draw is a label, and is converted
            to what the entry holds, as in :class:`~tdconcepts.interventions.Do`.

    Raises:
        BadType: for something else than distributions.
        BadValue: for a distribution without ``rsample`` that is to be reparameterised; draws that are not ``C`` wide;
            draws that ``vmap`` can't make (with ``randomness="different"``: from a generator, or reparameterised).

    Examples:
        >>> from torch.distributions import Bernoulli, Normal
        >>> draw = FromDistribution([Bernoulli(0.5), Normal(0.0, 1.0)], generator=torch.Generator().manual_seed(0))
        >>> draw(concepts=torch.zeros(4, 2)).shape
        torch.Size([4, 2])
        >>> FromDistribution(Bernoulli(1.0), space="logits")(concepts=torch.zeros(2))
        tensor([9.21..., 9.21...])
    """

    writes = "value"
    misses = False

    def __init__(
        self,
        distribution: Distribution | Sequence[Distribution],
        *,
        reparameterised: bool = False,
        generator: torch.Generator | None = None,
        space: Space | None = None,
    ) -> None:
        each = [distribution] if isinstance(distribution, Distribution) else distribution
        if not isinstance(each, Sequence) or not each or not all(isinstance(one, Distribution) for one in each):
            raise BadType("not a distribution", got=repr(distribution), needed="torch.distributions, one or a list")
        without = [type(one).__name__ for one in each if reparameterised and not one.has_rsample]
        if without:
            needed = "distributions with rsample"
            raise BadValue(
                "draws without a gradient", got=", ".join(without), needed=needed, fix="reparameterised=False"
            )
        super().__init__()
        self.distribution = distribution if isinstance(distribution, Distribution) else tuple(distribution)
        self.reparameterised, self.generator, self.space = reparameterised, check_generator(generator), as_space(space)

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        lead = concepts.shape[:-1]
        try:
            with drawing_from(self.generator):
                if isinstance(self.distribution, tuple):
                    drawn = torch.cat([self._block(one, lead) for one in self.distribution], dim=-1)
                elif isinstance(self.distribution, Categorical) and not self.distribution.batch_shape:
                    drawn = self._states(self.distribution, concepts)
                else:
                    whole = len(self.distribution.batch_shape + self.distribution.event_shape)
                    drawn = self._draw(self.distribution, lead if whole else concepts.shape)
        except RuntimeError as error:
            if is_visible(concepts) or "vmap" not in str(error):
                raise
            how = (
                "from a generator" if self.generator is not None else "reparameterised" if self.reparameterised else ""
            )
            needed = 'vmap(..., randomness="same")' + ("" if how else ' or "different"')
            got, fix = f"draws {how} under vmap".replace("  ", " "), "all rows at once in a batch, without vmap"
            raise BadValue("vmap can't make these draws", got=got, needed=needed, fix=fix) from error
        if drawn.shape != concepts.shape:
            got, needed = f"draws of shape {list(drawn.shape)}", f"{list(concepts.shape)}"
            raise BadValue("the distribution does not fit the concepts", got=got, needed=needed)
        drawn = in_kind(drawn, concepts)
        if self.space in (None, "continuous"):
            return drawn
        return written(drawn, concepts, self.splice, self.space, "the draws")

    def _states(self, one: Categorical, concepts: Tensor) -> Tensor:
        """One-hot columns for each concept of so many states; two states of a binary concept are its labels."""
        n, columns = one.probs.shape[-1], concepts.shape[-1]
        sizes = set(self.splice.cardinalities or [1 if n == 2 else n])
        if sizes == {1} and n == 2:
            return self._draw(one, concepts.shape)
        if sizes != {n} or columns % n:
            got, fix = f"a Categorical of {n} states", "a list with a distribution for each concept"
            needed = f"concepts of {n} states each, in {columns} columns"
            raise BadValue("the distribution does not fit the concepts", got=got, needed=needed, fix=fix)
        drawn = self._draw(one, torch.Size([*concepts.shape[:-1], columns // n]))
        return torch.nn.functional.one_hot(drawn, n).flatten(-2).to(one.probs)

    def _block(self, one: Distribution, lead: torch.Size) -> Tensor:
        drawn = self._draw(one, lead)
        if isinstance(one, Categorical) and drawn.shape == lead:
            return torch.nn.functional.one_hot(drawn, one.probs.shape[-1]).to(one.probs)
        return drawn.unsqueeze(-1) if drawn.shape == lead else drawn

    def _draw(self, one: Distribution, shape: torch.Size) -> Tensor:
        return one.rsample(shape) if self.reparameterised else one.sample(shape)


class Resample(ConceptStage):
    """Writes the concepts of another row, drawn with replacement: what they would be, whatever this row shows.

    ``value[i] = concepts[j], j ~ U{j != i}``; with a ``pool``, ``value[i] = pool[j], j ~ U{1..M}``.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "value")``                 ``[*B, C]``
    =======  ============================================  ===========

    Args:
        pool: rows to draw from ``[M, C]``, of a data set, in the entry's own units. Default: the batch itself, of which
            all leading dims are rows.
        per_concept: whether each concept comes from a row of its own, which also breaks the concepts' correlations.
        generator: where the draws come from. Default: the global generator.

    Raises:
        BadType: for a pool that is no tensor.
        BadValue: for a batch of one row without a pool, and a pool of another width, or without rows.

    Source: resampling ablation: Chan et al., Causal Scrubbing, 2022.

    Examples:
        >>> Resample()(concepts=torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[3.0, 4.0], [1.0, 2.0]]
        >>> Resample(pool=torch.tensor([[5.0, 6.0]]))(concepts=torch.zeros(2)).tolist()
        [5.0, 6.0]
    """

    writes = "value"

    def __init__(
        self, pool: Tensor | None = None, *, per_concept: bool = False, generator: torch.Generator | None = None
    ) -> None:
        if pool is not None and not isinstance(pool, Tensor):
            raise BadType("not a pool of rows", got=type(pool).__name__, needed="a tensor [M, C]")
        if pool is not None and (pool.ndim != 2 or not pool.numel()):
            raise BadValue("not a pool of rows", got=f"shape {list(pool.shape)}", needed="[M, C], with rows")
        super().__init__()
        self.register_buffer("pool", None if pool is None else pool.detach().clone(), persistent=False)
        self.per_concept, self.generator = per_concept, check_generator(generator)

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        rows = concepts.reshape(-1, concepts.shape[-1])
        count, columns = rows.shape
        source = rows if self.pool is None else self.pool.to(concepts)
        if source.shape[-1] != columns:
            raise BadValue("the pool has another width", got=list(source.shape), needed=f"[M, {columns}]")
        if self.pool is None and count == 1:
            fix = "Resample(pool=rows of a data set)"
            raise BadValue(
                "there is no other row to draw from", got="a batch of one", needed="two rows or more", fix=fix
            )
        owner = self.splice.owner
        width = (columns if owner is None else owner[-1] + 1) if self.per_concept else 1
        high = len(source) if self.pool is not None else max(count - 1, 1)
        device = concepts.device if self.generator is None else self.generator.device
        drawn = torch.randint(high, (count, width), generator=self.generator, device=device).to(concepts.device)
        if self.pool is None:  # a step of 1 to count - 1 from each row: never itself
            here = torch.arange(count, device=concepts.device).unsqueeze(-1)
            drawn = (here + 1 + drawn) % max(count, 1)
        if self.per_concept and owner is not None:
            drawn = drawn[:, list(owner)]
        return source.gather(0, drawn.expand(count, columns)).reshape(concepts.shape)


def check_generator(generator: object) -> torch.Generator | None:
    """``generator`` itself.

    Raises:
        BadType: for what is neither a generator nor None.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        needed = "a torch.Generator or None"
        raise BadType("not a generator", got=repr(generator), needed=needed, fix="torch.Generator().manual_seed(0)")
    return generator


@contextlib.contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Draws that take no generator, as those of ``torch.distributions``, come from this one; the global one is kept.

    Examples:
        >>> with drawing_from(torch.Generator().manual_seed(0)):
        ...     first = torch.rand(1)
        >>> with drawing_from(torch.Generator().manual_seed(0)):
        ...     print(bool(first == torch.rand(1)))
        True
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
