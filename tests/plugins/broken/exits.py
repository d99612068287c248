"""A plug-in that ends the process at import."""

raise SystemExit(3)
