"""The sections beyond the overview, in headless Chromium: sliders, choices, columns, comparison, trends."""

from __future__ import annotations

import json
import shutil

import pytest

from ctxbench.analysis import reach
from ctxbench.reports.page import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install the package chromium to open reports"),
]
DRAWN = "document.querySelectorAll('.plot').forEach(plot => draw(plot))"


def until(page, expression):
    """Wait; the page's own policy forbids the evaluation of strings that Playwright's waiting needs."""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {expression}")


def opened(browser, path, fragment="", **options):
    """A page with all charts drawn, and the list of what went wrong in it."""
    page, trouble = browser.new_context(**options).new_page(), []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else
            trouble.append(request.url))  # fmt: skip
    page.goto(path.as_uri() + fragment)
    until(page, "Boolean(window.Plotly && document.querySelector('#cells[data-ready]'))")
    page.evaluate(DRAWN)
    return page, trouble


@pytest.fixture(scope="module")
def rich(browser, run_folder):
    """The report of a run with several memory sizes, crossings, ceilings and a map of reach; shared by the tests."""
    folder = run_folder("rich")
    rows = [f"{(1 << (i + 1)) - 1:x}" for i in range(16)]
    window = [f"{((1 << 4) - 1) << max(0, i - 3) & ((1 << (i + 1)) - 1):x}" for i in range(16)]
    dims = {"num_layers": 1}
    reach.write(folder, [
        reach.ReachMap(method="dense", impl="reference", seq_len=16, params={}, dims=dims, gradient=rows, values=rows),
        reach.ReachMap(method="longformer", impl="reference", seq_len=16, params={"window": 4}, dims=dims,
                       gradient=window, values=window, claimed=rows),
    ])  # fmt: skip
    page, trouble = opened(browser, write([folder]), permissions=["clipboard-read", "clipboard-write"])
    yield page
    page.context.close()
    assert trouble == []


@pytest.fixture(scope="module")
def twins(browser, twin_folders, tmp_path_factory):
    page, trouble = opened(browser, write(twin_folders, tmp_path_factory.mktemp("pages") / "twins.html"))
    yield page
    page.context.close()
    assert trouble == []


def of(page, section, what, index=0):
    """An expression on one chart of a section."""
    return page.evaluate(f"(() => {{ const plot = document.querySelectorAll('#{section} .plot')[{index}];"
                         f" return {what}; }})()")  # fmt: skip


def test_the_length_of_the_trade_offs_is_a_slider(rich):
    slider = rich.locator("#tradeoffs [name=at]")
    before = of(rich, "tradeoffs", "plot.data[1].x[0]")
    slider.focus()
    rich.keyboard.press("Home")
    assert of(rich, "tradeoffs", "plot.data[1].x[0]") < before
    assert rich.locator("#tradeoffs .slider output").text_content() == "1k"
    assert "at 1k tokens" in rich.locator("#tradeoffs figcaption").first.text_content()
    assert "at=0" in rich.url


def test_the_front_is_named_in_the_chart_and_beaten_points_are_hollow(rich):
    symbols = of(rich, "tradeoffs", "plot.data.slice(1).flatMap(t => t.marker.symbol)")
    assert any(symbol.endswith("-open") for symbol in symbols)
    assert any(not symbol.endswith("-open") for symbol in symbols)
    assert of(rich, "tradeoffs", "plot.layout.annotations.length") >= 1


def test_every_corner_of_the_front_keeps_its_point_whatever_is_shown(rich):
    filled = ("plot.data.slice(1).filter(t => t.visible).flatMap(t => t.x.map((x, i) => [t.marker.symbol[i], x]))"
              ".filter(([symbol]) => !symbol.endsWith('-open')).map(([, x]) => x)")  # fmt: skip
    rich.select_option("[name=impl]", "=reference")
    assert of(rich, "tradeoffs", "plot.data.some(t => t.visible === false)")
    corners = set(of(rich, "tradeoffs", "plot.data[0].x"))
    assert corners
    assert corners <= set(of(rich, "tradeoffs", filled))
    rich.select_option("[name=impl]", "fastest")


def test_the_baseline_of_the_crossovers_is_chosen(rich):
    before = of(rich, "crossovers", "JSON.stringify(plot.data.map(t => t.x))")
    assert "against dense / blocked" in rich.locator("#crossovers figcaption").first.text_content()
    choice = rich.locator("#crossovers [name=against]")
    wanted = choice.locator("option").filter(has_text="routing").first.get_attribute("value")
    choice.select_option(wanted)
    assert of(rich, "crossovers", "JSON.stringify(plot.data.map(t => t.x))") != before
    assert "against routing / blocked" in rich.locator("#crossovers figcaption").first.text_content()
    choice.select_option("0")


