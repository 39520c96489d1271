"""The command line: exit codes, messages, and what is printed where."""

import subprocess
import sys
from pathlib import Path

import pytest

from tdconcepts import __main__ as command
from tdconcepts.errors import BadValue
from tdconcepts.report import Section


def stand_in(outcome):
    def run_demo(out, seed, quick, progress):
        progress("working", 1.0, f"{out} {seed} {quick}")
        if isinstance(outcome, BaseException):
            raise outcome
        return Path("/pages/index.html"), [Section("S", summary=[("mean return", "500")])]

    return run_demo


def test_demo(monkeypatch, capsys):
    monkeypatch.setattr("tdconcepts.demo.run.run_demo", stand_in(None))
    assert command.main(["demo", "--out", "here", "--seed", "3", "--quick"]) == 0
    out, err = capsys.readouterr()
    assert out == "\nmean return   500\n\nThe page: /pages/index.html\n"
    assert "here 3 True" in err


def test_defaults(monkeypatch, capsys):
    monkeypatch.setattr("tdconcepts.demo.run.run_demo", stand_in(None))
    assert command.main(["demo"]) == 0
    assert "demo-report 0 False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BadValue("no folder", fix="another --out"), 1, "tdconcepts demo: no folder\n  way out: another --out\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_messages(monkeypatch, capsys, error, code, text):
    monkeypatch.setattr("tdconcepts.demo.run.run_demo", stand_in(error))
    assert command.main(["demo"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert "Traceback" not in err


def test_a_defect_is_not_hidden(monkeypatch):
    monkeypatch.setattr("tdconcepts.demo.run.run_demo", stand_in(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        command.main(["demo"])


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--seed", "x"], ["demo", "--bogus"]])
def test_a_wrong_call_is_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert "usage: tdconcepts" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["demo", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--out", "--seed", "--quick"))


def test_as_a_module():
    arguments = [sys.executable, "-m", "tdconcepts", "--version"]
    root = Path(command.__file__).parents[1]
    run = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("tdconcepts ")
