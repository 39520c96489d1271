"""The one way to measure here: two forms that give equal numbers take turns, and the median of their ratio counts.

What makes a ratio robust on a machine that others use too: one thread; processor time instead of the clock on the wall
(nobody else's work counts); the forms alternated call by call, and ratios taken of neighbouring calls (what slows the
machine down hits both alike); medians; no garbage collection; three rounds, which are all shown. Each call gets a fresh
copy of its TensorDict, made while no time is taken. A short call is timed right after an untimed one of the same form,
so that nobody pays for caches that the other has filled: else one call of ours after 20 of a loop would look up to a
third slower than it is. ``make bench`` prints one table of all rows at its end; ``--benchmark-json=FILE`` keeps them.

What malloc gives back to the system it has to get again, page by page, and a page can cost more than the arithmetic on
it. When it does so depends on what the process has done before: one form was seen to take 1.0 and 1.6 of its time in
two runs. A block of 28 MB, taken and given back at the start, sets its thresholds as in any process that has worked
with large tensors, for our forms and the references alike.

tensordict 0.14 (0.15 does not) looks for pandas whenever a TensorDictModule has run, which takes 30 us or more where
there is none. Our code and the reference pay alike, so ratios are nearer to one than they would be;
``make bench ARGS=--without-lookup`` shows them without.
"""

import dataclasses
import functools
import gc
import importlib.util
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase

Form = Callable[[TensorDictBase], Any]

