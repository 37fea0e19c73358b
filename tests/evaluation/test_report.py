"""Reports: what was written can be read back, no text breaks a page, and figures show their numbers."""

import base64
import dataclasses
import io
import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from matplotlib import image
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from senri.evaluation import plots
from senri.evaluation.html import to_html
from senri.evaluation.markdown import cell_text, numeric, to_markdown
from senri.evaluation.report import Curves, HeatMap, Report, Section, Series, Table
from senri.evaluation.write import read_report, to_json, write_report

NASTY = ["a|b", "a\\|b", "\\", "end\\", "x\ny", "`|`", "<script>alert(1)</script>", "*x* _y_ ~~z~~", "[l](u)", "&lt;"]


def heat_map(panels=2, rows=3, columns=3, name="map", missing=((1, 0),)):
    names = ["Senri, memory on", "memory reset just before the question", "the sliding window alone", "full attention"]
    values = [[0.93 / (1 + r + c) for c in range(columns)] for r in range(rows)]
    for row, column in missing:
        values[row][column] = None
    grid = tuple(map(tuple, values))
    labels = ("4K", "16K", "64K", "256K", "1M")[:columns], ("0%", "25%", "50%", "75%", "100%")[:rows]
    arms = tuple((names[i % 4], grid) for i in range(panels))
    return HeatMap(
        name, "Recall by depth and length", "length (tokens)", "depth of the needle", *labels, arms, "A note."
    )


def curves(points=5, name="curves", series=1, **options):
    x = tuple(4096.0 * 4**i for i in range(points))
    y = tuple(0.9 - 0.1 * i for i in range(points))
    low, high = tuple(v - 0.07 for v in y), tuple(v + 0.05 for v in y)
    lines = [Series(f"arm {i}", x, tuple(v - 0.1 * i for v in y), low, high) for i in range(series)]
    chance = Series("chance", (4096.0,), (0.0625,), dashed=True)
    options = {"log_x": True, "y_range": (0.0, 1.0)} | options
    return Curves(name, "Recall by length", "length (tokens)", "recall", (*lines, chance), **options)


@pytest.fixture
def report():
    rows = tuple((text, i, i / 7, None if i else 0.5) for i, text in enumerate(NASTY))
    table = Table("Arms | <b>", ("arm|", "n", "recall", "margin"), rows, {"recall": ".1%"}, "A *note*.")
    facts = {"seed": 7, "rate": 1 / 3, "flush": True, "commit": None, "home": "http://example.org/|x", "zero": 0.0}
    return Report(
        "Recall of <script>alert(1)</script>",
        facts,
        (
            Section("One & <two>", "# text\n\nof two paragraphs", ("a\nflag", "b"), (table,), (heat_map(), curves())),
            Section("Three", figures=(heat_map(1, 1, 1, "small", ()),)),
            Section("Four", flags=("<i>last</i>",)),
        ),
        {"b": {"list": [1, None, "```"]}, "a": "one\n```\ntwo"},
    )


