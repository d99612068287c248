"""Transformer-XL: segments that attend to the previous layer's earlier inputs, with relative positions."""

from ctxbench.implementations._shared.flex_table import flex_impl
from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import BLOCKED, KERNELS, TILES
from ctxbench.implementations.transformer_xl.params import TransformerXLParams
from ctxbench.method import POSITIONS, Claim, Impl, Method, Paper

METHOD = Method(
    name="transformer_xl",
    title="Transformer-XL",
    family="recurrent",
    idea="A segment also sees the mem_len inputs that its layer had before it; positions are distances.",
    paper=Paper(
        "Dai et al. 2019, Transformer-XL: Attentive Language Models beyond a Fixed-Length Context",
        "arXiv:1901.02860",
        "3.2 and 3.3",
    ),
    params=TransformerXLParams,
    variants=({"clamp_len": 3}, {"same_length": True, "clamp_len": 3}, {"same_length": True, "start": "zeros"}),
    memory_parameter="mem_len",
    segment="segment_len",
    build=f"{__name__}.layer:build",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("transformer_xl",),
    without_positions={
        position: "distances between a segment and its memory are part of this method's own score"
        for position in POSITIONS
        if position != "transformer_xl"
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="the published loop over segments"),
        Impl("blocked", run=f"{__name__}.blocked:attend", note="all segments at once, shift without a copy"),
        native_impl(
            f"{__name__}.native:attend",
            note="the forward pass in C++, all segments in one call; one token is faster by blocked's projections",
            modes=("forward", "train", "stream"),
            support="ctxbench.implementations._shared.native_table:wide_support",
            counts_as="",
        ),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "train", "stream"),
            support=f"{__name__}.params:triton_support",
            note="fused kernels of our own, all segments in one launch; one token is faster by blocked's projections",
        ),
        flex_impl(
            f"{__name__}.flex:attend",
            f"{__name__}.params:flex_support",
            "PyTorch's FlexAttention reads the position term, one product; in training memory is a copy of its keys",
            positions=("transformer_xl",),
        ),
        Impl(
            "as_written",
            run=f"{__name__}.as_written:SketchStack",
            support=f"{__name__}.params:sketch_support",
            defects={
                "agreement": "no relative positions, and the memory holds outputs of the same layer, not its inputs",
                "causality": "no mask: every token sees all later ones",
                "receptive_field": "the whole input is one segment, so every output depends on every token",
                "state": "the memory lives on the module, and cutting the input elsewhere changes the result",
            },
            note="the source document's sketch, quadratic and not causal",
        ),
    ),
    picks=(TILES, BLOCKED, *KERNELS),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    deviations=(
        "u and v belong to each layer, as with the published option untie_r; the base models share them",
        "no dropout, no embedding scale: a benchmark has no vocabulary and no regularisation",
        "blocked projects keys and values once a token; the published loop projects memory rows again",
    ),
    claims=(
        Claim(
            "effectively unlimited length",
            "wrong",
            "an output depends on at most L mem_len + segment_len earlier tokens; older ones cannot reach it",
        ),
        Claim(
            "compute N^2 without a segment loop",
            "true of the sketch only",
            "N (mem_len + segment_len) d pairs in the published form: linear in N",
        ),
        Claim(
            "caches K and V of past segments",
            "different in the paper",
            "the memory holds inputs of the layer, half the bytes of K and V, and is projected again",
        ),
    ),
)
