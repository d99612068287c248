"""Pyramid transformer: layers at several resolutions, each pooled from the one below, summed at the finest."""

from ctxbench.implementations._shared.flex_table import flex_impl
from ctxbench.implementations._shared.native_table import TRAINED, native_impl
from ctxbench.implementations._shared.picks_table import KERNELS, NATIVE, NATIVE_TRAINED
from ctxbench.implementations.pyramid.params import PyramidParams, fewest_layers
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper

METHOD = Method(
    name="pyramid",
    title="Pyramid transformer",
    family="hierarchical",
    idea="Runs part of the layers on pooled, narrower copies of the sequence and adds their outputs to every token.",
    paper=Paper(
        "Source document, PyramidTransformer; shift after Nawrot et al. 2022, Hierarchical Transformers Are More "
        "Efficient Language Models",
        "arXiv:2110.13711",
    ),
    build=f"{__name__}.layer:build",
    params=PyramidParams,
    variants=({"pool": 3, "levels": 2}, {"pool": 3, "levels": 2, "pooled_queries": True}),
    modes=("forward", "train", "stream", "decode"),
    causal=(True, False),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "its term is a part of its layer, with weights and a product a pair of its own; dense and "
        "transformer_xl have it",
    },
    support=f"{__name__}.params:support",
    layers=fewest_layers,
    impls=(
        Impl("reference", run=f"{__name__}.reference:OPERATORS", note="materialises all scores and all read cells"),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:OPERATORS",
            note="fused attention at every level; levels are projected before they are repeated",
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
            note="flash kernels of our own at every level; levels are projected before they are repeated, pooled and "
            "repeated by one kernel each",
        ),
        flex_impl(
            f"{__name__}.flex:OPERATORS",
            f"{__name__}.params:flex_support",
            "PyTorch's FlexAttention, compiled, at every level; levels are projected before they are repeated",
        ),
        Impl(
            "as_written",
            run=f"{__name__}.as_written:SketchPyramid",
            modes=("forward", "train"),
            positions=("none",),
            support=f"{__name__}.params:sketch_support",
            defects={
                "agreement": "attention runs over the batch axis, layers beyond a multiple of the levels are dropped, "
                "and coarse cells are stretched to the length by linear interpolation",
                "causality": "there is no mask: pooling and interpolation carry later tokens into earlier outputs",
                "batch_independence": "nn.MultiheadAttention without batch_first reads the batch as the sequence, so "
                "the samples of a batch attend to each other",
                "receptive_field": "no token attends to another token; what little mixing there is comes from pooling "
                "and interpolation and stays within a few cells, some of them later ones",
            },
            note="the source document's sketch",
        ),
    ),
    picks=(NATIVE, NATIVE_TRAINED, *KERNELS),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(
        Equivalence("one level", other="dense", params={"levels": 1}),
        Equivalence("one level, any pool factor", other="dense", params={"levels": 1, "pool": 3}),
    ),
    deviations=(
        "layers are pre-norm (the source document: post-norm), so that one level is dense attention, weight for weight",
        "level 0 is added to the output as it is; only coarser levels are projected (the source document projects the "
        "concatenation of all levels and has no residual)",
        "heads halve with the width, so that their own width stays (the source document keeps their number)",
        "layers that do not divide evenly go to the finest levels (the source document drops them)",
        "ragged lengths: the last cell is the mean of the cells it has, and every token reads its own cell "
        "(the source document drops the tail and stretches the rest)",
        "a causal form exists: complete cells only, read with the shift",
    ),
    claims=(
        Claim(
            "hierarchical processing handles tens of thousands of tokens efficiently",
            "overstated",
            "still O(T^2 d), because level 0 attends at full length; 3 levels cost 73/192 of as many flat layers",
        ),
        Claim("levels run coarse to fine", "wrong", "fine to coarse; nothing flows back down but the final sum"),
        Claim("num_layers layers", "incomplete", "num_layers // levels a level: of 7 layers 3 levels run 6, of 2 none"),
    ),
)
