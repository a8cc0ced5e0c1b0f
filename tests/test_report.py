"""Reports as JSON, as tables for a terminal and as an HTML page."""

import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import jgptq
from jgptq.quantize import Report, Row
from jgptq.report import read_report, report_html, report_json, report_table, totals, weights_table
from jgptq.report.plots import COLORS, LISTED, depth_and_kind, plots

ROW = Row(
    path="layers.0.mlp.up.kernel",
    shape=(64, 32),
    method="gptq",
    bits=4,
    group_size=16,
    symmetric=False,
    nbytes=1400,
    tokens=512,
    loss=2.5,
    relative_error=1e-3,
    rtn_error=4e-3,
    damp=0.01,
    seconds=0.25,
    notes=(),
)
HOSTILE = "layers.0.<script>'&'</script>[red]$x_1\x1b\ud800"


def report_of(*rows, skipped=(), seconds=9.0):
    return Report(rows=rows, skipped=skipped, seconds=seconds, programs=3)


def row(path="layers.0.mlp.up.kernel", **changes):
    return dataclasses.replace(ROW, path=path, **changes)


def model(depth=4, kinds=("attn.q", "attn.o", "mlp.up"), **changes):
    """A report of `depth` layers, errors growing with depth."""
    return report_of(
        *(
            row(f"layers.{i}.{kind}.kernel", relative_error=1e-3 * (i + 1), rtn_error=2e-3 * (i + 1), **changes)
            for i in range(depth)
            for kind in kinds
        ),
        skipped=(("embedding", "no product that could be quantized (used in gather)"),),
    )


def printed(table, width):
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


