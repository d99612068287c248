"""The operators of ``native`` by the flash kernels; cells of all scales come from one reading of keys and values."""

from __future__ import annotations

from ctxbench.implementations._shared.pooling import pooled
from ctxbench.implementations.hierarchical.blocked import fuse
from ctxbench.implementations.hierarchical.layer import Operators
from ctxbench.implementations.hierarchical.native import attend, mix

OPERATORS = Operators(attend, mix, fuse, pooled)
