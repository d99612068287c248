"""Synthetic runs: rows whose numbers follow formulas with noise, in every status, with hostile names and texts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import msgspec
import pytest

from ctxbench.cell import Cell
from ctxbench.rows import Counted, Flops, Forecast, Gate, Latency, PeakBytes, Row, StateBytes, encode, row_for

HOSTILE = (
    "<script>alert(1)</script>",
    '" onmouseover="alert(2)\' </script></textarea><img src=x onerror=alert(3)>',
    "a very long reason " * 40,
    "\u202e\u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629 right to left",
    "emoji \U0001f4a5\U0001f9ea and {{ 7 * 7 }} {% raw %} $x_1$ %{y} <b>bold</b> &amp; \\frac{1}{2}",
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDTH, LAYER = 256, 12 * 256 * 256
KIB = 1024


def flops(method: str, seq_len: int, memory: int | None) -> int:
    """A formula with the right shape: linear projections, and attention over all or over ``memory`` keys."""
    keys = seq_len // 2 if method == "dense" else min(memory or 512, seq_len)
    return 2 * seq_len * LAYER * (1 + len(method) % 3) + 4 * seq_len * keys * WIDTH


def make_row(method: str, impl: str, seq_len: int, status: str = "ok", seed: int = 0, **changes) -> Row:
    """One row; times are FLOPs at 30 GFLOP/s (the reference: 8) plus a fixed cost, with 3 % noise."""
    noise = random.Random(f"{method}{impl}{seq_len}{seed}{changes.get('memory')}")
    cell_fields = {name: changes.pop(name) for name in list(changes) if name in Cell.__struct_fields__}
    memory = cell_fields.setdefault("memory", None if method == "dense" else 512)
    cell_fields.setdefault("params", {} if memory is None else {"window": memory, "num_global": 1})
    cell = Cell(method=method, impl=impl, seq_len=seq_len, threads=2, **cell_fields)
    work = flops(method, seq_len, memory)
    executed = work * (2 if impl == "reference" else 1)
    rate = changes.pop("speed", 1.0) * (8e9 if impl == "reference" else 3e10) * (1 + len(method) % 5 / 4)
    seconds = 4e-5 + executed / rate
    peak = seq_len * WIDTH * 4 * (5 + len(method) % 6) + (seq_len * seq_len * 8 if impl == "reference" else 0)
    forecast = Forecast(
        latency_s=seconds * 1.1, low=seconds * 0.8, high=seconds * 1.5, peak_bytes=peak, basis="roofline"
    )
    fields = {"forecast": forecast, "started_at": f"2026-01-02T03:04:{seq_len % 60:02d}+00:00", "elapsed_s": 1.5}
    fields["flops"] = Flops(algorithmic=work, formula=executed, counted=None if status == "skipped" else executed)
    if status in ("ok", "unstable"):
        samples = [[seconds * noise.gauss(1, 0.03) for _ in range(9)] for _ in range(3)]
        medians = sorted(sorted(process)[4] for process in samples)
        fields |= {
            "latency_s": Latency(median=medians[1], low=medians[0], high=medians[2], samples=samples, n_processes=3,
                                 cpu_median=medians[1] * 1.8, stop=["precision", "precision", "budget"], outliers=1),
            "tokens_per_s": seq_len / medians[1],
            "bytes_moved": 8 * peak + 4 * LAYER,
            "peak_bytes": PeakBytes(allocated=peak, resident=peak + 300 * KIB, traced=peak, formula=peak, agree=True,
                                    meter="events"),
            "state_bytes": StateBytes(measured=2 * WIDTH * seq_len * 4, formula=2 * WIDTH * seq_len * 4),
            "num_parameters": Counted(measured=LAYER, formula=LAYER),
            "gate": Gate(ok=True, error=2.1e-7, tolerance=3e-6, length=77, probes={"causality": "passed"}),
        }  # fmt: skip
    if status == "unstable":
        fields["warnings"] = ["precision: 7.1 % where 2 % was asked for", "contended: run-queue delay 31 %"]
    return row_for(cell, status, **{**fields, **changes})


def write_run(folder: Path, rows: list[Row], info: dict | None = None) -> Path:
    """A run folder as ``ctxbench run`` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_bytes(b"".join(encode(row) for row in rows))
    default = {
        "schema": "ctxbench.run/1", "command": ["ctxbench", "run", "scaling", "--methods", "all"], "suite": "scaling",
        "versions": {"torch": "2.13.0"}, "environment": {"cpu": {"model": "Example CPU", "cores_usable": 2}},
        "calibration": {"cpu": {"flops_per_s": {"fp32": 9.0e10, "bf16": 1.8e11}, "bytes_per_s": 2.0e10,
                                "calibrated": True, "device": "cpu", "threads": 2}},
        "config": {"limits": {"budget_s": 600, "cell_timeout_s": 120}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(default if info is None else info))
    return folder


LENGTHS = tuple(KIB * 2**i for i in range(8))


def scaling_rows() -> list[Row]:
    """Five methods, two or three impls, 1k to 128k, every status."""
    rows = []
    for method in ("dense", "longformer", "memory_bank", "pyramid", "transformer_xl"):
        for impl in ("reference", "blocked"):
            for length in LENGTHS:
                status, reason = "ok", ""
                if impl == "reference" and length > 8 * KIB:
                    status, reason = ("oom", "asked for 8.00 GiB above 5.10 GiB") if length == 16 * KIB else (
                        "skipped", "a shorter length ran out of memory")  # fmt: skip
                elif method == "dense" and length > 32 * KIB:
                    status, reason = ("timeout", "not done after 120 s") if length == 64 * KIB else (
                        "skipped", "forecast 9m30s exceeds --cell-timeout 120s")  # fmt: skip
                elif method == "pyramid" and length == 4 * KIB:
                    status = "unstable"
                elif method == "memory_bank" and length == 128 * KIB:
                    status, reason = "killed", "the process was killed by signal 9"
                rows.append(make_row(method, impl, length, status, reason=reason))
    rows += [make_row("longformer", "triton", length, "unsupported", flops=None, forecast=None,
                      reason="needs the package triton, which is not installed") for length in LENGTHS]  # fmt: skip
    rows += [make_row("memory_bank", "as_written", length, "gate_failed", flops=None, forecast=None,
                      reason="causality: output 3 depends on token 9") for length in LENGTHS]  # fmt: skip
    return rows


def hostile_rows() -> list[Row]:
    """A method whose every text is an attack, beside a harmless one."""
    rows = [make_row("dense", "blocked", length) for length in LENGTHS[:4]]
    for index, length in enumerate(LENGTHS[:5]):
        text = HOSTILE[index]
        status = ("error", "skipped", "oom", "killed", "ok")[index]
        texts = {"reason": text, "warnings": [text], "detail": f"Traceback\n{text}", "env_delta": {text[:9]: text}}
        params = {text[:30]: text}
        rows.append(make_row(f"evil{text[:25]}", f"impl{HOSTILE[0]}", length, status, params=params, **texts))
    return rows


def memory_rows() -> list[Row]:
    """Two methods at four lengths and five memory sizes, and dense, which has none."""
    rows = [make_row("dense", "blocked", length) for length in LENGTHS[:4]]
    for method in ("longformer", "memory_bank"):
        for length in LENGTHS[:4]:
            for memory in (128, 256, 512, 1024, 2048):
                small = memory > length
                rows.append(make_row(method, "blocked", length, "unsupported" if small else "ok", memory=memory,
                                     reason="the memory is larger than the sequence" if small else ""))  # fmt: skip
    return rows


def rich_rows() -> list[Row]:
    """Six methods, four with several memory sizes, one that is ahead on short sequences alone, two dtypes of one."""
    rows = [make_row("dense", impl, length, speed=3.0) for impl in ("blocked", "reference") for length in LENGTHS[:6]]
    speeds = {"longformer": 0.9, "memory_bank": 0.5, "transformer_xl": 0.7, "routing": 1.1}
    for method, speed in speeds.items():
        for memory in (256, 512, 1024):
            rows += [make_row(method, "blocked", length, memory=memory, speed=speed) for length in LENGTHS[:7]]
    return [*rows, *(make_row("pyramid", "reference", length, speed=2.0) for length in LENGTHS[:6])]


def again(rows: list[Row], seed: int, factor: float = 1.0) -> list[Row]:
    """The same cells measured another time, the blocked impl of two methods by a factor slower."""
    return [_again(row, random.Random(f"{row.cell}{seed}"), factor) for row in rows]


def _again(row: Row, noise: random.Random, factor: float) -> Row:
    if row.latency_s is None:
        return row
    slow = factor if row.method in ("longformer", "transformer_xl") and row.impl == "blocked" else 1.0
    samples = [[slow * v * noise.gauss(1, 0.01) for v in process] for process in row.latency_s.samples]
    medians = sorted(sorted(process)[len(process) // 2] for process in samples)
    middle = medians[len(medians) // 2]
    latency = msgspec.structs.replace(row.latency_s, samples=samples, median=middle, low=medians[0], high=medians[-1])
    return msgspec.structs.replace(row, latency_s=latency)


def many_processes(rows: list[Row], count: int = 8) -> list[Row]:
    """The rows with so many processes that a comparison can decide."""
    made = []
    for row in rows:
        noise = random.Random(row.cell)
        if row.latency_s is not None:
            median = row.latency_s.median
            samples = [[median * noise.gauss(1, 0.01) for _ in range(5)] for _ in range(count)]
            latency = msgspec.structs.replace(row.latency_s, samples=samples, n_processes=count, contended=[])
            row = msgspec.structs.replace(row, latency_s=latency)
        made.append(row)
    return made


def large_rows() -> list[Row]:
    """Twenty methods at eight lengths."""
    return [make_row(f"method_{index:02d}", "blocked", length) for index in range(20) for length in LENGTHS]


def tiny_rows() -> list[Row]:
    """Two methods at two lengths: for tests that write a page of their own."""
    rows = [make_row("dense", "blocked", length) for length in LENGTHS[:2]]
    return [
        *rows,
        make_row("longformer", "blocked", 1024),
        make_row("longformer", "blocked", 2048, "oom", reason="full"),
    ]


def huge_rows() -> list[Row]:
    """Five hundred cells: twenty methods at eight lengths and three memory sizes, and one method more."""
    methods = [f"method_{index:02d}" for index in range(20)]
    rows = [make_row(method, "blocked", length, memory=memory)
            for method in methods for length in LENGTHS for memory in (256, 512, 1024)]  # fmt: skip
    return [*rows, *(make_row("dense", impl, length) for impl in ("blocked", "reference") for length in LENGTHS)]


ROWS = {
    "huge": huge_rows,
    "rich": rich_rows,
    "tiny": tiny_rows,
    "scaling": scaling_rows,
    "hostile": hostile_rows,
    "memory": memory_rows,
    "large": large_rows,
    "refused": lambda: [make_row("dense", "triton", 1024, "unsupported", flops=None, forecast=None)],
}


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """``run_folder(kind)``: a synthetic run of that kind, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_run(tmp_path_factory.mktemp("runs") / kind, ROWS[kind]())
        return made[kind]

    return make


@pytest.fixture(scope="session")
def report_file(run_folder):
    """``report_file(kind)``: the report of that run, written once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            from ctxbench.reports.page import write

            made[kind] = write([run_folder(kind)], title=HOSTILE[4] if kind == "hostile" else None)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def twin_folders(tmp_path_factory):
    """Two runs of the same cells with enough processes for a verdict; the second has two slower methods."""
    place = tmp_path_factory.mktemp("twins")
    base = many_processes([row for row in scaling_rows() if row.seq_len <= 8 * KIB], 16)
    return [write_run(place / "before", base), write_run(place / "after", again(base, 1, 1.2))]


@pytest.fixture(scope="session")
def browser():
    """One Chromium for all tests that open pages."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield launched
        launched.close()
