"""``ctxbench advise``: which method for a length, a memory limit and a use, and why not the others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ctxbench.cli.common import Common, common_options, table
from ctxbench.cli.selection import print_config as show_config
from ctxbench.cli.selection import selection_options
from ctxbench.errors import UserError
from ctxbench.suite import Suite
from ctxbench.units import format_bytes, format_seconds, format_tokens

if TYPE_CHECKING:
    from ctxbench.analysis.advise import Advice, Candidate
    from ctxbench.analysis.questions import Questions, Trial
    from ctxbench.analysis.use_cases import Judged


@click.command()
@selection_options
@click.option(
    "--streaming", is_flag=True, help="An endless stream: segment by segment, with a state that stays bounded."
)
@click.option("--run", "folder", type=click.Path(path_type=Path), help="Answer from the rows of this run.")
@click.option(
    "--check",
    is_flag=True,
    help="Hold out each length of the run, ask all that can be asked about it, and compare with what was measured.",
)
@common_options
def command(
    suite: str | None, flags: Suite, print_config: bool, streaming: bool, folder: Path | None, check: bool, ctx: Common
) -> None:
    """Rank methods by time for one --seq under a --memory-limit, with reasons; say why others are out.

    What the run did not measure is forecast and marked. --device h200 asks about a machine by its datasheet. Below
    the ranking, the use-case recommendations of the source documents are checked at this length.
    """
    from ctxbench.analysis.advise import advise
    from ctxbench.analysis.questions import Questions
    from ctxbench.analysis.use_cases import judge
    from ctxbench.cli.target import refuse_run, target

    refuse_run(suite)
    registry = ctx.registry()
    if check and folder is None:
        raise UserError("--check needs measured lengths\n  accepted: --run RUN, a folder that `ctxbench run` wrote")
    if flags.axes.seq_len is None and not check and not print_config:
        raise UserError("advice needs a length\n  accepted: --seq SIZE, for example --seq 100k")
    if streaming and flags.axes.mode is None:
        flags = msgspec.structs.replace(flags, axes=msgspec.structs.replace(flags.axes, mode="stream"))
    asked = target(suite, flags, folder, registry, ctx)
    if print_config:
        show_config(asked.config, ctx)
        return
    if check:
        _print_check(Questions(asked.rows, registry, asked.ceilings), ctx)
        return
    for name, values in (("--seq", asked.config.seq_len), ("--mode", asked.config.mode)):
        if len(values) > 1:
            raise UserError(f"advice is for one {name} at a time, received {', '.join(map(str, values))}")
    advice = advise(asked.cells, asked.forecaster, asked.limit, streaming, asked.rows)
    judged = judge(asked.cells, asked.forecaster, advice)
    if ctx.json:
        request = {"seq_len": asked.config.seq_len[0], "mode": asked.config.mode[0], "streaming": streaming}
        machine = {"machine": asked.title, "memory_limit": asked.limit}
        ctx.emit({**request, **machine, **msgspec.to_builtins(advice), "recommendations": judged})
        return
    _print(advice, judged, asked, ctx)


def _print(advice: Advice, judged: list[Judged], asked: Any, ctx: Common) -> None:
    from ctxbench.analysis.advise import describe_request, headline
    from ctxbench.analysis.use_cases import summary

    click.echo(f"{describe_request(asked.cells)}; {asked.title}; memory limit {format_bytes(asked.limit)}")
    click.echo(headline(advice))
    if advice.ranked:
        lines = [
            [
                str(index), f"{c.method} / {c.impl}", format_tokens(c.memory),
                format_seconds(c.estimate.latency_s) + (" (forecast)" if c.forecast else ""),
                f"{format_seconds(c.estimate.low)} to {format_seconds(c.estimate.high)}",
                format_bytes(c.estimate.peak_bytes), format_bytes(c.needs), "; ".join(c.reasons),
                ", ".join(c.estimate.evidence[-2:]),
            ]
            for index, c in enumerate(advice.ranked, start=1)
        ]  # fmt: skip
        click.echo(
            table(["", "METHOD / IMPL", "MEMORY", "TIME", "INTERVAL", "PEAK", "NEEDS", "WHY", "EVIDENCE"], lines)
        )
        click.echo(NEEDS)
    elsewhere = [] if ctx.verbose else _impls_elsewhere(advice)
    refused = [candidate for candidate in advice.refused if candidate not in elsewhere]
    if refused:
        click.echo("\nnot advised")
        click.echo(table(["METHOD / IMPL", "REASON"], [[f"{c.method} / {c.impl}", c.refusal] for c in refused]))
    if elsewhere:
        click.echo(f"impls that do not run here, of methods named above: {len(elsewhere)} (-v lists them)")
    click.echo(f"\nrecommendations of the source documents, {summary(judged, asked.config.seq_len[0])}")
    shown = [rule for rule in judged if ctx.verbose or rule.verdict != "not measured"]
    lines = [[rule.verdict, f"{rule.about}: {rule.recommendation}", rule.evidence] for rule in shown]
    click.echo(table(["", "RECOMMENDATION", "EVIDENCE"], lines))
    click.echo("time and memory alone: what a method learns is not measured here")


def _impls_elsewhere(advice: Advice) -> list[Candidate]:
    """Refused for want of support here, although another impl of the method was weighed: no news about the method."""
    from ctxbench.analysis.forecast import UNKNOWN

    unsupported = [c for c in advice.refused if c.estimate.source == UNKNOWN and c.estimate.basis == "not supported"]
    weighed = {c.method for c in (*advice.ranked, *advice.refused) if c not in unsupported}
    return [candidate for candidate in unsupported if candidate.method in weighed]


def _print_check(found: Questions, ctx: Common) -> None:
    from ctxbench.analysis.forecast import latency
    from ctxbench.analysis.questions import hit_rate, misses, summary

    plain = [question.judged(latency) for question in found.plain]
    kinds = {
        "of all methods, one a length": found.plain,
        "of every two methods": found.pairs,
        "of all options without a memory limit": [question for question in found.every if not question.limited],
        "of all options with a memory limit": [question for question in found.every if question.limited],
    }
    judged = {kind: [question.judged(latency) for question in asked] for kind, asked in kinds.items() if asked}
    steady = found.steady
    at_one_speed = {kind: hit_rate([q.judged(steady) for q in kinds[kind]]) for kind in judged} if steady else {}
    if ctx.json:
        ctx.emit(
            {
                "trials": [
                    {**msgspec.to_builtins(trial), "regret": trial.regret, "shown_regret": trial.shown_regret}
                    for trial in plain
                ],
                "questions": {
                    kind: summary(trials) | {"at_one_speed_within_10_percent": at_one_speed.get(kind)}
                    for kind, trials in judged.items()
                },
                "misses": {
                    kind: [
                        {
                            **msgspec.to_builtins(trial),
                            "regret": trial.regret if trial.fits else None,
                            "asked_so": count,
                        }
                        for trial, count in misses(trials)
                    ]
                    for kind, trials in judged.items()
                },
            }
        )
        return
    lines = [
        [
            format_tokens(trial.seq_len), str(trial.candidates), trial.advised, format_seconds(trial.advised_s),
            trial.best, format_seconds(trial.best_s), _percent(trial.regret), _percent(trial.shown_regret),
        ]
        for trial in plain
    ]  # fmt: skip
    click.echo(table(["LENGTH", "OF", "ADVISED", "TIME", "BEST", "TIME", "SLOWER BY", "AT LEAST"], lines))
    for kind, title in (
        ("of all options without a memory limit", "without"),
        ("of all options with a memory limit", "with"),
    ):
        wrong = misses(judged.get(kind, []))
        if wrong:
            click.echo(f"\nwrong {title} a memory limit, one line an answer")
            click.echo(
                table(MISSES, [_miss(trial, count) for trial, count in (wrong if ctx.verbose else wrong[:SHOWN])])
            )
            if len(wrong) > SHOWN and not ctx.verbose:
                click.echo(f"{len(wrong) - SHOWN} more (-v lists them)")
    click.echo("\nadvised within 10 % of the best, of held-out questions")
    lines = []
    for kind, trials in judged.items():
        counts = summary(trials)
        lines.append(
            [
                kind, str(counts["count"]), _percent(counts["within_10_percent"], 0),
                _percent(at_one_speed[kind], 0) if steady else "-", _percent(counts["unrefuted"], 0),
                f"{_percent(counts['answers_within_10_percent'], 0)} of {counts['answers']}",
                _percent(counts["cautious"], 0), str(counts["did_not_fit"]),
            ]
        )  # fmt: skip
    click.echo(table(RATES, lines))


NEEDS = (
    "NEEDS is held against the limit: the peak (of a forecast, what to reserve for it) with runtime, weights, inputs "
    "and an incoming state"
)
SHOWN = 12  # wrong answers without -v
MISSES = ["LENGTH", "ASKED", "TIMES", "ADVISED", "BEST", "SLOWER BY", "AT LEAST", "WHY"]
RATES = [
    "QUESTIONS", "COUNT", "RIGHT", "AT ONE SPEED", "NOT REFUTED", "DIFFERENT ANSWERS", "TOO CAUTIOUS", "DID NOT FIT",
]  # fmt: skip


def _miss(trial: Trial, count: int) -> list[str]:
    reason = "the best may not fit" if trial.cautious else "" if trial.fits else "it did not fit"
    return [
        format_tokens(trial.seq_len), trial.asked or "-", str(count), trial.advised or "none", trial.best,
        _percent(trial.regret), _percent(trial.shown_regret), reason or "forecast",
    ]  # fmt: skip


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "-"
