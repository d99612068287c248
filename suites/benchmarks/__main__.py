"""``python -m ctxbench.suites.benchmarks [NAME ...] [--threads N]``: every ratio, side by side in one run."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

from ctxbench.suites import benchmarks
from ctxbench.suites.benchmarks.ratios import compare, show, with_kept_heap


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ctxbench.suites.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="modules bench_NAME; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, received {arguments.rounds}: a spread needs two")
    with_kept_heap()
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    available = [
        module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name.startswith("bench_")
    ]
    wanted = [f"bench_{name}" for name in arguments.names] or available
    unknown = sorted(set(wanted) - set(available))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; accepted: {', '.join(name[6:] for name in available)}")
    reached = True
    for name in wanted:
        module = importlib.import_module(f"{benchmarks.__name__}.{name}")
        for comparison in getattr(module, "comparisons", list)():
            reached &= show(comparison, compare(comparison, arguments.rounds))
    sys.stdout.write("\nevery floor reached\n" if reached else "\nsome floors were missed\n")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
