"""LongLoRA's shifted sparse attention: causal groups, and half of the heads see groups shifted by half."""

from ctxbench.implementations._shared.flex_table import flex_impl
from ctxbench.implementations._shared.native_table import TRAINED, native_impl
from ctxbench.implementations._shared.picks_table import KERNELS, NATIVE_FORWARD, NATIVE_TRAINED
from ctxbench.implementations.longlora.params import LongLoRAParams
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper

POSITIONS = ("none", *ROPE, "t5", "alibi")
DENSE = "shifted groups are for training; inference is dense attention with the same weights, see the method dense"

METHOD = Method(
    name="longlora",
    title="LongLoRA (S2-Attn)",
    family="sparse",
    idea="Tokens attend inside groups; half of the heads shift theirs by half, so that neighbours are connected.",
    paper=Paper(
        "Chen et al. 2024, LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
        "arXiv:2309.12307",
        "3.2",
    ),
    build=f"{__name__}.layer:build",
    params=LongLoRAParams,
    variants=({"group": 6}, {"group": 8, "wrap": True}, {"group_fraction": 0.5}),
    memory_parameter="group",
    modes=("forward", "train"),
    without={"stream": DENSE, "decode": DENSE},
    causal=(True, False),
    positions=POSITIONS,
    without_positions={
        "transformer_xl": "its term is a part of its layer, with weights and a product a pair of its own; dense and "
        "transformer_xl have it",
    },
    support=f"{__name__}.params:support",
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="rolls, as the pseudo-code; keeps scores of groups"),
        Impl("blocked", run=f"{__name__}.blocked:attend", note="fused attention on slices, nothing rolled"),
        native_impl(f"{__name__}.triton:attend", modes=TRAINED, counts_as=""),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:triton_support",
            note="flash kernels of our own; a shift is a line, nothing is copied but the halves of the heads together",
        ),
        flex_impl(
            f"{__name__}.flex:attend",
            f"{__name__}.params:flex_support",
            "PyTorch's FlexAttention, compiled, with block lists in closed form; nothing is rolled",
            positions=POSITIONS,
        ),
    ),
    picks=(NATIVE_FORWARD, NATIVE_TRAINED, *KERNELS),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(Equivalence("a group is at least twice the sequence", other="dense", params={"group": 256}),),
    deviations=(
        "any length: the last groups may be shorter (published code: the group divides the sequence)",
        "of an odd number of heads the larger half is not shifted (published code: an even number)",
        "no low-rank adapters: all weights train; adapters change weights, not attention",
    ),
    claims=(
        Claim(
            "sparse attention during training reduces compute",
            "right, by a constant",
            "at the default quarter 0.117 N^2 pairs in place of 0.5 N^2, and still quadratic; only a fixed group makes "
            "it linear. The linear maps, 24 N d^2, stay, and inference is dense",
        ),
    ),
)
