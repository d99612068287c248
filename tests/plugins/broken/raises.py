"""A plug-in that fails at import."""

raise RuntimeError("planted at import")