class Page(html.parser.HTMLParser):
    """What a browser would see: tags balanced, text unescaped, attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.attributes, self.counts = [], "", [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# --- JSON ---


def test_totals_count_every_byte():
    report = report_of(row(shape=(64, 32), nbytes=1400, loss=2.5), row(shape=(10,), nbytes=600, loss=0.5), seconds=7.0)
    assert totals(report) == {
        "weights": 2,
        "parameters": 2058,
        "nbytes": 2000,
        "bits_per_weight": 16000 / 2058,
        "loss": 3.0,
        "seconds": 7.0,
    }
    assert json.loads(report_json(report))["totals"] == totals(report)


def test_bits_a_weight_are_those_of_the_packed_arrays():
    """Group 16, asymmetric: 4 bits of code, and 16 of scale and 8 of zero for 16 weights."""
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)}
    x = np.random.default_rng(1).standard_normal((100, 64)).astype(np.float32)
    _, report = jgptq.quantize(lambda p, x: x @ p["w"], params, [x], grid=jgptq.Grid(bits=4, group_size=16))
    assert totals(report)["bits_per_weight"] == 4 + 24 / 16
    assert read_report(report_json(report)) == report
    Page(report_html(report))


texts = st.text(max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)  # as solvers give them
whole = st.integers(0, 2**62)
rows = st.fixed_dictionaries(
    {
        "path": texts,
        "shape": st.lists(whole, max_size=3).map(tuple),
        "method": texts,
        "bits": whole,
        "group_size": whole,
        "symmetric": st.booleans(),
        "nbytes": whole,
        "tokens": whole,
        "loss": finite,
        "relative_error": finite,
        "rtn_error": finite,
        "damp": finite,
        "seconds": finite,
        "notes": st.lists(texts, max_size=2).map(tuple),
    }
)


@settings(max_examples=50, deadline=None)
@given(st.lists(rows, max_size=2), st.lists(st.tuples(texts, texts), max_size=2), finite)
def test_reading_what_was_written_gives_the_report(rows, skipped, seconds):
    report = report_of(*(Row(**row) for row in rows), skipped=tuple(skipped), seconds=seconds)
    assert read_report(report_json(report)) == report


def test_json_is_strict_and_what_is_not_finite_comes_back_as_nan():
    text = report_json(report_of(row(loss=math.inf, rtn_error=math.nan)))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = read_report(text).rows[0]
    assert math.isnan(back.loss)
    assert math.isnan(back.rtn_error)
    assert back.relative_error == ROW.relative_error


def test_fields_of_a_later_version_are_ignored():
    data = json.loads(report_json(report_of(row())))
    data["machine"] = data["rows"][0]["colour"] = "blue"
    assert read_report(json.dumps(data)) == report_of(row())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data.pop("skipped"), "the text has no 'skipped'"),
        (lambda data: data["rows"][0].pop("rtn_error"), r"the text.rows\[0\] has no 'rtn_error'"),
        (lambda data: data.update(rows={}), r"the text.rows is {} and not a list"),
        (lambda data: data.update(rows=[3]), r"the text.rows\[0\] is 3 and not an object"),
        (lambda data: data.update(programs=True), "the text.programs is true and not a whole number from 0"),
        (lambda data: data.update(programs=-1), "the text.programs is -1 and not a whole number from 0"),
        (lambda data: data.update(programs=10**40), "the text.programs is 1000.* and not a whole number from 0"),
        (lambda data: data.update(seconds="9"), 'the text.seconds is "9" and not a number'),
        (lambda data: data.update(seconds=10**400), "too large"),
        (lambda data: data.update(skipped=[["a"]]), r'the text.skipped\[0\] is \["a"\] and not a list'),
        (lambda data: data["rows"][0].update(path=None), r"the text.rows\[0\].path is null and not a string"),
        (lambda data: data["rows"][0].update(symmetric=0), r"symmetric is 0 and not true or false"),
        (lambda data: data["rows"][0].update(shape=[4.5]), r"shape\[0\] is 4.5 and not a whole number"),
    ],
)
def test_json_that_is_no_report_is_refused(change, complaint):
    data = json.loads(report_json(report_of(row())))
    change(data)
    with pytest.raises(ValueError, match=f"^not a report of jgptq: .*{complaint}.*; give the JSON text"):
        read_report(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "9" * 10_000, '{"rows": ' * 5000])
def test_text_that_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match=r"^not a report of jgptq: "):
        read_report(text)


# --- Terminal ---


def test_the_table_has_every_number_and_the_totals():
    report = report_of(row(tokens=4096, damp=0.02), row("head", bits=8, loss=1.5, rtn_error=math.nan))
    lines = printed(report_table(report), 120).splitlines()
    cells = [line.split() for line in lines]
    heads = "weight shape bits tokens loss rel. error RTN error damp seconds"
    assert heads.split() in cells
    assert ["layers.0.mlp.up.kernel", "64×32", "4", "4,096", "2.5", "1.00e-03", "4.00e-03", "0.02", "0.2"] in cells
    assert ["head", "64×32", "8", "512", "1.5", "1.00e-03", "–", "0.01", "0.2"] in cells
    assert ["total", "5.47", "4", "9.0"] in cells  # 2 × 1400 bytes for 2 × 2048 weights
    assert "4,096 parameters in 2,800 bytes" in "".join(lines)


def test_the_table_fits_a_terminal_of_80_columns():
    wide = row("layers.10.mlp.up", shape=(14336, 4096), tokens=262_144, loss=1.23e4, damp=0.001, seconds=123.4)
    text = printed(report_table(report_of(wide)), 80)
    assert "…" not in text
    for cell in ("14336×4096", "262,144", "1.23e+04", "1.00e-03", "4.00e-03", "0.001", "123.4"):
        assert cell in text


def test_paths_are_no_markup_and_reach_no_terminal_as_control_characters():
    text = printed(report_table(report_of(row("w[red][3]", bits=4), row(HOSTILE))), 200)
    assert "w[red][3]" in text
    assert "\x1b" not in text
    assert r"[red]$x_1\x1b\ud800" in text
    assert "w[bold]" in printed(weights_table({"w[bold]": jnp.ones((2, 2))}, {}), 80)


# --- HTML ---


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.31.mlp.up.kernel", (31, "model.layers.*.mlp.up.kernel")),
        ("layers.mlp.kernel[3]", (3, "layers.mlp.kernel[*]")),
        ("layers.qkv[7, :, 0:64]", (7, "layers.qkv[*, :, 0:64]")),
        ("layers.2.experts.5.up", (2, "layers.*.experts.5.up")),
        ("0", (0, "*")),
        ("12.w", (12, "*.w")),
        ("w.12", (12, "w.*")),
        ("attn.qkv[:, 0:64]", (None, "attn.qkv[:, 0:64]")),
        ("conv1.w2x.h_0", (None, "conv1.w2x.h_0")),
        ("", (None, "")),
        ("layers." + "9" * 5000, (None, "layers." + "9" * 5000)),
    ],
)
def test_depth_and_kind_of_a_path(path, expected):
    assert depth_and_kind(path) == expected


def test_the_page_has_every_row_reason_and_note_and_needs_nothing_else():
    report = model()
    noted = dataclasses.replace(report.rows[2], notes=("saw 3 tokens",))
    report = dataclasses.replace(report, rows=(*report.rows[:2], noted, *report.rows[3:]))
    text = report_html(report, title="A <b> title")
    page = Page(text)
    assert page.counts["tr"] == len(report.rows) + 1 + 1 + 1  # two heads and one leaf left in float
    for row in report.rows:
        assert row.path in page.text
    assert "no product that could be quantized (used in gather)" in page.text
    assert f"{noted.path}: saw 3 tokens" in page.text
    assert page.text.count("A <b> title") == 2
    assert page.counts["svg"] == 4
    fetching = [a for a in page.attributes if a[1] in ("src", "href", "xlink:href", "data", "action", "srcset")]
    assert all(value.startswith("#") for _, _, value in fetching)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe|javascript:", text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_hostile_text_stays_text():
    hostile = row(HOSTILE, notes=("<img src=x onerror=alert(1)>",), method="<i>")
    deeper = row(HOSTILE.replace("0", "1"), method="<i>")
    text = report_html(report_of(hostile, deeper, skipped=((HOSTILE, HOSTILE),)), title=HOSTILE)
    text.encode()  # no lone surrogate
    page = Page(text)
    assert "script" not in page.counts
    assert "img" not in page.counts
    assert "i" not in page.counts
    # Title, heading, two rows, path and reason left in float, a note and the name in each of four plots.
    assert page.text.count("<script>'&'</script>[red]$x_1\\x1b\\ud800") == 11


def test_equal_reports_give_equal_pages():
    assert report_html(model()) == report_html(model())


def drawing(plot):
    return ElementTree.fromstring(plot.svg)


def places(svg, color):
    """(x, y) of every marker of a colour."""
    uses = [element for element in svg.iter() if element.tag.endswith("use") and color in element.get("style", "")]
    return [(float(use.get("x")), float(use.get("y"))) for use in uses]


def test_errors_are_drawn_on_a_logarithmic_axis_the_largest_first():
    """Errors of 0.001, 0.01 and 0.1 are equally far apart, RTN a fixed factor to their right."""
    errors = (1e-3, 1e-1, 1e-2)
    names = ("small", "large", "middle")
    report = report_of(*(row(name, relative_error=e, rtn_error=3 * e) for name, e in zip(names, errors, strict=True)))
    by_kind = plots(report.rows)[0]
    svg = drawing(by_kind)
    (large, middle, small), rtn = places(svg, COLORS[0]), places(svg, COLORS[1])
    decade = large[0] - middle[0]
    assert middle[0] - small[0] == pytest.approx(decade, rel=1e-4)
    assert rtn[0][0] - large[0] == pytest.approx(decade * math.log10(3), rel=1e-4)
    assert large[1] < middle[1] < small[1]  # SVG counts from the top
    labels = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert [label for label in labels if label in names] == ["large", "middle", "small"]
    assert [(sign.color, sign.text) for sign in by_kind.legend] == [(COLORS[0], "GPTQ"), (COLORS[1], "RTN")]


def test_errors_by_depth_stand_beside_those_of_rtn():
    by_depth = plots(model(depth=4, kinds=("a",)).rows)[0]
    points = places(drawing(by_depth), COLORS[0])
    assert len(points) == 8
    ours, rtn = points[:4], points[4:]
    assert max(x for x, _ in ours) < min(x for x, _ in rtn)
    steps = np.diff([x for x, _ in ours])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)
    # RTN is twice as far off at each depth, which is as far on the axis as from depth 0 to depth 1.
    octave = ours[0][1] - ours[1][1]
    assert octave > 0
    np.testing.assert_allclose([a[1] - b[1] for a, b in zip(ours, rtn, strict=True)], octave, rtol=1e-4)


def test_models_without_an_integer_in_their_paths_have_no_plot_by_depth():
    assert [plot.caption.split(",")[0] for plot in plots([row("w"), row("v")])] == [
        "Relative output error by kind of weight",
        "Bits by kind of weight",
        "Time by kind of weight",
    ]


def test_thousands_of_kinds_are_listed_in_the_table_and_capped_in_plots():
    report = report_of(*(row(f"layers.{i % 2}.expert_{i}", relative_error=1e-6 * (i + 1)) for i in range(2000)))
    text = report_html(report)
    page = Page(text)
    assert page.counts["tr"] == 2001
    by_depth, by_kind, *_ = plots(report.rows)
    assert by_depth.caption.endswith(f"(the {len(COLORS)} largest of 2000 kinds)")
    assert by_kind.caption.endswith(f"(the {LISTED} largest of 2000 kinds)")
    assert len(by_depth.legend) == len(COLORS)
    assert len(places(drawing(by_kind), COLORS[0])) == LISTED


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([row()], 3),
        ([row(relative_error=math.nan, rtn_error=math.nan)], 2),
        ([row(relative_error=math.inf, rtn_error=0.0, seconds=0.0)], 1),
        ([row(relative_error=-1e-9), row("layers.1.mlp.up.kernel", rtn_error=math.nan)], 4),
        ([row("layers.*.w"), row("layers.3.w"), row("layers.4.w")], 4),
        ([row(shape=(0, 4), nbytes=0)], 2),
        ([row(f"{'very_' * 40}{i}.long.日本") for i in range(3)], 3),
        ([row(), row("layers.1.mlp.up.kernel", method="rtn")], 4),
        ([], 0),
    ],
    ids=["one", "no error", "no number", "partly", "a star", "no element", "long and wide", "two methods", "none"],
)
def test_odd_reports_have_a_page(rows, count):
    page = Page(report_html(report_of(*rows)))
    assert page.counts.get("svg", 0) == count
    assert "nan" not in page.text


def test_plots_leave_no_global_state_and_matplotlib_is_not_imported_before():
    code = """
import sys
import jgptq.report
from jgptq.quantize import Report, Row
assert "matplotlib" not in sys.modules
import matplotlib
matplotlib.rcParams["font.size"] = 33
before = dict(matplotlib.rcParams)
row = Row(path="w", shape=(2, 2), method="gptq", bits=4, group_size=2, symmetric=False, nbytes=9, tokens=9, loss=1.0,
    relative_error=0.1, rtn_error=0.2, damp=0.01, seconds=1.0, notes=())
jgptq.report.report_html(Report(rows=(row,), skipped=(), seconds=1.0, programs=1))
assert dict(matplotlib.rcParams) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
