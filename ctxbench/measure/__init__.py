"""Meters, one a file, one result type each. Needs torch; never pandas, plotly, matplotlib or scipy."""
