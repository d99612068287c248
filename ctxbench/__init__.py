"""ctxbench: what long-context architectures cost, at which length and memory size, on this machine."""

__version__ = "0.1.0"
