"""The demo from end to end, in its quick form, and what stops it early."""

import re

import pytest
import torch

from tdconcepts import errors
from tdconcepts.demo.run import run_demo, summary_table
from tdconcepts.errors import BadValue, MissingExtra
from tdconcepts.report import Section

for name in ("torchrl", "gymnasium", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(name)


def test_run_demo_writes_one_page(tmp_path, monkeypatch):
    """The parts are tested on their own; here they are stand-ins."""
    from tdconcepts.demo import agent, digits

    calls, notes = [], []

    def part(name):
        def section(seed, quick, progress):
            calls.append((name, seed, quick, torch.get_num_threads()))
            return Section(name, [f"About {name}."], summary=[(name, "1.0")])

        return section

    monkeypatch.setattr(digits, "digits_section", part("digits"))
    monkeypatch.setattr(agent, "agent_section", part("agent"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        page, sections = run_demo(tmp_path / "a" / "b", 3, True, lambda *note: notes.append(note))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert calls == [("digits", 3, True, 1), ("agent", 3, True, 1)]
    assert page == tmp_path / "a" / "b" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert text.index("About digits.") < text.index("About agent.")
    assert re.search(r"a quick run .* with seed 3", text)
    assert notes[-1][:2] == ("drawing the page", 1.0)
    assert summary_table(sections) == "digits   1.0\nagent    1.0"


def test_it_fails_before_it_works(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadValue, match="another --out"):
        run_demo(tmp_path / "file")
    with pytest.raises(BadValue, match="seed=-1"):
        run_demo(tmp_path, seed=-1)

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(errors.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"pip install 'tdconcepts\[demo\]'"):
        run_demo(tmp_path)


def test_summary_of_nothing():
    assert summary_table([]) == ""