ROUNDS, WARM_UP = 3, 5
SECONDS = 0.5  # of timed calls for each round of a row
FEWEST, MOST = 5, 400  # timed calls of each form in a round
SHORT = 0.01  # seconds
ROWS = pytest.StashKey[list["Row"]]()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: medians in seconds, a ratio for each round, and what was aimed at."""

    name: str
    ours: float
    reference: float
    ratios: Sequence[float]
    aim: str = ""
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        low, high = min(self.ratios), max(self.ratios)
        met = "" if self.met is None else "yes" if self.met else "NO"
        times = (f"{1e6 * seconds:.0f}" for seconds in (self.ours, self.reference))
        return self.name, *times, f"{statistics.median(self.ratios):.2f}", f"{low:.2f}-{high:.2f}", self.aim, met


class Compare:
    """Measure rows; see :meth:`__call__`."""

    def __init__(self, benchmark: Any, rows: list[Row]) -> None:
        self.benchmark, self.rows = benchmark, rows

    def __call__(
        self,
        name: str,
        ours: Form,
        reference: Form | Mapping[str, Form],
        data: TensorDictBase | Sequence[TensorDictBase],
        keys: Sequence[Any],
        *,
        at_most: float | None = None,
        faster: float | None = None,
        peers: Mapping[str, Form] | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        """Measure ``ours / reference``, once their numbers are seen to be equal.

        Args:
            name: how the table names the row.
            ours: what is measured; it is called with a copy of the data.
            reference: hand-written PyTorch for the same numbers; of several forms the fastest counts.
            data: a TensorDict, or several that take turns.
            keys: the entries that all must write alike; a form may also give the tensors themselves.
            at_most: the aim, as a ratio; or
            faster: the aim, as how many times faster ours is to be.
            peers: other libraries' forms, each measured against the same reference, in rows of their own.
            tolerance: absolute and relative, for equal numbers.
        """
        batches = [data] if isinstance(data, TensorDictBase) else list(data)
        references = dict(reference) if isinstance(reference, Mapping) else {"reference": reference}
        for batch in batches:
            torch.manual_seed(0)
            expected = tensors(ours(batch.copy()), keys)
            for form in [*references.values(), *(peers or {}).values()]:
                torch.manual_seed(0)
                found = tensors(form(batch.copy()), keys)
                torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)

        which, *medians, ratios = measured(ours, references, batches)
        limit = at_most if at_most is not None else 1 / faster if faster is not None else math.inf
        aim = "" if limit == math.inf else f"<= {limit:.3g}" + (f" ({faster:g}x faster)" if faster else "")
        met = None if limit == math.inf else statistics.median(ratios) <= limit
        self.add(name if len(references) == 1 else f"{name} / {which}", *medians, ratios, aim, met)
        for peer, form in (peers or {}).items():
            self.add(f"  {peer} instead of ours", *measured(form, references, batches, rounds=1)[1:])
        self.benchmark.pedantic(ours, setup=lambda: ((batches[0].copy(),), {}), rounds=10)

    def add(
        self, name: str, ours: float, reference: float, ratios: Sequence[float], aim: str = "", met: bool | None = None
    ) -> None:
        """Put a row into the table, and into what pytest-benchmark stores."""
        row = Row(name, ours, reference, ratios, aim, met)
        self.rows.append(row)
        self.benchmark.extra_info[name.strip()] = {
            "ratio": statistics.median(ratios),
            **{field: value for field, value in vars(row).items() if field != "name"},
        }


def measured(
    ours: Form, references: Mapping[str, Form], batches: Sequence[TensorDictBase], rounds: int = ROUNDS
) -> tuple[str, float, float, list[float]]:
    """Which reference is the fastest, the median seconds of ours and of it, and the median ratio of each round."""
    taken = [alternate([ours, *references.values()], batches) for _ in range(rounds)]
    mine, *others = (statistics.median(column) for column in zip(*itertools.chain(*taken), strict=True))
    fastest = others.index(min(others))
    ratios = [statistics.median(turn[0] / turn[1 + fastest] for turn in turns) for turns in taken]
    return list(references)[fastest], mine, others[fastest], ratios


def alternate(forms: Sequence[Form], batches: Sequence[TensorDictBase]) -> list[list[float]]:
    """The seconds of each form, for each of the turns of one round."""
    turns = itertools.pairwise(itertools.cycle(batches))
    once = min(sum(take_turns(forms, *next(turns))) for _ in range(WARM_UP))
    samples = min(MOST, max(FEWEST, int(SECONDS / once)))
    gc.collect()
    gc.disable()
    try:
        return [take_turns(forms, *next(turns), twice=once < SHORT) for _ in range(samples)]
    finally:
        gc.enable()


def take_turns(
    forms: Iterable[Form], before: TensorDictBase, batch: TensorDictBase, twice: bool = False
) -> list[float]:
    taken = []
    for form in forms:
        if twice:
            form(before.copy())
        given = batch.copy()
        start = time.process_time_ns()
        result = form(given)
        taken.append(1e-9 * (time.process_time_ns() - start))
        del result  # what it frees is not the next form's work
    return taken


def tensors(result: Any, keys: Sequence[Any]) -> list[torch.Tensor]:
    if isinstance(result, TensorDictBase):
        found = [result.get(key) for key in keys]
        return [leaf for one in found for leaf in (leaves(one) if isinstance(one, TensorDictBase) else [one])]
    return [result] if isinstance(result, torch.Tensor) else list(result)


def leaves(group: TensorDictBase) -> list[torch.Tensor]:
    return [group.get(key) for key in group.keys(True, True)]


@pytest.fixture
def compare(benchmark, request, monkeypatch):
    finders = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    monkeypatch.setattr(sys, "meta_path", finders)  # pytest's own would make each look for a module slower
    if request.config.getoption("--without-lookup"):
        monkeypatch.setattr(importlib.util, "find_spec", functools.cache(importlib.util.find_spec))
    return Compare(benchmark, request.config.stash[ROWS])


def pytest_addoption(parser):
    parser.addoption("--without-lookup", action="store_true", help="remember that there is no pandas: see conftest.py")


def pytest_configure(config):
    config.stash[ROWS] = []
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script:DeprecationWarning")  # the inductor's own
    torch.set_num_threads(1)  # so that ratios don't depend on how many cores are free
    torch.empty(28 << 20, dtype=torch.uint8)  # see above


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    table = [("", "ours us", "reference us", "ratio", "3 rounds", "aim", "met"), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [str.ljust, *[str.rjust] * 4, str.ljust, str.rjust]
    terminalreporter.section("ours / reference")
    for line in table:
        cells = [align(cell, width) for align, cell, width in zip(aligned, line, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())
