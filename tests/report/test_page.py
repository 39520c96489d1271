"""The page: everything inside, everything escaped, numbers to the right."""

import re
from html.parser import HTMLParser

import pytest

from tdconcepts import errors
from tdconcepts.errors import BadType, BadValue, MissingExtra
from tdconcepts.report.page import Section, page, write_page

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
from tdconcepts.report.figures import intervention_curve


class Reader(HTMLParser):
    """Collects tags with their attributes and text, and checks that tags close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def sections():
    figure = intervention_curve({"random": ([0, 1], [0.8, 0.9])})
    table = (["policy", "return", "interval"], [["a", 1.5, "[-1, 2]"], ["b <i>", -2, ""]], "Means & more")
    return [
        Section("Digits", ["One & two."], [(figure, 'A "curve"')], summary=[("accuracy", "0.9")]),
        Section("Agent", ["x < y"], tables=[table], summary=[("return", "500")]),
    ]


def test_everything_is_there_in_order():
    found = Reader(page("The <demo>", sections(), intro=["Hello."], footer="The end."))
    words = ["The <demo>", "Hello.", "accuracy", "0.9", "return", "500", "Digits", "One & two.", 'A "curve"', "Agent"]
    words += ["x < y", "Means & more", "policy", "1.5", "[-1, 2]", "b <i>", "-2", "The end."]
    places = [found.texts.index(word, 1) for word in words]
    links = {"Digits", "Agent"}  # they stand in the navigation first
    order = [place for word, place in zip(words, places, strict=True) if word not in links]
    assert order == sorted(order)
    assert [found.texts.count(word) for word in ("Digits", "Agent")] == [2, 2]
    assert [attrs["href"] for attrs in found.all("a")] == ["#section-1", "#section-2"]
    assert [attrs["id"] for attrs in found.all("section")] == ["section-1", "section-2"]


def test_it_needs_no_other_file_and_no_script():
    text = page("T", sections())
    assert not re.search(r"(src|href)=\"(?!data:image/svg\+xml;base64,|#)", text)
    assert "url(" not in text
    assert "@import" not in text
    found = Reader(text)
    assert not found.all("script")
    assert found.all("img")[0]["alt"] == 'A "curve"'
    assert found.all("html")[0]["lang"] == "en"


def test_text_is_escaped_everywhere():
    bad = "<script>alert(1)</script>"
    figure = intervention_curve({"a": ([0], [0.5])})
    section = Section(bad, [bad], [(figure, bad)], [([bad], [[bad]], bad)], [(bad, bad)])
    text = page(bad, [section, section], intro=[bad], footer=bad)
    assert "<script" not in text
    assert "{{" not in page("{{ title }}", []).replace("{{ title }}", "")  # text is no template


def test_columns_of_numbers_stand_to_the_right():
    found = Reader(page("T", sections()))
    assert [attrs.get("class") for attrs in found.all("th")] == [None, "number", "number"]


def test_a_page_without_sections():
    found = Reader(page("Empty", []))
    assert found.texts[-1] == "Empty"
    assert not found.all("nav")


def test_a_ragged_table_is_refused():
    with pytest.raises(BadValue, match="the table 'Means' is ragged"):
        page("T", [Section("S", tables=[(["a", "b"], [[1]], "Means")])])


def test_what_is_no_section_is_refused():
    with pytest.raises(BadType, match="not a section"):
        page("T", "sections")


def test_write_page(tmp_path):
    path = write_page(tmp_path / "deep" / "index.html", "Ä title", sections())
    assert path.is_absolute()
    assert path.read_text(encoding="utf-8") == page("Ä title", sections())
    with pytest.raises(BadValue, match="can't be written"):
        write_page(tmp_path / "deep", "T", [])
    with pytest.raises(BadValue, match="can't be written"):
        write_page(path / "below" / "index.html", "T", [])


def test_a_missing_extra_names_the_command(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(errors.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"pip install 'tdconcepts\[report\]'"):
        page("T", [])