def test_a_crossing_says_where_it_is_with_its_interval(rich):
    texts = of(rich, "crossovers", "plot.data.filter(t => t.meta.role === 'mark').flatMap(t => t.text)")
    assert any("90 % interval" in text and "beyond" in text for text in texts)


def test_the_winners_are_shown_for_every_length_and_memory_size(rich):
    assert rich.locator(".winners tbody tr").count() == 3
    assert rich.locator(".winners td").count() == 21
    assert rich.locator(".winners td b").first.text_content() == "dense"


def test_the_roofline_has_the_measured_ceiling_and_says_the_share_of_the_roof(rich):
    assert "90 GFLOP/s" in of(rich, "roofline", "plot.layout.annotations[0].text")
    texts = of(rich, "roofline", "plot.data.filter(t => t.meta.role === 'data').flatMap(t => t.text)")
    assert all("% of the roof there" in text.replace("\u2069<br>\u2068", " ") for text in texts)


def test_every_legend_hides_a_series_in_every_section(rich):
    visible = "plot.data.some(t => t.meta.series === 'longformer / blocked' && t.visible)"
    sections = ("overview", "memory", "roofline", "tradeoffs")
    assert all(of(rich, section, visible) for section in sections)
    rich.locator('#roofline .chip[data-series="longformer / blocked"]').click()
    assert not any(of(rich, section, visible) for section in sections)
    assert rich.locator('#overview .chip[data-series="longformer / blocked"]').get_attribute("aria-pressed") == "false"
    assert "off=longformer" in rich.url
    rich.locator('#memory .chip[data-series="longformer / blocked"]').click()
    assert all(of(rich, section, visible) for section in sections)


def test_hovering_says_value_interval_samples_and_why_sampling_stopped(rich):
    text = rich.evaluate(
        """() => {
            const plot = document.querySelector('#overview .plot');
            const curve = plot.data.findIndex(t => t.visible && t.meta.role === 'measured');
            Plotly.Fx.hover(plot, [{curveNumber: curve, pointNumber: 0}], ['xy']);
            return plot.querySelector('.hoverlayer').textContent;
        }"""
    )
    for part in ("(median)", "interval", "27 samples in 3 processes", "2 x precision"):
        assert part in text


def test_a_slider_moves_both_charts_of_the_memory_sizes(rich):
    slider = rich.locator("#memory [name=length]")
    slider.focus()
    rich.keyboard.press("Home")
    assert all("at 1k tokens" in text for text in rich.locator("#memory figcaption").all_text_contents())
    first = of(rich, "memory", "plot.data[0].y[0]")
    rich.keyboard.press("ArrowRight")
    assert of(rich, "memory", "plot.data[0].y[0]") > first
    assert "length=1" in rich.url


def test_columns_are_chosen_and_only_those_are_copied(rich):
    rich.locator(".menu summary").click()
    rich.locator('#picker input[value="latency_low_s"]').check()
    rich.locator('#picker input[value="warnings"]').uncheck()
    rich.keyboard.press("Escape")
    assert rich.locator('th[data-name="latency_low_s"]').is_visible()
    assert not rich.locator('th[data-name="warnings"]').is_visible()
    assert "columns=latency_low_s" in rich.url
    rich.locator("[data-table=csv]").click()
    rich.get_by_text("Copied", exact=True).wait_for()
    head = rich.evaluate("navigator.clipboard.readText()").splitlines()[0].split(",")
    assert "low" in head
    assert "warnings" not in head


def test_arrows_walk_from_section_to_section(rich):
    rich.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    rich.locator("h1").click()
    rich.keyboard.press("ArrowRight")
    assert rich.evaluate("document.activeElement.id") == "overview-heading"
    until(rich, "document.querySelector('#overview').getBoundingClientRect().top < innerHeight / 3")
    rich.keyboard.press("ArrowRight")
    assert rich.evaluate("document.activeElement.id") == "model-heading"
    assert "#model" in rich.url


def test_reach_is_a_picture_that_tells_what_is_claimed_but_not_seen(rich):
    cards = rich.locator("#methods .reaches")
    assert cards.count() == 2
    assert cards.nth(0).locator("path").count() == 1
    assert cards.nth(1).locator("path.claimed").count() == 1
    assert "named by the method, not seen" in cards.nth(1).text_content()


