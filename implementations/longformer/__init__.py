"""Longformer: a sliding window for every token, and global tokens that see and are seen by all."""

from ctxbench.implementations._shared.flex_table import flex_impl
from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import KERNELS, NATIVE
from ctxbench.implementations.longformer.params import LongformerParams
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper

METHOD = Method(
    name="longformer",
    title="Longformer",
    family="sparse",
    idea="Every token attends to a window around itself; a few global tokens attend to all and are seen by all.",
    paper=Paper("Beltagy et al. 2020, Longformer: The Long-Document Transformer", "arXiv:2004.05150", "3.1"),
    build=f"{__name__}.layer:build",
    params=LongformerParams,
    variants=(
        {"num_global": 0},
        {"dilation": 2},
        {"num_global": 0, "dilation": 3, "dilated_heads": 1},
        {"scattered": "7+11"},
        {"scattered": "9", "separate_global": False, "dilation": 2, "dilated_heads": 1},
    ),
    memory_parameter="window",
    modes=("forward", "train", "stream", "decode"),
    causal=(True, False),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "its term is a part of its layer, with weights and a product a pair of its own; dense and "
        "transformer_xl have it",
    },
    support=f"{__name__}.params:support",
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="materialises all scores and masks most of them"),
        Impl(
            "blocked",
            run="ctxbench.implementations._shared.window_blocks:attend",
            note="blocks of 64 queries against the run of keys they see; probabilities are recomputed in backward",
        ),
        native_impl("ctxbench.implementations._shared.window_ranges:attend", counts_as=""),
        Impl(
            "triton",
            run="ctxbench.implementations._shared.window_ranges:attend",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:triton_support",
            note="flash kernels of our own; band, prefix and scattered globals share one softmax",
        ),
        flex_impl(
            "ctxbench.implementations._shared.window_flex:attend",
            f"{__name__}.params:flex_support",
            "PyTorch's FlexAttention, compiled, with block lists in closed form; global rows are a call of their own",
            positions=("none", *ROPE, "t5", "alibi"),
        ),
        Impl(
            "as_written",
            run=f"{__name__}.as_written:SketchAttention",
            modes=("forward", "train"),
            positions=("none",),
            support=f"{__name__}.params:sketch_support",
            defects={
                "agreement": "there is no causal form, global tokens have no projections of their own, and an even "
                "window has one key more than its name says",
                "causality": "the window reaches window // 2 tokens ahead, and every global token sees all later ones",
                "receptive_field": "an output depends on later tokens, and on half as many earlier ones as the window",
            },
            note="the source document's sketch: a T x T mask filled by a Python loop in every call",
        ),
    ),
    picks=(NATIVE, *KERNELS),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(
        Equivalence(
            "the window covers the sequence (window // 2 of it when bidirectional) and there are no global tokens",
            other="dense",
            params={"window": 1 << 20, "num_global": 0},
        ),
    ),
    deviations=(
        "the causal form with global tokens is ours: the paper's language models have none. A global row sees itself "
        "and earlier tokens, so with separate projections only tokens up to the last global one pass through them",
        "one pattern for all layers; the paper widens windows towards the top and dilates only upper layers",
        "pre-norm layer; the released encoder is post-norm",
        "no padding mask: all sequences of a batch have one length",
    ),
    claims=(
        Claim(
            "memory N w",
            "wrong as sketched, right in order of growth done right",
            "as sketched 2 e B h N^2 of scores and 5 N^2 of masks; blocked keeps no scores of the whole sequence, so "
            "its memory does not grow with w at all: B N (5 d + ...) and one block's scores",
        ),
        Claim(
            "compute N w d",
            "wrong as sketched, incomplete done right",
            "as sketched 4 N^2 d; done right 4 d (N W - W (W - 1) / 2 + globals), plus the projections 8 N d^2, which "
            "the window exceeds only where W > 2 d",
        ),
        Claim(
            "window_size keys a token",
            "off by one",
            "2 * (window // 2) + 1 keys when bidirectional: 513 for 512, 7 for 7",
        ),
    ),
)
