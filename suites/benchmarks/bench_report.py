"""How long a report takes to be made, and in headless Chromium to be ready and to show its first chart and its table.

``python -m ctxbench.suites.benchmarks.bench_report RUN`` prints both for a run folder, on an idle machine. It needs
Chromium and the package playwright.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ctxbench.errors import CtxbenchError, EnvironmentUnusable

LIMIT_S = 1.5  # to answer to a reader, and to show the first chart
WIDTH, HEIGHT = 1280, 800
WATCH = """
window.seen = {};
new MutationObserver((_, observer) => {
  const note = (name, selector) => { if (document.querySelector(selector)) seen[name] ??= performance.now(); };
  note("chart", ".plot[data-drawn] .main-svg");
  note("table", "#cells[data-ready]");
  if (seen.table) observer.disconnect();
}).observe(document, { subtree: true, childList: true, attributes: true });
"""
READ = """({ ready: performance.timing.domInteractive - performance.timing.navigationStart, ...seen })"""


def opened(page: Path, repeats: int = 5) -> dict[str, float]:
    """Median seconds from the call of a page until it answers, until its first chart, and until its table stands.

    Raises:
        EnvironmentUnusable: without a browser.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        browser = None
    if browser is None:
        raise EnvironmentUnusable("opening a page needs Chromium and the package playwright\n  pip install playwright")
    found: list[dict[str, float]] = []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            context = launched.new_context(viewport={"width": WIDTH, "height": HEIGHT})
            tab = context.new_page()
            tab.add_init_script(WATCH)
            tab.goto(page.resolve().as_uri())
            tab.locator("#cells[data-ready]").wait_for(state="attached")
            found.append(tab.evaluate(READ))
            context.close()
        launched.close()
    return {name: statistics.median(times[name] for times in found) / 1e3 for name in ("ready", "chart", "table")}


def main() -> int:
    """Print the times; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(prog="python -m ctxbench.suites.benchmarks.bench_report", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    from ctxbench.reports.page import write

    show = sys.stdout.write
    with tempfile.TemporaryDirectory() as place:
        try:
            started, spent = time.perf_counter(), time.process_time()
            page = write([arguments.run], Path(place) / "report.html")
            show(f"made in {time.perf_counter() - started:.2f} s ({time.process_time() - spent:.2f} s of CPU), "
                 f"{page.stat().st_size / 1e6:.2f} MB\n")  # fmt: skip
            times = opened(page, arguments.repeats)
        except CtxbenchError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code
    show(f"opened on {WIDTH} x {HEIGHT} (limit {LIMIT_S} s)\n")
    reached = max(times["ready"], times["chart"]) < LIMIT_S
    for name, words in (("ready", "answers"), ("chart", "first chart"), ("table", "table, without a limit")):
        show(f"  {words:24} {times[name]:6.2f} s\n")
    show("every limit kept\n" if reached else "some limits were missed\n")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