def test_the_address_restores_the_whole_state(browser, rich, report_file):
    fragment = "#table?value=token&scale=linear&off=dense+/+blocked&q=routing&sort=-latency_s&at=2&against=1"
    page, trouble = opened(browser, report_file("rich"), fragment)
    assert page.locator("[name=value]").input_value() == "token"
    assert page.locator("#tradeoffs .slider output").text_content() == "4k"
    assert page.locator("[name=against]").input_value() == "1"
    assert page.locator('#overview .chip[data-series="dense / blocked"]').get_attribute("aria-pressed") == "false"
    shown = page.evaluate(
        "[...document.querySelectorAll('#cells tbody tr:not([hidden])')].map(r => +r.cells[5].dataset.v)"
    )
    assert len(shown) == 21
    assert shown == sorted(shown, reverse=True)
    assert page.url.endswith(fragment.replace("+/+", "+%2F+")) or all(
        part in page.url for part in ("#table?", "value=token", "scale=linear", "q=routing", "sort=-latency_s", "at=2")
    )
    page.context.close()
    assert trouble == []


def test_motion_is_reduced_where_the_system_asks_for_it(browser, report_file):
    page, _ = opened(browser, report_file("rich"), reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.context.close()


def test_two_runs_are_compared_with_verdicts_in_words_and_colour(twins):
    assert twins.locator("#compare .verdict.bad").first.text_content().strip().endswith("slower")
    slower = twins.locator("#compare tbody tr").filter(has_text="slower")
    assert slower.count() == 8
    assert all("blocked" in text for text in slower.locator("th").all_text_contents())
    assert "1.2" in slower.first.locator("td").nth(3).text_content()
    assert twins.locator("#compare tbody tr").filter(has_text="= same").count() > 10
    assert of(twins, "compare", "plot.data.length") == 2 * of(twins, "compare", "plot.data.length - 3", 1)
    texts = of(twins, "compare", "plot.data.flatMap(t => t.text)", 1)
    assert any("16 and 16 processes" in text for text in texts)


@pytest.mark.parametrize(("which", "scheme"), [("rich", "light"), ("twins", "dark")])
def test_the_sections_are_accessible_in_both_themes(request, which, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = request.getfixturevalue(which)
    page.emulate_media(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    found = [
        (violation["id"], violation["nodes"][0]["html"][:200])
        for violation in Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    ]
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = false; })")
    assert found == []


@pytest.mark.parametrize("which", ["rich", "twins"])
def test_a_phone_scrolls_in_one_direction_only(request, which):
    page = request.getfixturevalue(which)
    size = page.viewport_size
    page.set_viewport_size({"width": 400, "height": 800})
    until(page, "document.documentElement.scrollWidth <= 400")
    page.set_viewport_size(size)


def test_five_hundred_cells_stay_within_their_budget_and_all_charts_are_drawn(browser, report_file):
    path = report_file("huge")
    assert path.stat().st_size <= 5e6
    page, trouble = opened(browser, path)
    assert page.locator("#cells tbody tr").count() == 496
    assert page.evaluate("[...document.querySelectorAll('.plot')].every(plot => plot.data)")
    page.context.close()
    assert trouble == []


def test_more_runs_of_a_machine_become_trends(browser, twin_folders, tmp_path):
    third = tmp_path / "third"
    shutil.copytree(twin_folders[1], third)
    for index, folder in enumerate([*twin_folders, third]):
        info = json.loads((folder / "run.json").read_text()) | {"created_at": f"2026-01-0{index + 1}T00:00:00Z"}
        (folder / "run.json").write_text(json.dumps(info))
    page, trouble = opened(browser, write([*twin_folders, third], tmp_path / "trends.html"))
    assert of(page, "history", "plot.layout.xaxis.ticktext").__len__() == 3
    ratios = of(page, "history", "plot.data.find(t => t.meta.series === 'longformer / blocked').y")
    assert ratios[0] == 1
    assert ratios[1] == pytest.approx(1.2, rel=0.02)
    steps = page.get_by_role("region", name="Steps, the newest first").locator("tbody tr")
    assert steps.count() == 8  # two methods at four lengths, at the second run alone
    assert {text.split(",")[0] for text in steps.locator("th").all_text_contents()} == {
        "longformer / blocked", "transformer_xl / blocked"}  # fmt: skip
    for line in steps.all():
        _, made_at, run, change, ratio, interval = line.locator("td").all_text_contents()
        low, high = map(float, interval.split(" to "))
        assert (made_at, run, change) == ("2026-01-02 00:00", "after", "slower")
        assert float(ratio) == pytest.approx(1.2, rel=0.02)
        assert low <= float(ratio) <= high
    assert page.locator("#compare").count() == 0
    page.context.close()
    assert trouble == []
