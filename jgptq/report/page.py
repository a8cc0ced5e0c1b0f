"""A report as one HTML page that needs nothing else: no network, no scripts."""

import html
from collections.abc import Sequence

from jgptq.quantize import Report
from jgptq.report.plots import Plot, median, plots
from jgptq.report.record import totals
from jgptq.report.tables import COLUMNS, cells, number, printable


def report_html(report: Report, *, title: str = "Quantization report") -> str:
    """Totals, plots, every weight, what was left in float and why, and notes. Equal reports give equal text."""
    return PAGE.format(
        title=_escape(title),
        summary=_summary(report),
        plots="".join(map(_figure, plots(report.rows))) or "<p>Nothing to draw.</p>",
        weights=_table(("weight", *COLUMNS), [(row.path, *cells(row)) for row in report.rows]),
        skipped=_table(("weight", "why"), report.skipped) if report.skipped else "<p>None.</p>",
        notes="".join(f"<li>{_escape(note)}</li>\n" for note in report.notes) or "<li>None.</li>",
    )


def _summary(report: Report) -> str:
    total = totals(report)
    figures = {
        "weights quantized": f"{total['weights']:,}",
        "left in float": f"{len(report.skipped):,}",
        "parameters": f"{total['parameters']:,}",
        "bytes, packed": f"{total['nbytes']:,}",
        "bits with scales": number(total["bits_per_weight"], ".2f"),
        "median relative error": number(median(row.relative_error for row in report.rows), ".2e"),
        "median with RTN": number(median(row.rtn_error for row in report.rows), ".2e"),
        "sum of losses": number(total["loss"], ".4g"),
        "seconds": number(total["seconds"], ".1f"),
        "distinct programs": f"{report.programs:,}",
        "notes": f"{len(report.notes):,}",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>\n" for name, value in figures.items())


def _figure(plot: Plot) -> str:
    caption = _escape(plot.caption)
    legend = "".join(
        f'<span><b style="color:{sign.color}">{sign.shape}</b> {_escape(sign.text)}</span>' for sign in plot.legend
    )
    svg = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
    return f'<figure><figcaption>{caption}</figcaption>{svg}<p class="legend">{legend}</p></figure>\n'


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _escape(text: str) -> str:
    return html.escape(printable(text))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1d2127; --back: #ffffff; --line: #dfe3e8; --soft: #f5f7f9; --dim: #5c6570 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #dfe3e8; --back: #14171b; --line: #30363d; --soft: #1c2127; --dim: #98a2ad }}
}}
body {{ margin: 0 auto; max-width: 1200px; padding: 1rem; color: var(--text); background: var(--back);
  font: 15px/1.45 system-ui, sans-serif }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .6rem }}
dl, .plots {{ display: grid; gap: .6rem; margin: 0 }}
dl {{ grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)) }}
dl div, figure {{ background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem }}
dt, .legend, .dim {{ color: var(--dim); font-size: .85rem }}
dd {{ margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }}
.plots {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); align-items: start }}
figure {{ margin: 0; min-width: 0 }} figcaption {{ font-weight: 600; margin-bottom: .4rem }}
svg {{ display: block; width: 100%; height: auto; max-width: 600px; margin: 0 auto }}
svg text {{ font-family: system-ui, sans-serif !important }}
.legend {{ margin: .4rem 0 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem; overflow-wrap: anywhere }}
.wide {{ overflow: auto; max-height: 80vh; border: 1px solid var(--line); border-radius: 8px }}
table {{ border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }}
th {{ position: sticky; top: 0; background: var(--soft); text-align: right }}
th:first-child, td:first-child, #left td, #left th {{ text-align: left }}
td:first-child, #left td {{ white-space: normal; overflow-wrap: anywhere; min-width: 9rem }}
li {{ overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>{title}</h1>
<dl>
{summary}</dl>
<p class="dim">Relative error (rel. error): energy of the change in a product's output on the calibration data, over
the energy of that output. RTN error: the same, had the weight been rounded to nearest on the same grid. A dash: not
known.</p>
<h2>Plots</h2>
<div class="plots">
{plots}</div>
<h2>Weights, in order of solving</h2>
{weights}
<h2>Left in float</h2>
<div id="left">{skipped}</div>
<h2>Notes</h2>
<ul>{notes}</ul>
</body>
</html>
"""
