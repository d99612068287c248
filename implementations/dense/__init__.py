"""Dense softmax attention: the quadratic baseline that every other method is compared with."""

from ctxbench.implementations._shared.backends_table import BACKENDS
from ctxbench.implementations._shared.flex_table import flex_impl
from ctxbench.implementations._shared.native_table import TRAINED, native_impl
from ctxbench.implementations._shared.picks_table import DENSE, NATIVE, NATIVE_TRAINED, SLABS, SLABS_DECODED
from ctxbench.implementations._shared.products_table import slabs_impl
from ctxbench.method import POSITIONS, ROPE, Claim, Impl, Method, Paper

METHOD = Method(
    name="dense",
    title="Dense attention",
    family="dense",
    idea="Every token attends to every token it may see; exact, quadratic, the baseline.",
    paper=Paper("Vaswani et al. 2017, Attention Is All You Need", "arXiv:1706.03762", "3.2"),
    build=f"{__name__}.layer:build",
    modes=("forward", "train", "stream", "decode"),
    causal=(True, False),
    positions=POSITIONS,
    support=f"{__name__}.params:support",
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="materialises all scores"),
        Impl("blocked", run=f"{__name__}.blocked:attend", note="fused scaled_dot_product_attention"),
        slabs_impl(
            f"{__name__}.slabs:attend",
            modes=(),
            support=f"{__name__}.params:slabs_support",
            note="plain products by slabs of queries: bf16 at twice the fused kernel's speed",
        ),
        native_impl(
            f"{__name__}.triton:attend",
            positions=("none", *ROPE, "t5", "alibi"),
            modes=TRAINED,
            counts_as="",
        ),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            positions=POSITIONS,
            support=f"{__name__}.params:triton_support",
            note="flash kernels of our own; a decoded token's keys are split over the device",
        ),
        flex_impl(
            f"{__name__}.flex:attend",
            "ctxbench.implementations._shared.flex_table:support",
            "PyTorch's FlexAttention, compiled; biases are added inside",
            positions=("none", *ROPE, "t5", "alibi"),
        ),
        *BACKENDS,
    ),
    picks=(NATIVE, NATIVE_TRAINED, *SLABS, SLABS_DECODED, *DENSE),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    claims=(
        Claim("memory N^2", "wrong for fused attention", "B N (6 d + 2 f) elements; h N^2 only if scores are kept"),
        Claim("compute N^2 d", "incomplete", "24 N d^2 + 2 N^2 d a layer (causal): linear terms rule below N = 12 d"),
    ),
)
