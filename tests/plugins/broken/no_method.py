"""A plug-in without METHOD."""

METHOD = "dense"
