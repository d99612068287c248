"""When ``graph`` has anything to replay, for planning too: neither torch nor triton here."""

from __future__ import annotations

from ctxbench.method import YES, Dims, Support, no


def support(dims: Dims, segment_len: int, growing: int = 0) -> Support:
    """Whether two whole segments are left to replay after those before which the state is still ``growing``."""
    whole = dims.seq_len // segment_len
    if whole < growing + 2:
        before = f" after {growing} while the state still grows" if growing else ""
        return no(
            f"a recorded step is replayed over whole segments of equal shapes: needs at least 2 of {segment_len} tokens"
            f"{before}, received {dims.seq_len} tokens, which hold {whole}"
        )
    return YES
