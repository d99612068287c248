"""A plug-in whose name is no identifier."""

from ctxbench.method import Method

METHOD = Method("Not A Name", build=lambda *_: None)
