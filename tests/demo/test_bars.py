"""Progress: bars on a terminal, plain lines elsewhere."""

import io
import re

import pytest

from tdconcepts.demo import bars
from tdconcepts.demo.bars import Bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, stages=("training", "testing")):
    with Bars(stream) as progress:
        for stage in stages:
            for step in range(5):
                progress(stage, step / 4, f"step {step}")
    return stream.getvalue()


def plain(text):
    return re.sub(r"\d+\.\d s", "0.0 s", text)


EXPECTED = "training ...\ntraining: 0.0 s, step 4\ntesting ...\ntesting: 0.0 s, step 4\n"


def test_lines_where_there_is_no_terminal():
    assert plain(run(io.StringIO())) == EXPECTED


def test_bars_on_a_terminal():
    pytest.importorskip("tqdm")
    last = [line.rstrip().split("\r")[-1] for line in run(Terminal()).rstrip("\n").split("\n")]
    assert len(last) == 2
    assert all("100%" in line and "step 4" in line for line in last)
    assert all(len(line) <= 100 for line in last)


def test_without_tqdm_a_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(bars, "_tqdm", lambda: None)
    assert plain(run(Terminal())) == EXPECTED


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_stage_that_is_left_early_is_closed(stream):
    stream = stream()
    with Bars(stream) as progress:
        progress("first", 0.2)
        progress("second", 0.3)
    assert stream.getvalue().endswith("\n")
    assert "second" in stream.getvalue()


def test_an_error_leaves_the_bar_where_it_was():
    pytest.importorskip("tqdm")
    stream = Terminal()

    def fail():
        with Bars(stream) as progress:
            progress("training", 0.4)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "100%" not in stream.getvalue()
    assert stream.getvalue().endswith("\n")
