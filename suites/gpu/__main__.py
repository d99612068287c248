"""``python -m ctxbench.suites.gpu [PART ...] --out FOLDER``: tests, ratios and the main job on a CUDA device.

tests    the GPU test suite: kernels against float64, the allocator against the tracer
ratios   every kernel beside its strongest baselines, interleaved, in bf16: ``ratios.json``
run      the main job in bf16, forward and train, with peak memory and energy: a run folder

All three end inside ``--budget`` (9 minutes). A part that has finished in FOLDER is not done again, so that a command
that was cut short goes on where it stopped; what it measured is kept. It needs what measuring needs, and no reporting
package: ``ctxbench report FOLDER/run`` makes the page anywhere.

Exit codes: 0 all parts passed, 1 a part failed, 5 there is no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ctxbench.devices import cuda_present
from ctxbench.errors import Exit
from ctxbench.units import parse_seconds

SHARES = {"tests": 0.3, "ratios": 0.3, "run": 0.4}  # of the budget; what a part leaves over, the later ones get
DONE = "parts.json"
WORKERS = 4  # processes that test beside one another; each starts several that compile
NO_TESTS = 5  # pytest's code where all are left out


def main() -> int:
    """Do what is left of the parts; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m ctxbench.suites.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(SHARES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of everything; runs/gpu by default")
    parser.add_argument("--budget", default="9m", help="time for all parts together; 9m by default")
    parser.add_argument("--fresh", action="store_true", help="do finished parts again")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(SHARES))
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; accepted: {', '.join(SHARES)}")
    if not cuda_present():
        sys.stderr.write(
            "error: there is no CUDA device here, and these measurements need one\n"
            "  the same kernels are proven without a GPU by `make test`; `ctxbench doctor` says what was looked for\n"
        )
        return int(Exit.ENVIRONMENT)
    wanted = [part for part in SHARES if part in (arguments.parts or SHARES)]
    return do(wanted, arguments.out, parse_seconds(arguments.budget), arguments.fresh)


def do(wanted: list[str], out: Path, budget_s: float, fresh: bool = False) -> int:
    """Run parts in order and record which finished; the worst exit code of them."""
    out.mkdir(parents=True, exist_ok=True)
    finished = {} if fresh else load(out)
    deadline, worst = time.monotonic() + budget_s, 0
    for index, part in enumerate(wanted):
        if finished.get(part) == 0:
            sys.stdout.write(f"{part}: finished earlier\n")
            continue
        left = deadline - time.monotonic()
        share = SHARES[part] / sum(SHARES[other] for other in wanted[index:])
        sys.stdout.write(f"{part}: at most {left * share:.0f} s\n")
        sys.stdout.flush()
        finished[part] = PARTS[part](out, left * share)
        (out / DONE).write_text(json.dumps(finished, indent=1) + "\n")
        worst = max(worst, finished[part])
        sys.stdout.write(f"{part}: {'passed' if finished[part] == 0 else f'FAILED ({finished[part]})'}\n")
    return min(worst, 1)


def load(out: Path) -> dict[str, int]:
    """Exit codes of the parts that have ended in this folder."""
    path = out / DONE
    return json.loads(path.read_text()) if path.exists() else {}


def tests(out: Path, limit_s: float) -> int:
    """The tests marked ``gpu`` of a source checkout."""
    folder = Path(__file__).parents[2] / "tests" / "gpu"
    if not folder.is_dir():
        sys.stdout.write("  the tests are in the source checkout, not in the installed package\n")
        return 1
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(folder)]
    if find_spec("xdist"):
        command += ["-n", str(WORKERS), "--dist", "worksteal"]
    # What passed is not run again, and what was compiled is not compiled again, where the time was too short for all.
    kept = {"CTXBENCH_PASSED": str((out / "passed.txt").resolve()), "TRITON_CACHE_DIR": str((out / "triton").resolve())}
    code = _within([*command, f"--junit-xml={out / 'tests.xml'}"], limit_s, out / "tests.log", kept)
    return 0 if code == NO_TESTS and (out / "passed.txt").exists() else code


def ratios(out: Path, limit_s: float) -> int:
    """Kernels beside baselines; each comparison is on the disk as soon as it has ended."""
    command = [sys.executable, "-m", "ctxbench.suites.gpu.ratios", str(out / "ratios.json"), f"--seconds={limit_s:.0f}"]
    return _within(command, limit_s + 20, out / "ratios.log")


def run(out: Path, limit_s: float) -> int:
    """The main job; a cell that fails is a row, and fails the part."""
    folder = out / "run"
    axes = ["--methods", "all", "--impls", "supported", "--seq", "1k..128k", "--mode", "forward,train"]
    # A run that was cut short is continued by its folder alone.
    plan = [] if (folder / "run.json").exists() else [*axes, "--device", "cuda", "--dtype", "bf16"]
    limits = ["--budget", f"{max(limit_s - 15, 30):.0f}s", "--cell-timeout", "30s", "--no-report", "--out", str(folder)]
    program = "from ctxbench.cli import main; main()"
    return _within([sys.executable, "-c", program, "run", *plan, *limits], limit_s + 20, out / "run.log")


def _within(command: list[str], limit_s: float, log: Path, environment: dict[str, str] | None = None) -> int:
    """Exit code of a command, its output in a file and its last lines here; 1 where it ran out of time.

    Then whatever it started ends with it, so that the next part has the device alone.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (environment or {}), start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 1
            file.write(f"\nstopped after {limit_s:.0f} s\n")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    sys.stdout.write("".join(f"  {line}\n" for line in log.read_text(errors="replace").splitlines()[-12:]))
    return code


PARTS: dict[str, Callable[[Path, float], int]] = {"tests": tests, "ratios": ratios, "run": run}

if __name__ == "__main__":
    sys.exit(main())
