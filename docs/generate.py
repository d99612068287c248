"""Write the method table of README.md and the whole of docs/methods.md from the registry: ``make docs``.

With ``--check`` nothing is written; the exit code is 1 when a file is not what the registry says.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from sympy import Expr

from ctxbench.cli.describe import describe
from ctxbench.cost import big_o, total
from ctxbench.cost.model import text
from ctxbench.cost.symbols import L
from ctxbench.method import MODES, Method
from ctxbench.registry import discover

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- generated from the registry by `make docs` -->", "<!-- end of the generated part -->"
SHORT = 16  # operations of a formula beyond which only its growth is printed


def readme(page: str, methods: list[Method]) -> str:
    """README with its table made anew between the two marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{overview(methods, 'docs/methods.md')}\n{END}{tail}"


def overview(methods: list[Method], page: str = "") -> str:
    """One line a method: what it is, its memory size, modes, and growth of compute and state with T."""
    lines = ["| method | what it is | memory size | compute | state | modes |", "|---|---|---|---|---|---|"]
    for method in methods:
        cells = [
            f"[`{method.name}`]({page}#{method.name})",
            cell(method.idea or method.title),
            f"`{method.memory_parameter}`" if method.memory_parameter else "-",
            growth(method, "forward", "algorithmic") or "-",
            growth(method, "decode", "state_bytes") or "-",
            ", ".join(method.modes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def formulas(method: Method, impl: str, mode: str) -> dict[str, Expr]:
    """Closed forms of one impl in one mode at the method's defaults; empty where there are none."""
    if mode not in (method.impl(impl).modes or method.modes) or mode not in method.modes:
        return {}
    causal = method.causal[0] if method.causal else False
    cost = method.cost_of(impl, mode, causal, method.positions[0], method.params())
    if cost is None:
        return {}
    found = {
        "algorithmic": total(cost.algorithmic),
        "flops": total(cost.flops),
        "peak_bytes": cost.peak_bytes,
        "state_bytes": cost.state_bytes,
        "depth": L if cost.depth is None else cost.depth,
    }
    return {name: formula for name, formula in found.items() if formula is not None}


def growth(method: Method, mode: str, quantity: str) -> str:
    """Big-O in T of the oracle's formula, empty where the method has not the mode or no formula."""
    formula = formulas(method, method.oracle, mode).get(quantity)
    return "" if formula is None else big_o(formula)


def methods_page(methods: list[Method]) -> str:
    """docs/methods.md."""
    parts = [
        "# Methods",
        f"{BEGIN}",
        "Growth is in the sequence length T, by the method's own closed forms at its default parameters;\n"
        "`ctxbench describe METHOD` prints the formulas, and their values at any size. Derivations are in the README\n"
        "of each method's folder. Sequential depth counts dependent steps, in evaluations of a layer. What\n"
        "`--impls auto` takes is measured, or, with an asterisk, expected: not yet measured on such a device.",
        overview(methods),
        *(section(method) for method in methods),
    ]
    return "\n\n".join(parts) + "\n"


def section(method: Method) -> str:
    """Everything the registry knows of one method."""
    found = describe(dataclasses.replace(method, cost=None), "8k", method.modes[0], "fp32")
    parts = [f"## {method.name}", f"**{method.title}**. {method.idea}".strip()]
    if method.paper:
        where = f", section {method.paper.section}" if method.paper.section else ""
        parts.append(f"Paper: {method.paper.citation}{where}. {method.paper.link}".strip())
    parts.append(parameters(found, method))
    parts.append(implementations(found))
    parts.append(costs(method))
    refused = [f"- {mode}: {cell(method.without[mode])}" for mode in MODES if mode in method.without]
    refused += [f"- position {name}: {cell(why)}" for name, why in method.without_positions.items()]
    parts.append(f"Positions: {', '.join(method.positions)}.")
    for heading, lines in (
        ("Not there, and why:", refused),
        ("The same function as another method:", [f"- {cell(line)}" for line in found["equals"]]),
        ("Deviations from the publication:", [f"- {cell(line)}" for line in found["deviations"]]),
    ):
        if lines:
            parts.append("\n".join([heading, "", *lines]))
    if found["claims"]:
        rows = [f"| {cell(c['claimed'])} | {cell(c['verdict'])} | {cell(c['true'])} |" for c in found["claims"]]
        parts.append("\n".join(["| claim of the source documents | verdict | true |", "|---|---|---|", *rows]))
    return "\n\n".join(part for part in parts if part)


def parameters(found: dict[str, Any], method: Method) -> str:
    """Table of hyper-parameters with unit, meaning and source."""
    if not found["params"]:
        return "No parameters."
    lines = ["| parameter | default | meaning | source |", "|---|---|---|---|"]
    for entry in found["params"]:
        meaning = entry["help"] + (f" ({', '.join(map(str, entry['choices']))})" if entry["choices"] else "")
        meaning += "; swept by `--memory`" if entry["name"] == method.memory_parameter else ""
        default = f"{entry['default']} {entry['unit'] or ''}".strip()
        lines.append(f"| `{entry['name']}` | {default} | {cell(meaning)} | {cell(entry['source'] or '')} |")
    return "\n".join(lines)


def implementations(found: dict[str, Any]) -> str:
    """One line an impl, with the defects an ``as_written`` one declares."""
    lines = []
    for impl in found["impls"]:
        lines.append(f"- `{impl['name']}`" + (f": {cell(impl['note'])}" if impl["note"] else ""))
        for probe, why in found["defects"].get(impl["name"], {}).items():
            lines.append(f"  - defect, {probe.replace('_', ' ')}: {cell(why)}")
    if found["picks"]:
        taken = [f"`{pick['impl']}`{'' if pick['measured'] else '*'} ({pick['where']})" for pick in found["picks"]]
        lines += ["", f"`--impls auto` takes the first that holds and runs: {', '.join(taken)}."]
    return "\n".join(lines)


def costs(method: Method) -> str:
    """Growth of FLOPs, peak, state and sequential depth of every impl in every mode."""
    lines = ["| impl | mode | FLOPs | peak memory | state | sequential depth |", "|---|---|---|---|---|---|"]
    for mode in method.modes:
        for impl in method.impls:
            found = formulas(method, impl.name, mode)
            cells = [shown(found.get(name)) for name in ("flops", "peak_bytes", "state_bytes", "depth")]
            if mode not in ("stream", "decode"):
                cells[2] = "-"
            if found:
                lines.append(f"| `{impl.name}` | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def shown(formula: Expr | None) -> str:
    """Growth of a formula, and the formula itself where it is short."""
    if formula is None:
        return "-"
    short = text(formula) if formula.count_ops() < SHORT else ""
    return big_o(formula) + (f", `{short}`" if 0 < len(short) <= 2 * SHORT else "")


def cell(words: str) -> str:
    """Text that cannot break a table."""
    return words.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write both files, or compare them."""
    ours = [
        entry.method for entry in discover().entries.values() if entry.origin.startswith("ctxbench.implementations.")
    ]
    methods = sorted(ours, key=lambda method: (method.family, method.name))
    readme_path, page_path = ROOT / "README.md", ROOT / "docs" / "methods.md"
    wanted = {readme_path: readme(readme_path.read_text(), methods), page_path: methods_page(methods)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if "--check" not in sys.argv:
            path.write_text(wanted[path])
        sys.stdout.write(f"{path.relative_to(ROOT)} {'is stale: make docs' if '--check' in sys.argv else 'written'}\n")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
