"""Which back ends exist, and what each takes; for planning too, so neither torch nor any of them is imported here."""

from __future__ import annotations

from ctxbench.method import YES, Dims, Impl, Params, Support, no

OPERATORS = "ctxbench.implementations._shared.backends"
WIDEST, MULTIPLE = 256, 8  # channels of a head that all of these kernels take
MODES = ("forward", "train", "decode")  # a chunk behind a cache would need a mask that they align differently


def support(dims: Dims, params: Params, device: str, dtype: str) -> Support:
    """Heads that fused kernels take without padding them."""
    if dims.head_dim % MULTIPLE or dims.head_dim > WIDEST:
        return no(
            f"fused kernels take heads of a multiple of {MULTIPLE} channels, at most {WIDEST}, received {dims.head_dim}"
        )
    return YES


def causal_support(dims: Dims, params: Params, device: str, dtype: str) -> Support:
    """The same for kernels that have no other direction."""
    return support(dims, params, device, dtype) if dims.causal else no("fla has causal softmax attention alone")


def backend(
    name: str, note: str, needs: tuple[str, ...] = (), dtypes: tuple[str, ...] = ("bf16", "fp16"),
    modes: tuple[str, ...] = MODES, check: str = "support",
) -> Impl:  # fmt: skip
    """The impl of one library; rotations come before it, biases it does not take."""
    return Impl(
        name, run=f"{OPERATORS}:{name}", needs=needs, devices=("cuda",), dtypes=dtypes, modes=modes,
        positions=("none", "rope", "rope_linear", "rope_ntk", "rope_yarn"), support=f"{__name__}:{check}", note=note,
    )  # fmt: skip


BACKENDS = (
    backend("cudnn", "PyTorch's cuDNN kernel, pinned"),
    backend("flash", "PyTorch's FlashAttention-2 kernel, pinned"),
    backend("efficient", "PyTorch's memory-efficient kernel, pinned", dtypes=("bf16", "fp16", "fp32")),
    backend("flash_attn", "the flash-attn package, 2.x", needs=("flash-attn",)),
    backend("flash_attn_4", "the flash-attn-4 package, CuTe kernels", needs=("flash-attn-4",)),
    backend(
        "fla",
        "softmax attention of flash-linear-attention, in Triton, causal",
        needs=("fla-core",),
        modes=("forward", "train"),
        check="causal_support",
    ),
    backend("xformers", "the xFormers package", needs=("xformers",), dtypes=("bf16", "fp16", "fp32")),
)
NAMES = tuple(impl.name for impl in BACKENDS)
