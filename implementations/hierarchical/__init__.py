"""Hierarchical attention: a window of tokens and, further back, the means of ever larger cells."""

from ctxbench.implementations._shared.flex_table import flex_impl
from ctxbench.implementations._shared.native_table import TRAINED, native_impl
from ctxbench.implementations._shared.picks_table import KERNELS, NATIVE, NATIVE_TRAINED
from ctxbench.implementations.hierarchical.params import HierarchicalParams
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper

METHOD = Method(
    name="hierarchical",
    title="Hierarchical attention",
    family="hierarchical",
    idea="Every token attends to recent tokens one by one and to the further past as means of 4, 16, ... tokens.",
    paper=Paper(
        "Source document, HierarchicalAttention; the causal form with one coarse scale is the compressed branch of "
        "Yuan et al. 2025, Native Sparse Attention",
        "arXiv:2502.11089",
        "3.3.1",
    ),
    build=f"{__name__}.layer:build",
    params=HierarchicalParams,
    variants=({"form": "causal_linear", "disjoint": True}, {"pool": 3, "levels": 2}),
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
        Impl("reference", run=f"{__name__}.reference:OPERATORS", note="materialises all scores, masks most of them"),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:OPERATORS",
            note="causal: slabs of about 128 queries against the cells they see, probabilities recomputed in backward; "
            "seed: fused attention, branches projected before they are added",
        ),
        native_impl(f"{__name__}.native:OPERATORS", positions=("none", *ROPE), modes=TRAINED, counts_as=""),
        Impl(
            "triton",
            run=f"{__name__}.triton:OPERATORS",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "train", "stream"),
            positions=("none", *ROPE),
            support=f"{__name__}.params:triton_support",
            note="flash kernels of our own, one launch a scale; scales are merged by their log-sum-exps; one kernel "
            "that reads each token once pools them all",
        ),
        flex_impl(
            f"{__name__}.flex:OPERATORS",
            f"{__name__}.params:flex_support",
            "PyTorch's FlexAttention, compiled, over tokens and cells in one tensor, block lists in closed form",
        ),
        Impl(
            "as_written",
            run=f"{__name__}.as_written:SketchAttention",
            modes=("forward", "train"),
            positions=("none",),
            support=f"{__name__}.params:sketch_support",
            defects={
                "agreement": "attention runs over the batch axis, heads are shared out among the scales, and coarse "
                "cells are stretched to the length by linear interpolation",
                "causality": "there is no mask: pooling and interpolation carry later tokens into earlier outputs",
                "batch_independence": "nn.MultiheadAttention without batch_first reads the batch as the sequence, so "
                "the samples of a batch attend to each other",
                "receptive_field": "no token attends to another token; what little mixing there is comes from pooling "
                "and interpolation and stays within a cell or two, some of it from later tokens",
            },
            note="the source document's sketch",
        ),
    ),
    picks=(NATIVE, NATIVE_TRAINED, *KERNELS),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(
        Equivalence(
            "there is one scale and the window covers the sequence",
            other="dense",
            params={"levels": 1, "window": 1 << 20},
        ),
        Equivalence(
            "there is one scale",
            other="longformer",
            params={"levels": 1, "window": 7},
            other_params={"window": 7, "num_global": 0},
        ),
    ),
    deviations=(
        "the causal forms are ours: the source document has no mask; cells are seen from their last token on",
        "causal: one softmax over window and cells, whose logits get log(span), so that a cell of equal keys weighs "
        "like its tokens; cells are means of keys and values, there are no coarse queries and nothing is upsampled",
        "causal: scales overlap unless disjoint, a recent token is seen by itself and inside a cell of every scale",
        "scales are powers of one factor, so that cells nest; the source document takes any list that begins with 1",
        "seed: every scale has all heads; attention runs over the cells of a sample",
        "seed: a last, ragged cell is the mean of the tokens it has, and its copy is cut to the length",
        "wrapped in a pre-norm layer; the source document has neither norm, residual nor FFN",
    ),
    claims=(
        Claim(
            "compute 3 N d",
            "wrong by about N",
            "as repaired sum over s of (8 n d^2 + 4 n^2 d) with n = N / s, and (2 + 3) * 2 N d^2 of upsampling and "
            "fusion: 9,322 times 3 N d at N = 4096, d = 512; the scale of single tokens keeps it quadratic",
        ),
        Claim(
            "memory 3 N d",
            "wrong with scores kept, of the right order with fused attention",
            "scores 2 e h N^2 (1 + 1/16 + 1/256) if kept; else a few N d a scale",
        ),
    ),
)
