"""Suites: named tables of axes and limits, in TOML."""
