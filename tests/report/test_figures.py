"""Figures as data: no browser needed."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest

from ctxbench.analysis.frame import to_frame, views
from ctxbench.analysis.runs import read_run
from ctxbench.reports import palette
from ctxbench.reports.figures import canvas, memory, model, overview, scales
from ctxbench.reports.figures.plotly_json import hover
from ctxbench.reports.figures.points import FLOPS, LATENCY, MEMORY, points

BUILT_IN = ("dense", "longformer", "memory_bank", "pyramid", "transformer_xl")


@pytest.fixture(scope="module")
def scaling(run_folder):
    return views(to_frame([read_run(run_folder("scaling"))]))[0].frame


@pytest.fixture(scope="module")
def swept(run_folder):
    return to_frame([read_run(run_folder("memory"))])


@pytest.mark.parametrize("metric", [LATENCY, MEMORY, FLOPS], ids=lambda metric: metric.key)
def test_every_row_is_in_every_chart_measured_forecast_or_missing_with_its_reason(scaling, metric):
    table = points(scaling, metric)
    drawn = set(zip(table["series"], table["seq_len"], strict=True))
    assert drawn == set(zip(scaling["series"], scaling["seq_len"], strict=True))
    missing = table[table["kind"] == "missing"]
    reasons = dict(zip(zip(scaling["series"], scaling["seq_len"], strict=True), scaling["reason"], strict=True))
    for point in missing.to_dict("records"):
        assert reasons[point["series"], point["seq_len"]] in point["hover"]


def test_a_skipped_cell_is_a_hollow_forecast_and_a_symbol(scaling):
    figure = overview.interactive(points(scaling, LATENCY), LATENCY, palette.looks(scaling))
    roles = {(t["meta"]["series"], t["meta"]["role"]): t for t in figure["data"]}
    forecast = roles["dense / blocked", "forecast"]
    assert forecast["marker"]["symbol"].endswith("-open")
    assert forecast["x"][-2:] == [64 * 1024, 128 * 1024]
    missing = roles["dense / blocked", "missing"]
    assert missing["marker"]["symbol"] == ["bowtie-open", "triangle-right-open"]
    assert "exceeds --cell-timeout" in missing["text"][1].replace("\u2069<br>\u2068", " ")
    assert ("longformer / triton", "forecast") not in roles
    assert len(roles["longformer / triton", "missing"]["x"]) == 8


def test_a_gap_breaks_the_line_instead_of_being_drawn_over(scaling):
    holed = scaling[scaling["series"] == "dense / blocked"].copy()
    holed.loc[holed["seq_len"] == 4096, ["status", "forecast_s"]] = ["error", math.nan]
    trace = overview.interactive(points(holed, LATENCY), LATENCY, palette.looks(holed))["data"][0]
    assert trace["y"][2] is None
    assert trace["connectgaps"] is False


def test_error_bars_are_the_interval(scaling):
    row = scaling[scaling["latency_s"].notna()].iloc[0]
    traces = overview.interactive(points(scaling, LATENCY), LATENCY, palette.looks(scaling))["data"]
    trace = next(t for t in traces if t["meta"] == {"role": "measured", "series": row["series"]})
    assert trace["error_y"]["array"][0] == pytest.approx(row["latency_high_s"] - row["latency_s"])
    assert trace["error_y"]["arrayminus"][0] == pytest.approx(row["latency_s"] - row["latency_low_s"])


def test_only_the_series_asked_for_are_visible_at_first(scaling):
    shown = {"dense / blocked"}
    table = points(scaling, LATENCY)
    traces = overview.interactive(table, LATENCY, palette.looks(scaling), shown)["data"]
    assert {t["meta"]["series"] for t in traces if t["visible"]} == shown
    assert len({t["meta"]["series"] for t in traces}) == scaling["series"].nunique()


def test_the_model_figure_has_points_line_residuals_and_two_kinds_of_slopes(scaling):
    table = model.data(scaling[scaling["series"] == "dense / blocked"])
    traces = model.interactive(table, palette.styles(["dense"])["dense"])["data"]
    line, measured, residual, formula, slope = traces
    assert len(line["x"]) == 8  # the model reaches over the lengths that were not measured
    assert len(measured["x"]) == len(residual["x"]) == 6
    assert len(slope["x"]) == len(formula["x"]) == 5
    assert slope["y"] == pytest.approx(formula["y"], abs=0.15)
    assert all(abs(percent) < 10 for percent in residual["y"])


def test_heat_map_cells_are_measured_or_carry_the_status(swept):
    rows = swept[swept["series"] == "longformer / blocked"]
    lengths, sizes, cells = memory.grid(memory.data(rows, LATENCY))
    assert (lengths, sizes) == ([1024, 2048, 4096, 8192], [128, 256, 512, 1024, 2048])
    assert cells[4][0]["status"] == "unsupported"
    assert cells[0][0]["kind"] == "measured"


def test_cost_at_one_length_leaves_out_methods_without_a_memory_size(swept):
    table = memory.at_length(swept, 8192, MEMORY)
    assert set(table["method"]) == {"longformer", "memory_bank"}
    assert sorted(table["memory"].unique()) == [128, 256, 512, 1024, 2048]


def test_figure_json_is_plain(scaling, swept):
    looks = palette.looks(scaling)
    text = json.dumps(overview.interactive(points(scaling, MEMORY), MEMORY, looks), default=lambda value: value.item())
    assert '"template": null' in text
    assert json.loads(text)["layout"]["showlegend"] is False


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ((1e-3, 1.0), "s", ["1 ms", "10 ms", "100 ms", "1 s"]),
        ((2**20, 2**24), "B", ["1 MiB", "2 MiB", "4 MiB", "8 MiB", "16 MiB"]),
        ((72 * 2**20, 80 * 2**20), "B", ["72 MiB", "76 MiB", "80 MiB"]),
        ((1e9, 2e13), "FLOP", ["1 GFLOP", "10 GFLOP", "100 GFLOP", "1 TFLOP", "10 TFLOP"]),
        ((0.9, 1.5), "s", ["1 s", "1.2 s", "1.4 s"]),
    ],
    ids=["decades", "powers-of-two", "narrow-bytes", "flops", "narrow-seconds"],
)
def test_ticks_carry_units_and_are_round(values, unit, expected):
    texts = scales.log_ticks(values, unit)[1]
    assert [text for text in texts if text in expected] == expected
    assert len(texts) <= len(expected) + 2


@pytest.mark.parametrize("low", [1e-7, 3e-4, 0.02, 5.0, 700.0])
@pytest.mark.parametrize("factor", [1.0, 1.01, 1.5, 4, 30, 1e4])
@pytest.mark.parametrize("unit", ["s", "B", "FLOP"])
def test_every_range_gets_two_to_ten_ticks(low, factor, unit):
    positions, texts = scales.log_ticks([low, low * factor], unit)
    assert 2 <= len(positions) <= 10
    assert len(set(texts)) == len(texts)


def test_token_ticks_are_the_measured_lengths_or_powers_of_two():
    assert scales.token_ticks([1024 * 2**i for i in range(8)])[1] == [
        "1k",
        "2k",
        "4k",
        "8k",
        "16k",
        "32k",
        "64k",
        "128k",
    ]
    assert scales.token_ticks(range(1024, 8193, 512))[1] == ["1k", "2k", "4k", "8k"]
    assert scales.token_ticks([1000])[1] == ["1000"]


def test_colours_keep_their_contrast_on_both_backgrounds():
    for color in palette.COLORS:
        assert palette.contrast(color, palette.LIGHT) >= 3
        assert palette.contrast(color, palette.DARK) >= 3


def test_the_background_of_the_style_sheet_is_the_one_that_was_checked():
    import importlib.resources

    css = (importlib.resources.files("ctxbench.reports") / "assets" / "report.css").read_text()
    assert set(re.findall(r"--bg: (#\w+)", css)) == {palette.LIGHT, palette.DARK}


def test_heat_map_text_is_readable_on_every_shade():
    assert all(palette.contrast(shade, memory.ink_on(shade)) >= 4.5 for shade in memory.RAMP)


def test_a_method_looks_the_same_in_every_report_of_the_built_in_five():
    alone = {name: palette.styles([name])[name] for name in BUILT_IN}
    assert palette.styles(BUILT_IN) == alone


def test_no_two_of_64_methods_look_alike():
    looks = palette.styles(f"method_{index}" for index in range(64))
    assert len(set(looks.values())) == 64


def test_series_of_one_method_share_its_colour_and_marker_and_differ_in_line(scaling):
    looks = palette.looks(scaling)
    mine = [looks[f"memory_bank / {impl}"] for impl in ("blocked", "reference", "as_written")]
    assert len({(look.color, look.marker) for look in mine}) == 1
    assert len({look.dash for look in mine}) == 3
    assert mine[0].width > mine[1].width


@pytest.mark.parametrize("text", ["<b>bold</b>", "a & b", "<a href='x'>", '"quoted"'])
def test_hover_text_is_inert(text):
    assert not re.search(r"<(?!br>)", hover(text))


def test_hover_text_of_any_length_stays_a_box():
    lines = hover("word " * 500 + "\n" + "x" * 500).split("<br>")
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 70


def test_static_svg_is_small_themed_stable_and_escaped(scaling):
    table = points(scaling, LATENCY)
    looks = palette.looks(scaling)
    first, second = (
        canvas.inline_svg(overview.static(table, LATENCY, looks), '"><script>alert(1)</script>') for _ in range(2)
    )
    assert first == second
    assert len(first) < 45_000
    assert "<script" not in first
    assert canvas.INK not in first  # texts take their ink from the page
    assert first.count("<g") == first.count("</g>")


def test_names_in_exported_figures_are_text_not_mathematics(scaling):
    renamed = scaling[scaling["series"] == "dense / blocked"].assign(series="$x_1$ <b> & \\frac{1}")
    svg = canvas.save(overview.static(points(renamed, LATENCY), LATENCY, palette.looks(renamed), legend=True), "svg")
    assert b"$x_1$ &lt;b&gt; &amp; \\frac{1}" in svg


def test_ticks_of_a_static_chart_do_not_collide(scaling):
    chart = overview.static(points(scaling, MEMORY), MEMORY, palette.looks(scaling))
    chart.canvas.draw()
    axes = chart.axes[1]
    for labels, edge in ((axes.get_xticklabels(), "x"), (axes.get_yticklabels(), "y")):
        boxes = [label.get_window_extent() for label in labels]
        for before, after in itertools.pairwise(boxes):
            assert (before.x1 < after.x0) if edge == "x" else (before.y1 < after.y0)
