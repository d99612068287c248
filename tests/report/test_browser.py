"""Reports opened in headless Chromium."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OVERVIEW = "#overview .plot"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install the package chromium to open reports"),
]


@pytest.fixture
def visit(browser, report_file):
    """``visit(kind, ...)`` opens a report; afterwards: no request left the disk and the console stayed silent."""
    contexts, trouble = [], []

    def open_page(kind, fragment="", script=True, **options):
        context = browser.new_context(java_script_enabled=script, **options)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else trouble.append(request.url)
            ),
        )
        page.on(
            "console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(report_file(kind).as_uri() + fragment)
        if script:
            wait_for_charts(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def wait_for_charts(page):
    """Until the three overview charts are drawn, on a narrow screen one by one, and the table stands."""
    for index in range(3):
        page.locator(OVERVIEW).nth(index).scroll_into_view_if_needed()
        page.locator(f"{OVERVIEW}[data-drawn]").nth(index).wait_for()
    page.locator("#cells[data-ready]").wait_for(state="attached")


def visible_traces(page):
    """Names of the series that each overview chart shows."""
    return page.evaluate(
        f"[...document.querySelectorAll('{OVERVIEW}')].map(plot => [...new Set(plot.data.filter(t => t.visible)"
        ".map(t => t.meta.series))].sort())"
    )


@pytest.mark.parametrize(("kind", "scheme"), [("scaling", "light"), ("memory", "dark"), ("hostile", "dark")])
def test_a_report_is_quiet_offline_and_accessible(visit, kind, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(kind, color_scheme=scheme)
    page.locator("#cells tbody tr").first.click()
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    found = [
        (violation["id"], violation["nodes"][0]["html"][:200])
        for violation in Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert found == []


def test_hostile_texts_do_nothing_and_stay_readable(visit):
    page = visit("hostile")
    assert page.evaluate("document.querySelectorAll('main img:not(.formulas img), textarea, b script').length") == 0
    for row in range(9):
        page.locator("#cells tbody tr:not(.detail)").nth(row).click()
    assert page.locator("tr.detail").count() == 9
    assert "<script>alert(1)</script>" in page.locator("#cells").text_content()
    assert page.title().startswith("emoji")


def test_hover_shows_the_escaped_reason_of_a_missing_point(visit):
    page = visit("hostile")
    text = page.evaluate(
        """() => {
            const plot = document.querySelector('#overview .plot');
            const curve = plot.data.findIndex(t => t.meta.role === 'missing' && t.meta.series.includes('evil<script>'));
            Plotly.Fx.hover(plot, [{curveNumber: curve, pointNumber: 0}], ['xy2']);
            return plot.querySelector('.hoverlayer').textContent;
        }"""
    )
    assert "<script>alert(1)</script>" in text
    assert "error" in text


def test_the_legend_hides_a_series_in_all_charts_and_isolates_it(visit):
    page = visit("scaling")
    chip = page.locator('#overview .chip[data-series="dense / blocked"]')
    assert all("dense / blocked" in shown for shown in visible_traces(page))
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert not any("dense / blocked" in shown for shown in visible_traces(page))
    chip.dblclick()
    assert visible_traces(page) == [["dense / blocked"]] * 3
    chip.dblclick()
    assert all(len(shown) == 5 for shown in visible_traces(page))


def test_the_legend_works_from_the_keyboard(visit):
    page = visit("scaling")
    page.locator('#overview .chip[data-series="pyramid / blocked"]').focus()
    page.keyboard.press("Shift+Enter")
    assert visible_traces(page) == [["pyramid / blocked"]] * 3
    page.keyboard.press("Enter")
    assert visible_traces(page) == [[]] * 3


def test_implementations_are_chosen_in_all_charts_at_once(visit):
    page = visit("scaling")
    page.select_option("[name=impl]", "all")
    assert all(len(shown) >= 10 for shown in visible_traces(page))
    page.select_option("[name=impl]", "=reference")
    assert all({name.partition(" / ")[2] for name in shown} == {"reference"} for shown in visible_traces(page))


def test_linear_per_token_and_relative_values(visit):
    page = visit("scaling")
    axis = f"document.querySelector('{OVERVIEW}').layout.yaxis"
    series = "document.querySelector('#overview .plot').data.find(t => t.meta.series === 'dense / blocked')"
    absolute = page.evaluate(f"{series}.y[0]")
    page.select_option("[name=value]", "token")
    assert page.evaluate(f"{series}.y[0]") == pytest.approx(absolute / 1024)
    page.select_option("[name=value]", "/dense / blocked")
    assert page.evaluate(f"{series}.y[0]") == 1
    assert "\u00d7" in page.evaluate(f"{axis}.ticktext[0]")
    assert "not drawn" in page.locator("#overview-note").text_content()  # dense was not measured at 128k
    page.select_option("[name=value]", "absolute")
    page.select_option("[name=scale]", "linear")
    assert page.evaluate(f"{axis}.type") == "linear"
    assert page.evaluate(f"{axis}.range[0]") == 0


def test_the_state_of_the_charts_is_in_the_address(visit):
    page = visit("scaling")
    page.select_option("[name=scale]", "linear")
    fragment = page.evaluate("location.hash")
    again = visit("scaling", fragment)
    assert again.input_value("[name=scale]") == "linear"
    assert again.evaluate(f"document.querySelector('{OVERVIEW}').layout.xaxis.type") == "linear"


def test_a_memory_size_is_chosen_for_all_charts_over_the_length(visit):
    page = visit("memory")
    slider = page.locator("#overview [name=view]")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("#overview .slider output").text_content() == "128"
    smallest = page.evaluate("document.querySelector('#overview .plot').data[1].y[0]")
    page.keyboard.press("End")
    assert page.locator("#overview .slider output").text_content() == "2k"
    assert page.evaluate("document.querySelector('#overview .plot').data[1].y[0]") != smallest
    assert "view=" in page.url


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_the_theme_follows_the_system_and_the_switch(visit, scheme, other):
    page = visit("scaling", color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    grid = f"document.querySelector('{OVERVIEW}').layout.xaxis.gridcolor"
    first = page.evaluate(background), page.evaluate(grid)
    for _ in range(3):
        page.keyboard.press("t")
        if page.locator("#theme").text_content() == f"Theme: {other}":
            break
    second = page.evaluate(background), page.evaluate(grid)
    assert first[0] != second[0]
    assert first[1] != second[1]
    page.reload()
    wait_for_charts(page)
    assert page.evaluate(background) == second[0]


def test_the_table_filters_and_counts(visit):
    page = visit("scaling")
    page.keyboard.press("/")
    page.keyboard.type("dense oom")
    assert page.locator("#cells tbody tr:visible").count() == 1
    assert page.locator("#matches").text_content() == "1 of 96 cells"


def test_the_table_sorts_by_value_with_empty_cells_last(visit):
    page = visit("scaling")
    head = page.locator('th[data-name="latency_s"]')
    column = "[...document.querySelectorAll('#cells tbody tr')].map(row => +(row.cells[5].dataset.v ?? Infinity))"
    head.locator("button").click()
    up = page.evaluate(column)
    assert head.get_attribute("aria-sort") == "ascending"
    assert up == sorted(up)
    head.locator("button").click()
    down = page.evaluate(column)
    numbers = [value for value in down if math.isfinite(value)]
    assert numbers == sorted(numbers, reverse=True)
    assert down[: len(numbers)] == numbers
    assert page.locator("#cells tbody tr").last.locator("td").nth(5).text_content() == ""


def test_a_row_opens_its_own_samples_from_the_keyboard_even_after_sorting(visit):
    page = visit("scaling")
    page.locator('th[data-name="latency_s"] button').click()
    row = page.locator("#cells tbody tr").first
    method = row.locator("td").first.inner_text().replace("\u25b8", "").strip()
    row.locator("button").focus()
    page.keyboard.press("Enter")
    detail = page.locator("tr.detail")
    assert detail.locator("circle").count() == 27
    assert "precision" in detail.text_content()
    cell = detail.locator("code").last.text_content()
    rows = page.evaluate("unpack('#rows-data')").strip().splitlines()
    assert any(cell in line and f'"method":"{method}"' in line for line in rows)
    page.keyboard.press("Enter")
    assert detail.count() == 0


def test_the_visible_rows_are_copied(visit):
    page = visit("scaling", permissions=["clipboard-read", "clipboard-write"])
    page.fill("#filter", "dense blocked 1k")
    for kind, start in (("markdown", "| method |"), ("latex", "\\begin{tabular}"), ("csv", "method,")):
        page.locator(f"[data-table={kind}]").click()
        page.get_by_text("Copied", exact=True).wait_for()
        text = page.evaluate("navigator.clipboard.readText()")
        assert text.startswith(start)
        assert "dense" in text
        assert "longformer" not in text


def test_the_rows_are_downloaded(visit, run_folder):
    page = visit("scaling")
    with page.expect_download() as download:
        page.locator("#download").click()
    lines = download.value.path().read_text().splitlines()
    assert sorted(lines) == sorted((run_folder("scaling") / "rows.jsonl").read_text().splitlines())


@pytest.mark.parametrize("kind", ["memory", "hostile"])
def test_a_narrow_screen_scrolls_in_one_direction_only(visit, kind):
    page = visit(kind, viewport={"width": 360, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_labels_neither_collide_nor_leave_their_chart_on_wide_and_narrow_screens(visit):
    for width in (1280, 360):
        page = visit("scaling", viewport={"width": width, "height": 800})
        overlaps = page.evaluate(
            """[...document.querySelectorAll('#overview .plot')].flatMap(plot =>
                [['.xtick text', 'right', 'left'], ['.ytick text', 'bottom', 'top']].flatMap(([which, end, start]) => {
                    const boxes = [...plot.querySelectorAll(which)].map(node => node.getBoundingClientRect())
                        .sort((a, b) => a[start] - b[start]);
                    return boxes.slice(1).filter((box, i) => box[start] < boxes[i][end] - 1).map(() => which);
                }))"""
        )
        assert overlaps == []
        outside = page.evaluate(
            """[...document.querySelectorAll('#overview .plot')].flatMap(plot => {
                const frame = plot.getBoundingClientRect();
                return [...plot.querySelectorAll('.ytick text, .xtick text')].map(node => node.getBoundingClientRect())
                    .filter(box => box.left < frame.left - 1 || box.right > frame.right + 1);
            }).length"""
        )
        assert outside == 0


def test_a_phone_has_room_for_curves_below_the_strip_and_short_legends(visit):
    for width, least in ((390, 0.75), (1280, 0.65)):
        page = visit("scaling", viewport={"width": width, "height": 800})
        page.select_option("[name=impl]", "all")
        shares, lanes = page.evaluate(
            f"""(() => {{
                const plots = [...document.querySelectorAll('{OVERVIEW}')];
                const missing = plots[0].data.filter(trace => trace.meta.role === 'missing' && trace.visible);
                return [plots.map(plot => plot.layout.yaxis.domain[1]), missing.length];
            }})()"""
        )
        assert lanes > 5
        assert min(shares) >= least
    page = visit("scaling", viewport={"width": 390, "height": 800})
    assert page.locator("#overview .chip:visible").count() > 5
    assert page.locator("#roofline .legend .name:visible").count() == 0
    page.locator("#roofline .legends summary").click()
    assert page.locator("#roofline .legend .name:visible").count() == 5
    assert page.locator("#roofline .chip:visible").count() == 0


def test_later_legends_leave_out_what_was_never_timed(visit):
    page = visit("scaling")
    untimed = '.chip[data-series="longformer / triton"]'
    assert page.locator(f"#overview {untimed}").count() == 1
    assert page.locator(f"#roofline {untimed}").count() == 0
    assert page.locator('#roofline .chip[data-series="longformer / blocked"]').count() == 1


def test_on_a_narrow_screen_the_names_of_rows_stand_above_them_inside_the_chart(visit):
    page = visit("scaling", viewport={"width": 360, "height": 740})
    page.locator("#crossovers .plot").scroll_into_view_if_needed()
    page.wait_for_selector("#crossovers .plot[data-drawn] .annotation-text")
    names, boxes, frame = page.evaluate(
        """(() => {
            const plot = document.querySelector('#crossovers .plot');
            const box = node => node.getBoundingClientRect().toJSON();
            const names = [...plot.querySelectorAll('.annotation-text')];
            return [plot.layout.yaxis.ticktext, names.map(box), box(plot)];
        })()"""
    )
    assert len(boxes) == len(names) > 0
    assert page.locator("#crossovers .ytick text").count() == 0
    assert all(frame["left"] - 1 <= box["left"] and box["right"] <= frame["right"] + 1 for box in boxes)
    tops = sorted(boxes, key=lambda box: box["top"])
    assert all(upper["bottom"] <= lower["top"] + 1 for upper, lower in itertools.pairwise(tops))


def test_printed_tables_fit_a_page_in_landscape(visit):
    page = visit("scaling", viewport={"width": 1040, "height": 720})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    for table in ("#cells", "#audit table"):
        edges = page.eval_on_selector_all(table, "nodes => nodes.map(node => node.getBoundingClientRect().right)")
        assert max(edges) <= 1040


def test_without_javascript_figures_and_tables_are_there(visit):
    page = visit("scaling", script=False)
    assert page.locator("#overview figure svg").count() == 3
    assert page.locator("#cells tbody tr").count() == 96
    assert page.locator("#theme").is_hidden()
    assert page.locator("figure svg").first.bounding_box()["width"] > 200


def test_charts_far_below_are_drawn_when_they_come_near(visit):
    page = visit("scaling", viewport={"width": 1280, "height": 700})
    last = page.locator("#model .card > .chart .plot").last
    assert last.locator(".main-svg").count() == 0
    last.scroll_into_view_if_needed()
    last.locator(".main-svg").first.wait_for(state="attached")
    assert page.evaluate("[...document.querySelectorAll('#model .card > .chart .plot')].pop().data.length") == 5


def test_an_impl_that_does_not_stand_for_its_method_is_folded_and_drawn_when_opened(visit):
    page = visit("scaling")
    fold = page.locator("#model .folded").first
    assert "slope" in fold.locator("summary").first.text_content()
    assert fold.locator(".plot .main-svg").count() == 0
    fold.locator("summary").first.click()
    fold.locator(".plot .main-svg").first.wait_for(state="visible")
    assert "Slope over all lengths" in fold.text_content()


def test_symbols_of_missing_points_stand_three_abreast_at_their_length(visit):
    page = visit("scaling")
    page.select_option("[name=impl]", "all")
    for scale in ("log", "linear"):
        page.select_option("[name=scale]", scale)
        points = page.evaluate(
            f"""document.querySelector('{OVERVIEW}').data.filter(t => t.meta.role === 'missing' && t.visible)
                .flatMap(t => t.x.map((x, i) => [x, t.y[i], t.text[i]]))"""
        )
        at_end = [(x, y) for x, y, text in points if " at 128k tokens" in text]
        assert len(set(at_end)) == len(at_end) == 9  # none covers another
        assert {round(y) for _, y in at_end} == {0, 1, 2}
        assert all(0.7 < x / (128 * 1024) < 1.3 for x, _ in at_end)


def test_the_first_legend_shows_what_was_not_measured_when_asked(visit):
    page = visit("scaling")
    chip = page.locator('#overview .chip[data-series="longformer / triton"]')
    assert chip.is_hidden()
    page.locator("#untimed").click()
    assert chip.is_visible()


def test_lengths_stay_level_on_paper(visit):
    page = visit("scaling")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    ticks = "[...document.querySelector('#overview .plot').querySelectorAll('.xtick text')]"
    found = page.evaluate(
        f"{ticks}"
        ".map(node => ({ turn: node.getAttribute('transform') || '', box: node.getBoundingClientRect().toJSON() }))"
    )
    assert len(found) >= 4
    assert all("rotate" not in tick["turn"] or "rotate(0" in tick["turn"] for tick in found)
    assert all(one["box"]["right"] <= other["box"]["left"] for one, other in itertools.pairwise(found))


def test_printing_uses_the_light_theme_and_draws_every_chart(visit):
    page = visit("scaling", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("[...document.querySelectorAll('.plot')].every(plot => plot.data)")
    fits = "[...document.querySelectorAll('.plot')].every(plot => plot._fullLayout.width <= plot.clientWidth + 1)"
    assert page.evaluate("document.body.clientWidth") <= 705
    assert page.evaluate(fits)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.body.clientWidth") > 705
    assert page.evaluate(f"document.querySelector('{OVERVIEW}')._fullLayout.width") > 250
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"


def test_a_chart_without_a_library_falls_back_to_its_static_figure(visit, report_file, tmp_path):
    import re

    page_text = re.sub(r'id="plotly-data">[^<]*<', 'id="plotly-data"><', report_file("memory").read_text())
    broken = tmp_path / "broken.html"
    broken.write_text(page_text)
    page = visit("memory")
    page.goto(broken.as_uri())
    page.locator("#overview .plot > svg").first.wait_for()
    assert page.locator("#overview .plot > svg").count() == 3
