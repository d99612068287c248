"""What ``ctxbench describe`` prints of a method. A formula nobody would read is told by its terms and by its value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from click import echo

from ctxbench.method import DTYPE_BYTES, MODES, POSITION_HELP
from ctxbench.units import format_bytes, format_flops, format_tokens

LONGEST = 160  # characters of a formula that a reader may want to see on a terminal
LETTERS = {"B": "batch_size", "d": "d_model", "h": "num_heads", "f": "d_ff", "L": "num_layers"}
ANY = ("algorithmic", "state_bytes", "num_parameters", "depth")  # often the same for all impls, and then said once


def print_method(found: dict[str, Any], latex: bool) -> None:
    """Print what ``describe --json`` gives, for readers."""
    _print_head(found)
    _print_takes(found)
    _print_impls(found)
    _print_costs(found, latex)
    for heading, lines in (("Equivalent forms", found["equals"]), ("Deviations", found["deviations"])):
        if lines:
            echo(f"\n{heading}")
            for line in lines:
                echo(f"  {line}")
    echo("\nClaims of the source documents")
    for claim in found["claims"]:
        echo(f"  claimed: {claim['claimed']}\n    {claim['verdict']}: {claim['true']}")
    if not found["claims"]:
        echo("  none about this method")


def _print_head(found: dict[str, Any]) -> None:
    echo(f"{found['name']}: {found['title']}  ({found['family']})")
    if found["idea"]:
        echo(f"  {found['idea']}")
    if found["paper"]:
        section = f", section {found['paper']['section']}" if found["paper"]["section"] else ""
        echo(f"  paper: {found['paper']['citation']}{section}  {found['paper']['link']}")
    echo("\nParameters")
    for entry in found["params"]:
        unit = f" {entry['unit']}" if entry["unit"] else ""
        memory = "; swept by --memory" if entry["name"] == found["memory_parameter"] else ""
        source = f" [{entry['source']}]" if entry["source"] else ""
        choices = f" ({', '.join(map(str, entry['choices']))})" if entry["choices"] else ""
        value = "none" if entry["value"] == "" else f"{entry['value']}{unit}"
        echo(f"  {entry['name']} = {value}: {entry['help']}{choices}{memory}{source}")
    if not found["params"]:
        echo("  none")


def _print_takes(found: dict[str, Any]) -> None:
    echo("\nModes")
    for mode in MODES:
        answer = "yes" if mode in found["modes"] else f"no, {found['without'].get(mode, 'not part of the method')}"
        echo(f"  {mode}: {answer}")
    directions = ["causal" if causal else "bidirectional" for causal in found["causal"]]
    echo(f"\nDirections\n  {', '.join(directions) or 'none declared'}")
    echo("\nPositions")
    for position in found["positions"]:
        echo(f"  {position}: {POSITION_HELP[position]}")
    for why, names in groupby(found["without_positions"].items(), key=lambda item: item[1]):
        echo(f"  {', '.join(name for name, _ in names)}: no, {why}")


def _print_impls(found: dict[str, Any]) -> None:
    echo(f"\nImplementations on {found['device']}, {found['dtype']}, {found['mode']}")
    for impl in found["impls"]:
        answer = "yes" if impl["supported"] else f"no: {impl['reason']}"
        echo(f"  {impl['name']}: {answer}" + (f"; {impl['note']}" if impl["note"] else ""))
        for probe, why in found["defects"].get(impl["name"], {}).items():
            echo(f"    defect, {probe}: {why}")
    if found["picks"]:
        echo("\nWhat --impls auto takes, the first that holds and runs")
    for pick in found["picks"]:
        seen = "measured" if pick["measured"] else "expected, not measured"
        echo(f"  {pick['impl']}: {pick['where']}; {pick['why']} ({seen})")


def _print_costs(found: dict[str, Any], latex: bool) -> None:
    dims, costs = found["dims"], [cost for cost in found["costs"] if "trouble" not in cost]
    direction = "causal" if dims["causal"] else "bidirectional"
    sizes = ", ".join(f"{letter} = {dims[name]}" for letter, name in LETTERS.items())
    echo(f"\nCost in mode {found['mode']}, {direction}, position {dims['position']}, {found['dtype']}")
    echo(f"  T tokens, {sizes}, e = {DTYPE_BYTES[found['dtype']]} bytes an element; other names are parameters")
    if not found["mode_supported"]:
        echo(f"  {found['mode_reason']}")
    elif not found["costs"]:
        echo("  no formulas declared; `ctxbench run` traces FLOPs and peak memory instead")
    for cost in found["costs"]:
        if "trouble" in cost:
            echo(f"  {cost['impl']}: the cost function failed: {cost['trouble']}")
    same = {name for name in ANY if len({_text(cost, name) for cost in costs}) == 1 < len(costs)}
    if same:
        echo("  every implementation")
        _print_formulas(costs[0], [name for name in ANY if name in same], latex)
    for cost in costs:
        echo(f"  {cost['impl']}")
        _print_formulas(cost, [name for name in cost["formulas"] if name not in same], latex)
        for at in cost["at"]:
            echo(f"    at {format_tokens(at['seq_len']):>5}: {', '.join(_numbers(at))}")


def _text(cost: dict[str, Any], name: str) -> str:
    formula = cost["formulas"].get(name)
    return "" if formula is None else str(formula["text"])


def _print_formulas(cost: dict[str, Any], names: Iterable[str], latex: bool) -> None:
    for name in names:
        if name not in cost["formulas"]:
            continue
        formula = cost["formulas"][name]
        short = latex or len(formula["text"]) <= LONGEST
        lines = [formula["latex" if latex else "text"]] if short else _told(cost, name)
        echo(f"    {name:<15}{formula['big_o']:<12}{lines[0]}")
        for line in lines[1:]:
            echo(f"    {'':<27}{line}")


def _told(cost: dict[str, Any], name: str) -> list[str]:
    """A formula that is too long to print: what it comes to at the lengths asked for, and of FLOPs the terms."""
    length = len(cost["formulas"][name]["text"])
    lines = [f"with these sizes {_near(cost['at'], name)}  ({length} characters in full: --json)"]
    for term, formula in cost["terms"].items() if name == "flops" else ():
        length = len(formula["text"])
        lines.append(f"  {term}: {formula['text'] if length <= LONGEST else f'{length} characters'}")
    return lines


def _near(at: list[dict[str, Any]], name: str) -> str:
    """What a formula comes to at the lengths asked for: ``3*T + 5 at 1k, 2*T at 8k, 64k``."""
    parts = []
    for near, group in groupby(at, key=lambda each: each["near"][name]):
        parts.append(f"{near} at {', '.join(format_tokens(each['seq_len']) for each in group)}")
    return "; ".join(parts)


def _numbers(at: dict[str, Any]) -> Iterator[str]:
    yield f"{format_flops(at['flops'])} ({at['flops']})"
    yield f"algorithmic {format_flops(at['algorithmic'])}"
    if "peak_bytes" in at:
        yield f"peak {format_bytes(at['peak_bytes'])}"
    if at.get("state_bytes"):
        yield f"state {format_bytes(at['state_bytes'])}"
    if "depth" in at:
        yield f"{at['depth']} {'step' if at['depth'] == 1 else 'steps in a row'}"
    yield f"local slope {at['slope']:.2f}"
