"""The figures. A module a figure: ``data`` (frame to table), ``static`` (matplotlib), ``interactive`` (Plotly JSON)."""
