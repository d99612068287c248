"""The flash kernels at every level: causal cells over cells, pooled queries over the finer cells they are made of.

Between levels, one kernel averages a level's cells, and adds the gradient it brings them to the one they have; in the
sum over levels it adds projected rows to the finer ones that read them, and no repeated copy is ever written.
"""

from __future__ import annotations

from functools import partial

from ctxbench.implementations._shared.pooling import pooled, raised
from ctxbench.implementations.pyramid.blocked import fuse
from ctxbench.implementations.pyramid.layer import Operators
from ctxbench.implementations.pyramid.native import attend, attend_below

OPERATORS = Operators(attend, attend_below, partial(fuse, raised=raised), pooled)
