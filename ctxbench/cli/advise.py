"""``ctxbench advise``: which method for a length, a memory limit and a use, and why not the others."""

from __future__ import annotations

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
    from ctxbench.analysis.advise import Advice, Trial
    from ctxbench.analysis.use_cases import Judged


@click.command()
@selection_options
@click.option(
    "--streaming", is_flag=True, help="An endless stream: segment by segment, with a state that stays bounded."
)
@click.option("--run", "folder", type=click.Path(path_type=Path), help="Answer from the rows of this run.")
@click.option("--check", is_flag=True, help="Hold out each length of the run, ask who is fastest there, and compare.")
@common_options
def command(
    suite: str | None, flags: Suite, print_config: bool, streaming: bool, folder: Path | None, check: bool, ctx: Common
) -> None:
    """Rank methods by time for one --seq under a --memory-limit, with reasons; say why others are out.

    What the run did not measure is forecast and marked. --device h200 asks about a machine by its datasheet. Below
    the ranking, the use-case recommendations of the source documents are checked at this length.
    """
    from ctxbench.analysis.advise import advise, trials
    from ctxbench.analysis.use_cases import judge
    from ctxbench.cli.target import target

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
        measured = asked.rows, registry, asked.ceilings
        _print_check(trials(*measured), trials(*measured, pairs=True), ctx)
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
                format_bytes(c.estimate.peak_bytes), "; ".join(c.reasons), ", ".join(c.estimate.evidence[-2:]),
            ]
            for index, c in enumerate(advice.ranked, start=1)
        ]  # fmt: skip
        click.echo(table(["", "METHOD / IMPL", "MEMORY", "TIME", "INTERVAL", "PEAK", "WHY", "EVIDENCE"], lines))
    if advice.refused:
        click.echo("\nnot advised")
        click.echo(table(["METHOD / IMPL", "REASON"], [[f"{c.method} / {c.impl}", c.refusal] for c in advice.refused]))
    click.echo(f"\nrecommendations of the source documents, {summary(judged, asked.config.seq_len[0])}")
    shown = [rule for rule in judged if ctx.verbose or rule.verdict != "not measured"]
    lines = [[rule.verdict, f"{rule.about}: {rule.recommendation}", rule.evidence] for rule in shown]
    click.echo(table(["", "RECOMMENDATION", "EVIDENCE"], lines))
    click.echo("time and memory alone: what a method learns is not measured here")


def _print_check(found: list[Trial], between_two: list[Trial], ctx: Common) -> None:
    from ctxbench.analysis.advise import hit_rate, unrefuted

    if ctx.json:
        trials = [
            {**msgspec.to_builtins(trial), "regret": trial.regret, "shown_regret": trial.shown_regret}
            for trial in found
        ]
        rates = [{"within_10_percent": hit_rate(of), "unrefuted": unrefuted(of)} for of in (found, between_two)]
        ctx.emit({"trials": trials, **rates[0], "between_two": {"questions": len(between_two), **rates[1]}})
        return
    lines = [
        [
            format_tokens(trial.seq_len), str(trial.candidates), trial.advised, format_seconds(trial.advised_s),
            trial.best, format_seconds(trial.best_s), f"{100 * trial.regret:.1f} %",
            f"{100 * trial.shown_regret:.1f} %",
        ]
        for trial in found
    ]  # fmt: skip
    click.echo(table(["LENGTH", "OF", "ADVISED", "TIME", "BEST", "TIME", "SLOWER BY", "AT LEAST"], lines))
    for of, asked in ((found, "held-out questions"), (between_two, "questions between two methods")):
        click.echo(
            f"within 10 % of the best in {100 * hit_rate(of):.0f} % of {len(of)} {asked}; "
            f"not slower by more beyond both intervals in {100 * unrefuted(of):.0f} %"
        )
