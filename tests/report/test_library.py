"""The chart library of a page: its core is all there, nothing beside it, and an unknown form stays whole."""

from __future__ import annotations

import pytest

from ctxbench.reports.library import core, installed
from ctxbench.reports.page import plotly_script, unpack

NAMES = [f"kind{i}" for i in range(24)]
KINDS = ",".join(f"{name}()" for name in NAMES)
BUNDLE = "".join([
    '(function(){"use strict";var Plotly=(()=>{',
    "var K=Object.keys;",
    "var Lazy=(e,t)=>()=>{return e&&(t=e(e=0)),t};",
    "var Once=(e,t)=>()=>{return t||e((t={exports:{}}).exports,t),t.exports};",
    'var used=Once((x,y)=>{y.exports=a=>a/2+"}) unused("+`${used}})`.length+/[/}"]/g.test(a)});',
    "function helper(a={}){return used()(a)+later}",
    "async function forgotten(){return unused()}",
    "var unused=Once((x,y)=>{y.exports=forgotten});",
    "var space={};Name(space,{later:()=>later});var later,other,init=Lazy(()=>{later=K({})});",
    "var lost={};Name(lost,{gone:()=>gone});var gone,start=Lazy(()=>{gone=unused()});",
    *(f"var {name}=Once((x,y)=>{{y.exports=unused()}});" for name in NAMES),
    f"var entry=Once((x,y)=>{{var r=helper;init();r.register([{KINDS}]);y.exports=[r,space]}});",
    "return entry();})();/*! license */ window.Plotly=Plotly;return Plotly}());",
])  # fmt: skip


def test_the_core_keeps_what_is_asked_for_and_nothing_else():
    lean = core(BUNDLE)
    for name in ("K", "used", "helper", "space", "later", "init", "entry", "Once"):
        assert name in lean
    for part in ("forgotten", "unused=", "lost", "gone", "kind3"):
        assert part not in lean
    assert "r.register([])" in lean
    assert lean.startswith(BUNDLE[:40])
    assert lean.endswith("/*! license */ window.Plotly=Plotly;return Plotly}());")
    assert "Name(space,{later:()=>later});" in lean


@pytest.mark.parametrize(
    "other",
    ["of another form", BUNDLE.replace(KINDS, "kind0()")],
    ids=["text", "no kinds"],
)
def test_another_form_stays_as_it_is(other):
    assert core(other) == other


def test_brackets_that_do_not_match_leave_all_statements():
    broken = BUNDLE.replace("var K=", "var O=(;var K=")
    assert core(broken) == broken.replace(KINDS, "")


def test_the_installed_library_has_the_known_form_and_most_of_it_is_left_out():
    lean = core(installed())
    assert ".register([])" in lean
    assert "window.Plotly = Plotly" in lean
    assert len(lean) < 0.4 * len(installed())
    assert unpack(plotly_script(("bar", "scatter"))) == installed()  # a kind beyond the core needs the whole
