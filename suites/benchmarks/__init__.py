"""Benchmarks of parts: pytest-benchmark files (``bench_*.py``) and ratios taken side by side in one run.

``pytest suites/benchmarks -o python_files='bench_*.py' --benchmark-only`` guards small operators;
``python -m ctxbench.suites.benchmarks`` prints the ratios of every module that offers ``comparisons()``.
"""
