"""A folder plug-in with a relative import."""

from ctxbench.method import Method

from .module import build

METHOD = Method("folder_plugin", build=build)
