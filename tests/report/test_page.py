"""The page as text: sentences, tables, escaping, size, bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from sympy import Function, Piecewise, Symbol, floor, symbols

from ctxbench.analysis.frame import to_frame
from ctxbench.analysis.runs import read_run
from ctxbench.cli.report import command
from ctxbench.errors import RunFolderError
from ctxbench.method import Claim, Impl, Method
from ctxbench.registry import Entry, Registry
from ctxbench.reports import formulas, tables
from ctxbench.reports.page import render, unpack, write
from ctxbench.reports.publish import publish
from ctxbench.reports.report import Report
from ctxbench.reports.sections import model
from ctxbench.reports.sections.methods import paper_link
from ctxbench.reports.summary import sentences


def unpacked(page: str, name: str) -> str:
    data = re.search(rf'id="{name}">([^<]*)<', page)
    assert data is not None
    return unpack(data[1])


def test_the_page_asks_for_nothing_from_anywhere(report_file):
    page = report_file("scaling").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r'<(?:script|img|iframe|source)[^>]+src="(?!data:)', page)
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert "@import" not in page


def test_a_page_of_twenty_methods_stays_within_its_budget(report_file):
    assert report_file("large").stat().st_size <= 2.6e6


def test_static_figures_stand_in_for_every_chart(report_file):
    page = report_file("scaling").read_text()
    charts = re.findall(r'data-figure="([^"]+)"', page)
    reached = {chart.partition("-")[0] for chart in charts}  # others are reached by sliders and choices
    figures = set(json.loads(unpacked(page, "figures-data")))
    assert set(charts) <= figures
    assert {figure.partition("-")[0] for figure in figures} == reached
    folded = page.count("<noscript>Drawn with JavaScript")  # impls that do not stand for their method
    assert 0 < folded == page.count('<details class="folded"><summary><b><bdi>')
    assert len(re.findall(r"<noscript><svg", page)) == len(charts) - folded


def test_the_page_without_scripts_has_a_picture_in_place_of_every_chart(report_file, run_folder, tmp_path):
    charts = re.findall(r'data-figure="([^"]+)"', report_file("scaling").read_text())
    page = write([run_folder("scaling")], tmp_path / "static.html", static=True).read_text()
    assert page.count('<svg role="img" aria-label=') >= len(charts)
    assert "Drawn with JavaScript" not in page


def test_the_embedded_rows_are_the_rows_of_the_run(report_file, run_folder):
    embedded = unpacked(report_file("hostile").read_text(), "rows-data").splitlines()
    assert sorted(embedded) == sorted((run_folder("hostile") / "rows.jsonl").read_text().splitlines())


def test_hostile_texts_are_escaped_everywhere(report_file):
    page = report_file("hostile").read_text()
    for attack in ("<script>alert", "<img src=x", "<b>bold", "</textarea>"):
        assert attack not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "\u202e" not in page
    assert page.count("<script") == page.count("</script>")
    for trace in (t for f in json.loads(unpacked(page, "figures-data")).values() for t in f["data"]):
        assert not any(re.search(r"<(?!br>)", text) for text in trace["text"] if text)


def test_every_status_has_its_count_and_its_words(report_file):
    page = report_file("scaling").read_text()
    for words in ("not supported", "skipped", "out of memory", "timeout", "killed", "gate failed"):
        assert re.search(rf"<b>\d+</b> {words}", page)


def test_the_sentences_say_what_the_data_say(run_folder):
    fastest, reach, growth = sentences(to_frame([read_run(run_folder("scaling"))]))
    assert fastest.startswith("At 32k tokens, the longest length that all 5 methods completed,")
    assert "Each method stands here with its fastest impl." in fastest
    assert "for dense after 32k (timeout, not done after 120 s)" in reach
    assert "for memory_bank after 64k (killed" in reach
    assert "longformer, pyramid and transformer_xl reach 128k tokens" in reach
    assert "as the formula says for all 5 methods" in growth


def test_methods_that_stop_for_one_reason_are_counted_by_length(run_folder):
    frame = to_frame([read_run(run_folder("scaling"))])
    late = (frame["seq_len"] > 16 * 1024) | ((frame["method"] == "dense") & (frame["seq_len"] > 8 * 1024))
    frame.loc[late, "status"], frame.loc[late, "reason"] = "skipped", "the budget of 10m00s is spent; forecast of 2 s"
    _, reach, _ = sentences(frame)
    assert reach == (
        "No method reaches 128k tokens; measurements end for 4 methods after 16k and dense after 8k "
        "(skipped, the budget of 10m00s is spent)."
    )


def test_a_method_of_another_depth_says_so_beside_its_time(run_folder):
    frame = to_frame([read_run(run_folder("scaling"))])
    frame.loc[frame["method"] == "dense", ["num_layers", "latency_s"]] = [3, 99.0]
    assert "the slowest, dense / blocked with 3 layers," in sentences(frame)[0]


def test_a_sketch_with_defects_never_counts_as_the_fastest(run_folder):
    frame = to_frame([read_run(run_folder("scaling"))])
    rows = frame[frame["method"] == "dense"].copy()
    rows.loc[rows["impl"] == "blocked", ["impl", "series"]] = ["as_written", "dense / as_written"]
    assert "dense / reference takes" in sentences(rows)[0]


def test_a_run_in_which_nothing_was_measured_says_so(run_folder):
    frame = to_frame([read_run(run_folder("scaling"))])
    assert "No cell of this run was measured" in sentences(frame[frame["impl"] == "triton"])[0]
    page = write([run_folder("refused")])
    assert "No cell of this run was measured, so nothing can cross" in page.read_text()


def test_a_run_with_one_memory_size_says_so_in_a_sentence(report_file):
    assert "This run has one memory size for each method" in report_file("scaling").read_text()
    assert "one memory size" not in report_file("memory").read_text()


def test_cost_table_shows_three_kinds_of_flops_and_their_ratios(run_folder):
    frame = to_frame([read_run(run_folder("scaling"))])
    head, body = tables.cost_table(frame[frame["series"] == "dense / reference"])
    assert head[-2:] == ["formula / algorithmic", "counted / formula"]
    assert body[0][0] == "1k"
    assert body[0][-2:] == ["2", "equal"]
    assert body[-1][-1] == "-"  # skipped: nothing was counted


def test_the_table_sorts_by_number_not_by_text(run_folder):
    frame = to_frame([read_run(run_folder("scaling"))])
    names = list(tables.columns(frame))
    latency = [row[names.index("latency_s")] for row in tables.entries(frame)]
    measured = [value for value in latency if value.text]
    assert sorted(measured, key=lambda v: v.sort)[0].text.endswith("ms")
    assert sorted(measured, key=lambda v: v.sort)[-1].text.endswith(" s")


def test_axes_that_vary_become_columns(run_folder):
    frame = to_frame([read_run(run_folder("memory"))])
    assert "mode" not in tables.columns(frame)
    frame.loc[0, "mode"] = "train"
    assert "mode" in tables.columns(frame)


def test_a_page_is_the_same_page_twice_but_for_its_date(run_folder):
    run = read_run(run_folder("tiny"))
    first, second = (render(Report([run], Registry(), "title")) for _ in range(2))
    assert re.sub(r"on \d{4}-[^.]*UTC", "", first) == re.sub(r"on \d{4}-[^.]*UTC", "", second)


def test_lengths_that_were_not_measured_for_one_reason_share_a_line(run_folder):
    run = read_run(run_folder("scaling"))
    rows = [
        replace(row, reason=f"the budget is spent; forecast of {row.seq_len // 1024} s a call")
        if row.status == "skipped"
        else row
        for row in run.rows
        if (row.method, row.impl) == ("dense", "reference")
    ]
    (group,) = model.context(Report([dataclasses.replace(run, rows=tuple(rows))], Registry(), "t"))["groups"]
    assert group["cards"][0]["missing"] == [
        "16k: out of memory: asked for 8.00 GiB above 5.10 GiB",
        "32k, 64k, 128k: skipped: the budget is spent; forecast of 32 s, 64 s, 128 s a call",
    ]


def test_a_method_card_shows_what_the_plug_in_declares_and_escapes_it(run_folder):
    method = Method(
        name="dense", build="x:y", title="<i>Dense</i>", idea="an & idea", deviations=("a <deviation>",),
        claims=(Claim("<claimed>", "wrong", "the truth"),),
        impls=(Impl("reference"), Impl("as_written", defects={"causality": "sees the <future>"})),
    )  # fmt: skip
    registry = Registry({"dense": Entry(method, "somewhere", "somewhere")})
    page = render(Report([read_run(run_folder("tiny"))], registry, "t"))
    for text in (
        "&lt;i&gt;Dense&lt;/i&gt;",
        "an &amp; idea",
        "a &lt;deviation&gt;",
        "&lt;claimed&gt;",
        "sees the &lt;future",
    ):
        assert text in page
    assert "not installed here" in page  # the other methods
    assert "The method declares no formula" in page


@pytest.mark.parametrize(
    ("link", "address"),
    [
        ("arXiv:1706.03762", "https://arxiv.org/abs/1706.03762"),
        ("doi:10.1/x", "https://doi.org/10.1/x"),
        ("javascript:alert(1)", ""),
        ("http://plain", ""),
    ],
)
def test_only_safe_paper_links_become_links(link, address):
    assert paper_link(link) == address


def test_a_cost_function_that_raises_becomes_a_sentence(run_folder):
    def broken(*_):
        raise ZeroDivisionError("no <cost>")

    method = Method(name="dense", build="x:y", cost=broken)
    row = {"params": "{}", "impl": "reference", "mode": "forward", "causal": True, "position": "none"}
    assert formulas.formulas(method, row) == ([], "The formula could not be evaluated: ZeroDivisionError: no <cost>")


def test_a_formula_becomes_mathml_with_whole_and_escaped_names():
    tokens, window = symbols("T mem_len")
    drawn = formulas.mathml(4 * tokens**2 + floor(tokens / window) + Symbol("<b>"))
    assert drawn.startswith("<math>")
    assert "<msup><mi>T</mi><mn>2</mn></msup>" in drawn
    assert '<mi class="name">mem_len</mi>' in drawn
    assert "<b>" not in drawn
    assert "&lt;b&gt;" in drawn
    assert formulas.mathml(Function("<b>")(tokens)) == ""


def test_cases_of_a_formula_become_rows():
    tokens = Symbol("T")
    drawn = formulas.mathml(Piecewise((tokens, tokens > 2), (2, True)))
    assert drawn.count("<mtr>") == 2
    assert "<mtext>otherwise</mtext>" in drawn


def test_the_built_in_dense_method_has_its_formula_as_mathml_and_text(report_file):
    page = report_file("scaling").read_text()
    assert re.search(r"<math><mrow>.*?<mi>T</mi>.*?</math>.*?<code>[^<]*T", page, re.DOTALL)


def test_the_command_prints_the_path_and_takes_title_and_place(run_folder, tmp_path):
    out = tmp_path / "page.html"
    result = CliRunner().invoke(
        command, [str(run_folder("tiny")), "--out", str(out), "--title", "A & B", "--json"], catch_exceptions=False
    )
    assert json.loads(result.stdout) == {"report": str(out), "bytes": out.stat().st_size}
    assert "<title>A &amp; B</title>" in out.read_text()


def test_two_runs_share_a_page(run_folder, tmp_path):
    other = shutil.copytree(run_folder("tiny"), tmp_path / "other")
    page = write([run_folder("tiny"), other], tmp_path / "both.html", registry=Registry()).read_text()
    assert '<option value="1">run ' in page
    assert "run tiny" in page
    assert "run other" in page


def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing(run_folder, tmp_path):
    with pytest.raises(RunFolderError, match=r"(?s)cannot write.*--out"):
        write([run_folder("tiny")], tmp_path / "absent" / "page.html", registry=Registry())
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_run_is_reported_with_a_note(run_folder, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes((run_folder("tiny") / "rows.jsonl").read_bytes()[:-40])
    page = write([folder], registry=Registry()).read_text()
    assert "the last line of rows.jsonl is truncated" in page
    assert "the environment of this run is unknown" in page


def test_the_static_edition_has_pictures_and_tables_and_no_script(run_folder, tmp_path):
    result = CliRunner().invoke(
        command, [str(run_folder("scaling")), "--static", "--out", str(tmp_path / "s.html")], catch_exceptions=False
    )
    assert result.exit_code == 0
    page = (tmp_path / "s.html").read_text()
    assert "<script" not in page
    assert "<noscript" not in page
    assert page.count('<svg role="img"') >= 3
    assert '<table id="cells">' in page
    assert "script-src" not in page


def test_a_published_run_has_its_static_page_and_its_place_in_the_list(run_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder("scaling"), run)
    header = json.loads((run / "run.json").read_text())
    header |= {"status": "finished", "command": "ctxbench run --methods <all>", "counts": {"ok": 3}}
    (run / "run.json").write_text(json.dumps(header))
    index = publish(run, tmp_path / "published" / "cpu").read_text()
    assert '<a href="cpu/static.html">cpu</a>' in index
    assert "&lt;all&gt;" in index
    assert {path.name for path in (tmp_path / "published" / "cpu").iterdir()} == {
        "run.json",
        "rows.jsonl",
        "static.html",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "running"}, "running"),
        ({"status": "finished", "command": "ctxbench run --out /x/y"}, "absolute path"),
        ({"status": "finished", "command": "ctxbench run --plugin=~/mine.py"}, "absolute path"),
    ],
    ids=["unfinished", "private path", "home folder"],
)
def test_what_cannot_be_published_says_why(run_folder, tmp_path, changes, words):
    run = tmp_path / "run"
    shutil.copytree(run_folder("tiny"), run)
    header = json.loads((run / "run.json").read_text()) | changes
    (run / "run.json").write_text(json.dumps(header))
    with pytest.raises(RunFolderError, match=words):
        publish(run, tmp_path / "published" / "cpu")
