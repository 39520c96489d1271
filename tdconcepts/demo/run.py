"""The demo from end to end: both parts, one page."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

from tdconcepts.errors import BadValue, import_extra
from tdconcepts.report import Section, write_page

__all__ = ["run_demo", "summary_table"]

NEEDS = ("sklearn", "torchrl", "gymnasium", "matplotlib", "jinja2")
TITLE = "What a model's concepts and an agent's latents are worth"
INTRO = (
    "Two models, each a pipeline of stages that read and write named entries. The first is a concept bottleneck that "
    "reads digits by the segments of a display: how much better does it get when somebody corrects some of them? The "
    "second is an agent that balances a pole: what moves its actions, and which of its latent directions can't it do "
    "without? All numbers and sentences on this page were computed in this run."
)


def run_demo(
    out: str | Path = "demo-report",
    seed: int = 0,
    quick: bool = False,
    progress: Callable[[str, float, str], None] | None = None,
) -> tuple[Path, list[Section]]:
    """Train, explain and intervene on both models and write ``<out>/index.html``, one page that needs no other file.

    Runs on one thread (the models are small, and so the same seed gives the same page whatever the number of cores).

    Args:
        out: the folder; it is made where it does not exist.
        seed: of everything that is random, zero or more.
        quick: less data, training and seeds; for a look, not for the numbers.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Returns:
        The page's absolute path, and its sections.

    Raises:
        MissingExtra: a package of the extra ``demo`` is not installed. BadValue: ``out`` is no folder, or ``seed < 0``.
    """
    if seed < 0:
        raise BadValue("not a seed", got=f"seed={seed}", needed="a whole number from 0 on")
    for module in NEEDS:
        import_extra(module, "demo")
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadValue(
            "there is no folder to write to", got=f"{path}: {error.strerror}", fix="another --out"
        ) from error
    from tdconcepts.demo.agent import agent_section
    from tdconcepts.demo.digits import digits_section

    began = time.perf_counter()
    with _one_thread():
        sections = [part(seed, quick, progress) for part in (digits_section, agent_section)]
    if progress is not None:
        progress("drawing the page", 0.0, "")
    footer = _footer(seed, quick, time.perf_counter() - began)
    page = write_page(path / "index.html", TITLE, sections, intro=[INTRO], footer=footer)
    if progress is not None:
        progress("drawing the page", 1.0, f"{page.stat().st_size / 1e6:.1f} MB")
    return page, sections


def summary_table(sections: Sequence[Section]) -> str:
    """The summary rows of all sections as aligned text.

    Examples:
        >>> print(summary_table([Section("A", summary=[("accuracy", "0.91"), ("mean return", "500")])]))
        accuracy      0.91
        mean return   500
    """
    rows = [row for section in sections for row in section.summary]
    width = max((len(what) for what, _ in rows), default=0)
    return "\n".join(f"{what.ljust(width)}   {value}" for what, value in rows)


def _footer(seed: int, quick: bool, seconds: float) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "tensordict", "torchrl"))
    kind = "a quick run (small budgets, wide intervals)" if quick else "a full run"
    return f"tdconcepts demo: {kind} with seed {seed}, {seconds:.0f} s on one thread, with {versions}."


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
