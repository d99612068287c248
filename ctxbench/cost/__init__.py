"""Closed forms (SymPy) and, independently, what the dispatcher does (fake tensors).

``symbols`` and ``terms`` are what a method's ``cost.py`` is written in; ``model`` evaluates; ``trace`` needs torch.
"""

from ctxbench.cost.model import Cost, big_o, evaluate, latex, local_slope, total

__all__ = ["Cost", "big_o", "evaluate", "latex", "local_slope", "total"]