class Page(HTMLParser):
    """All elements of a page with their attributes, and the text of each by its tag."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
            self.texts.append([tag, ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.texts:
            self.texts[-1][1] += data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]

    def of(self, tag):
        return [text.strip() for name, text in self.texts if name == tag]


def test_a_report_is_read_back_as_it_was_written(report, tmp_path):
    paths = write_report(report, tmp_path / "new" / "folder")
    names = ["map.png", "curves.png", "small.png", "report.md", "report.html", "report.json"]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    again = read_report(paths[-1])
    assert again == report
    assert repr(again) == repr(report)  # tuples are tuples, 1 is not 1.0 nor True, the order is kept
    assert [(type(a), type(b)) for a, b in zip(again.facts.values(), report.facts.values(), strict=True)] == [
        (type(v), type(v)) for v in report.facts.values()
    ]
    first = paths[-1].read_bytes()
    assert write_report(again, tmp_path)[-1].read_bytes() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": {"loss": float("nan")}}, r"report\.facts\.loss is nan"),
        ({"config": {"a": [1, {"b": float("inf")}]}}, r"report\.config\.a\[1\]\.b is inf"),
        ({"config": {"a": {1, 2}}}, r"report\.config\.a is a set"),
        ({"config": {"a": {3: 4}}}, r"report\.config\.a has the key 3"),
        ({"sections": (Section("s", figures=(heat_map(name="../x"),)),)}, "'../x': a name is made of letters"),
        ({"sections": (Section("s", figures=(heat_map(), curves(name="map"))),)}, "two figures have this name"),
        ({"sections": (Section("s", tables=(Table("t", ("a", "b"), ((1,),)),)),)}, "table 't': a row of 1 values"),
        ({"sections": (Section("s", tables=(Table("t", ("a",), ((0.5,),), {"a": "d"}),)),)}, "table 't': .*'d'"),
    ],
)
def test_a_report_that_cannot_be_written_whole_is_not_written(report, tmp_path, change, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        write_report(dataclasses.replace(report, **change), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_made(report, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"^cannot make the folder [^\n]*file"):
        write_report(report, tmp_path / "file")


def _broken(report):
    data = [json.loads(to_json(report)) for _ in range(2)]
    data[0]["sections"][0]["figures"][0]["rows"] = "0%"
    data[1]["sections"][0]["figures"][1]["series"][0]["y"][0] = "0.9"
    texts = {"row": json.dumps(data[0]), "number": json.dumps(data[1])}
    return texts | {"cut": to_json(report)[:-40], "empty": "", "list": "[]", "title": '{"title": 3}'}


@pytest.mark.parametrize("case", ["row", "number", "cut", "empty", "list", "title"])
def test_a_corrupt_file_is_named_in_one_line(report, tmp_path, case):
    path = tmp_path / "report.json"
    path.write_text(_broken(report)[case])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not a report: [^\n]+$"):
        read_report(path)


def test_a_missing_file_is_named_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^cannot read [^\n]*none\.json: No such file[^\n]*$"):
        read_report(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (None, ".1%", "–"),
        (0.125, ".1%", "12.5%"),
        (1, ".1%", "100.0%"),
        ("1|2", ".1%", "1|2"),
        (True, "", "yes"),
        (20240613, "", "20240613"),
        (1 / 3, "", "0.3333"),
        (999.96, "", "1000"),
        (123456.7, "", "123,457"),
        (0.00001234, "", "1.234e-05"),
        (-2048.0, "", "-2,048"),
    ],
)
def test_values_in_words(value, spec, text):
    assert cell_text(value, spec) == text


def test_only_columns_of_numbers_are_aligned_to_the_right():
    rows = ((1, None, True, None, "1"), (None, 0.5, False, None, 2))
    assert numeric(Table("t", tuple("abcde"), rows)) == [True, True, False, False, False]


@pytest.fixture
def tokens(report):
    """The report's Markdown as GitHub's dialect reads it."""
    text = to_markdown(report, {"map": "map.png", "curves": "c.png", "small": "s.png"})
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def _words(token):
    """The text of an inline token, None where it holds markup."""
    plain = all(child.type in ("text", "text_special", "entity") for child in token.children)
    return "".join(child.content for child in token.children) if plain else None


def test_no_cell_breaks_a_markdown_table(tokens, report):
    cells = [_words(tokens[i + 1]) for i, t in enumerate(tokens) if t.type in ("td_open", "th_open")]
    expected = ["arm|", "n", "recall", "margin"]
    for i, text in enumerate(NASTY):
        expected += [" ".join(text.split()), str(i), f"{i / 7:.1%}", "–" if i else "0.5"]
    assert cells[: len(expected)] == expected
    assert cells[len(expected) :][:4] == ["fact", "value", "seed", "7"]
    assert cells[-4:] == ["home", "http://example.org/|x", "zero", "0"]
    first = [t.attrGet("style") for t in tokens if t.type == "td_open"][:4]
    assert first == [None, "text-align:right", "text-align:right", "text-align:right"]


def test_markdown_shows_flags_first_and_the_configuration_last(tokens, report):
    headings = [_words(tokens[i + 1]) for i, t in enumerate(tokens) if t.type == "heading_open"]
    top = ["Recall of <script>alert(1)</script>", "One & <two>", "Arms | <b>", "Three", "Four", "Facts"]
    assert headings == [*top, "Configuration"]
    kinds = [t.type for t in tokens]
    block = tokens[kinds.index("blockquote_open") : kinds.index("blockquote_close")]
    assert kinds.index("blockquote_close") < kinds.index("heading_open", 3)
    lines = ["".join(c.content for c in t.children) for t in block if t.type == "inline"]
    assert lines[1:] == ["One & <two>: a flag", "One & <two>: b", "Four: <i>last</i>"]
    assert "html_block" not in kinds
    fences = [t for t in tokens if t.type == "fence"]
    assert yaml.safe_load(fences[0].content) == report.config
    assert [fences, fences[0].info, kinds[-1]] == [fences[:1], "yaml", "fence"]
    images = [c.attrGet("src") for t in tokens if t.type == "inline" for c in t.children if c.type == "image"]
    assert images == ["map.png", "c.png", "s.png"]


def test_without_flags_both_pages_say_so():
    empty = Report("Nothing", {}, (Section("A"),))
    assert to_markdown(empty, {}) == "# Nothing\n\nNo flags.\n\n## A\n"
    page = Page(to_html(empty, {}))
    assert "No flags." in page.of("p")
    assert "details" not in [tag for tag, _ in page.elements]


@pytest.fixture
def page(report):
    figures = [figure for section in report.sections for figure in section.figures]
    pngs = {figure.name: plots.render(figure) for figure in figures}
    return Page(to_html(report, pngs)), pngs


def test_html_needs_nothing_outside_itself(page):
    page, pngs = page
    sources = page.attributes("src")
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,"), validate=True) for s in sources] == [
        *pngs.values()
    ]
    assert all(text.strip() for text in page.attributes("alt"))
    assert len(page.attributes("alt")) == 3
    assert not {"script", "link", "iframe", "i", "b"} & {tag for tag, _ in page.elements}
    assert not re.search(r"url\(|@import|http", "".join(page.of("style")))
    targets = page.attributes("href")
    assert targets
    assert {t.removeprefix("#") for t in targets} == set(page.attributes("id"))
    others = [v for _, attrs in page.elements for name, v in attrs.items() if v and name != "src"]
    assert not [v for v in others if "http" in v.lower()]


def test_html_shows_every_text_as_it_is(page, report):
    page, _ = page
    assert page.of("title") == page.of("h1") == [report.title]
    assert page.of("h2") == ["One & <two>", "Three", "Four"]
    cells = page.of("td")
    assert cells[: 4 * len(NASTY) : 4] == NASTY
    assert cells[2 : 4 * len(NASTY) : 4] == [f"{i / 7:.1%}" for i in range(len(NASTY))]
    assert cells[4 * len(NASTY) :] == ["7", "0.3333", "yes", "–", "http://example.org/|x", "0"]
    classes = [attrs.get("class") for tag, attrs in page.elements if tag == "td"][:4]
    assert classes == [None, "number", "number", "number"]
    assert yaml.safe_load(page.of("pre")[0]) == report.config
    flags = [tag for tag, attrs in page.elements if attrs.get("class") == "flags" or tag in ("nav", "h2")]
    assert flags[:3] == ["section", "nav", "h2"]  # before all else


def _drawn(spec):
    figure = plots.build(spec)
    figure.draw_without_rendering()  # lays it out
    return figure


def test_heat_maps_print_every_cell_on_one_scale():
    figure = _drawn(heat_map(4, 3, 4, missing=((1, 0), (2, 3))))
    panels = figure.axes[:4]
    assert len(figure.axes) == 5  # and one colour bar
    for axes in panels:
        places = [axes.transData.transform(t.get_position()).round() for t in axes.texts]
        ordered = sorted(zip(places, axes.texts, strict=True), key=lambda pair: (-pair[0][1], pair[0][0]))
        expected = [f"{0.93 / (1 + r + c):.0%}" for r in range(3) for c in range(4)]
        expected[4] = expected[11] = "–"
        assert [text.get_text() for _, text in ordered] == expected
        assert [label.get_text() for label in axes.get_xticklabels()] == ["4K", "16K", "64K", "256K"]
        (mesh,) = (c for c in axes.collections if isinstance(c, QuadMesh))
        assert mesh.get_clim() == (0, 1)
        patches = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_hatch()]
        assert [p.get_xy() for p in patches] == [(0, 1), (3, 2)]


def test_percentages_contrast_with_their_cells():
    values = ((0.0, 0.3, 0.45, 0.6, 1.0),)
    axes = plots.build(HeatMap("m", "", "", "", ("a", "b", "c", "d", "e"), ("r",), (("p", values),))).axes[0]
    colours = [t.get_color() for t in axes.texts]
    assert [colours[0], colours[-1]] == ["white", "black"]
    for value, colour in zip(values[0], colours, strict=True):
        grey = np.dot(np.array(matplotlib.colormaps["viridis"](value)[:3]) ** 2.2, [0.2126, 0.7152, 0.0722])
        contrast = (grey + 0.05) / 0.05 if colour == "black" else 1.05 / (grey + 0.05)
        assert contrast > 4.4  # WCAG asks for 4.5; the exponent is approximate


@pytest.mark.parametrize(
    "spec",
    [
        *(heat_map(panels, n, n) for panels in (1, 2, 4, 6) for n in (3, 5)),
        heat_map(1, 1, 1, missing=()),
        heat_map(6, 5, 1),
        dataclasses.replace(
            heat_map(4), title="a long title " * 12, y_label="a long label " * 4, columns=("131,072",) * 3
        ),
        curves(),
        curves(1, series=4),
        curves(40, log_x=False),
        dataclasses.replace(
            curves(), title="a long title " * 12, series=(Series("long name " * 15, (2.0, 4.0), (0.1, 0.2)),) * 3
        ),
        dataclasses.replace(curves(), series=(Series("s", (1e3, 1e5, 131071.0, 2e5), (0.1, 0.2, 0.3, 0.4)),)),
        Curves("none", "No curve", "x", "y", (), log_x=True),
    ],
    ids=lambda spec: spec.name,
)
def test_nothing_is_cut_off_or_covered(spec):
    figure = _drawn(spec)
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, (box, width, height)
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [legend.get_window_extent() for legend in figure.legends]
    for i, one in enumerate(boxes):
        assert not any(one.shrunk(0.98, 0.98).overlaps(other) for other in boxes[i + 1 :])
    for axes in figure.axes:
        labels = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text() and not t.get_rotation()]
        assert not any(a.overlaps(b) for a, b in pairwise(labels))


def test_curves_show_intervals_references_and_plain_numbers():
    axes = _drawn(curves()).axes[0]
    (band,) = (c for c in axes.collections if isinstance(c, PolyCollection))
    vertices = band.get_paths()[0].vertices
    for i in range(5):
        at = vertices[vertices[:, 0] == 4096 * 4**i][:, 1]
        assert (at.min(), at.max()) == pytest.approx((0.9 - 0.1 * i - 0.07, 0.9 - 0.1 * i + 0.05))
    assert [t.get_text() for t in axes.get_xticklabels()] == ["4K", "16K", "64K", "256K", "1M"]
    assert axes.get_ylim() == (0, 1)
    assert [line.is_dashed() for line in axes.lines] == [True, False]
    reference = axes.lines[0]
    assert (list(reference.get_xdata()), list(reference.get_ydata())) == ([0, 1], [0.0625, 0.0625])  # the whole width


def test_few_points_have_error_bars_beside_each_other():
    axes = _drawn(curves(1, series=2)).axes[0]
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    assert [b.get_segments()[0][:, 1].tolist() for b in bars] == [pytest.approx([0.83, 0.95])] * 2
    places = [b.get_transform().transform(b.get_segments()[0])[0, 0] for b in bars]
    assert places[1] - places[0] > 5  # pixels
    assert not [c for c in axes.collections if isinstance(c, PolyCollection)]


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512"), (1536.0, "1,536"), (2**21, "2M"), (1.5 * 2**20, "1536K"), (5000, "5,000"), (0.5, "0.5")],
)
def test_counts_on_a_logarithmic_axis(count, text):
    one = Curves("c", "t", "x", "y", (Series("s", (count,), (1.0,)),), log_x=True)
    assert [t.get_text() for t in _drawn(one).axes[0].get_xticklabels()] == [text]


@pytest.mark.parametrize("spec", [heat_map(), curves(), curves(2)], ids=["map", "band", "bars"])
def test_a_figure_has_the_same_pixels_every_time(spec):
    first = plots.render(spec)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 30, "text.color": "red"}):
        assert plots.render(spec) == first


def test_a_different_number_or_interval_gives_different_pixels():
    base = curves()
    bare = dataclasses.replace(base, series=(dataclasses.replace(base.series[0], low=(), high=()), base.series[1]))
    pictures = [image.imread(io.BytesIO(plots.render(f))) for f in (base, bare)]
    assert (np.abs(pictures[0] - pictures[1]).max(axis=2) > 0.02).mean() > 0.01
    assert plots.render(heat_map(missing=())) != plots.render(heat_map())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dataclasses.replace(heat_map(), rows=("0%",)), "values of 'Senri, memory on' are not 1 × 3"),
        (dataclasses.replace(heat_map(), panels=()), "'map': no panels"),
        (dataclasses.replace(curves(), series=(Series("s", (1.0, 2.0), (1.0,)),)), "'s' has .1, 2. values"),
        (dataclasses.replace(curves(), series=(Series("s", (1.0,), (1.0,), (0.5,)),)), "'s' has .0, 1. values"),
        (dataclasses.replace(curves(), series=(Series("s", (0.0,), (1.0,)),)), "no logarithm's: 0.0"),
    ],
)
def test_a_figure_that_contradicts_itself(spec, message):
    with pytest.raises(ValueError, match=message):
        plots.render(spec)


def test_a_failing_draw_leaves_the_folder_as_it_was(report, tmp_path, monkeypatch):
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = Figure.savefig, []

    def fail(self, target, **options):
        real(self, target, **options)
        calls.append(target)
        if len(calls) == 3:
            raise RuntimeError("no more ink")

    monkeypatch.setattr(Figure, "savefig", fail)
    changed = dataclasses.replace(report, title="Changed")
    with pytest.raises(RuntimeError, match="ink"):
        write_report(changed, tmp_path)
    calls[:] = [None, None]
    with pytest.raises(RuntimeError, match="ink"):
        plots.draw(curves(), tmp_path / "curves.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_figure_is_drawn_to_a_file_or_the_failure_is_one_line(tmp_path):
    plots.draw(curves(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == plots.render(curves())
    with pytest.raises(ValueError, match=r"^cannot write [^\n]*none/a\.png[^\n]*$"):
        plots.draw(curves(), tmp_path / "none" / "a.png")


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^plots need matplotlib: pip install 'senri\[eval\]'$"):
        plots.render(curves())
