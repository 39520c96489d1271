"""Progress on a terminal as bars, elsewhere as one line when a stage begins and one when it ends."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tdconcepts.errors import MissingExtra, import_extra

__all__ = ["Bars"]

FORMAT = "{desc:<32} {percentage:3.0f}% |{bar:24}| {elapsed}{postfix}"
REFRESH = 0.1  # seconds between two drawings of a bar


class Bars:
    """``progress(stage, done in [0, 1], note)``: a bar for each stage, in the order in which they come.

    On a terminal the bars are tqdm's; in a pipe, a log or a notebook's file each stage is two lines, without control
    characters. Use it as a context manager, so that the last bar is closed.

    Args:
        stream: where to write; standard error by default.

    Examples:
        >>> with Bars(sys.stdout) as progress:
        ...     progress("counting", 0.0, "")
        ...     progress("counting", 1.0, "3 sheep")  # doctest: +ELLIPSIS
        counting ...
        counting: ... s, 3 sheep
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._stage, self._began, self._drawn, self._bar = "", 0.0, 0.0, None
        self._tqdm = _tqdm() if self._stream.isatty() else None

    def __call__(self, stage: str, done: float, note: str = "") -> None:
        """Say that ``stage`` is ``done`` (0 to 1), with a short note."""
        if stage != self._stage:
            self._end("")
            self._stage, self._began = stage, time.perf_counter()
            if self._tqdm is None:
                print(f"{stage} ...", file=self._stream, flush=True)
            else:
                width, height = shutil.get_terminal_size()  # never 0, as some terminals say and tqdm believes
                size = {"ncols": min(width, 100), "nrows": height}
                self._bar = self._tqdm(total=1.0, desc=stage, file=self._stream, bar_format=FORMAT, **size)
        if self._bar is not None:
            self._bar.n = min(max(done, 0.0), 1.0)
            self._bar.set_postfix_str(note, refresh=False)
            if time.perf_counter() - self._drawn > REFRESH:
                self._bar.refresh()
                self._drawn = time.perf_counter()
        if done >= 1.0:
            self._end(note)

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end("")
        elif self._bar is not None:
            self._bar.close()  # where it was when the error came

    def _end(self, note: str) -> None:
        if not self._stage:
            return
        if self._bar is not None:
            self._bar.n = 1.0
            self._bar.refresh()
            self._bar.close()
        else:
            spent = f"{self._stage}: {time.perf_counter() - self._began:.1f} s"
            print(f"{spent}, {note}" if note else spent, file=self._stream, flush=True)
        self._stage, self._bar = "", None


def _tqdm() -> Any:
    try:
        return import_extra("tqdm", "demo").tqdm
    except MissingExtra:
        return None
