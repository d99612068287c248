"""Segment-recurrent transformer: every layer remembers some of its own outputs from segment to segment."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import DIAGONAL, LOOP, NATIVE, SLABS
from ctxbench.implementations._shared.products_table import slabs_impl
from ctxbench.implementations.segment_recurrent.params import SegmentRecurrentParams
from ctxbench.method import ROPE, Claim, Impl, Method, Paper

METHOD = Method(
    name="segment_recurrent",
    title="Segment-recurrent transformer",
    family="recurrent",
    idea="A segment also attends, twice, to items that the same layer made of the ends of earlier segments.",
    paper=Paper("Source document, RecurrentMemoryTransformer; schedule: Sivtsov et al. 2025", "arXiv:2506.05229"),
    build=f"{__name__}.layer:build",
    params=SegmentRecurrentParams,
    variants=({"bptt_depth": 1},),
    memory_parameter="memory_len",
    segment="segment_len",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "its term is a product of every query with distances that it projects itself: each look "
        "would need projections and two vectors of its own; t5 and alibi add a number by distance",
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="all scores, with a mask, segment after segment"),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:attend",
            note="fused attention, or slabs of queries under a bias; the same loop over segments",
        ),
        slabs_impl(f"{__name__}.slabs:attend"),
        native_impl(f"{__name__}.triton:attend"),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:triton_support",
            note="our kernels in both looks, without padding or a mask",
        ),
        Impl(
            "diagonal_triton",
            run=f"{__name__}.triton:DiagonalTritonStack",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:diagonal_support",
            note="as diagonal, with one launch of our kernels for all cells of a diagonal",
        ),
        Impl(
            "graph",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "stream"),
            support=f"{__name__}.params:graph_support",
            note="as triton, but segments with a full memory are replayed from a recording: no launches from Python",
        ),
        Impl(
            "diagonal",
            run=f"{__name__}.diagonal:DiagonalStack",
            note="as blocked, but segment t of layer l together with segment t + 1 of layer l - 1",
        ),
        Impl(
            "as_written",
            run=f"{__name__}.as_written:SketchStack",
            modes=("forward", "train", "stream"),
            positions=("none",),
            without=dict.fromkeys((*ROPE, "t5", "alibi"), "the sketch has no positions"),
            defects={
                "agreement": "the gate is computed and forgotten, so that the memory holds bare outputs; no mask; the "
                "second norm is applied only where there is a memory",
                "causality": "no mask: a token sees all later ones of its segment",
                "receptive_field": "an output depends on later tokens of its segment",
                "state": "the memory lives on the module and keeps its graph: a second training step on it fails",
            },
            note="the source document's sketch, attention moved to the token axis",
        ),
    ),
    picks=(NATIVE, *SLABS, DIAGONAL, *LOOP),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    deviations=(
        "attention is causal at the lower right: all of the memory, and the segment up to the token (source document: "
        "no mask, over the batch axis)",
        "the gate is used: an item is g * output + (1 - g) * mean of the memory (source document: computed, unused)",
        "the memory is a state that comes in and goes out, detached between calls (source document: on the module)",
        "a memory changes when a segment is complete, not by the pieces in which it arrives",
        "positions, and the distances of a bias in both looks: a segment counts from 0, its memory up to -1 by the "
        "place of an item, whatever time it came from; one table of T5, or one set of slopes, serves both looks",
        "the norm after the second look is always applied (source document: only where there is a memory)",
    ),
    claims=(
        Claim(
            "memory N d + M d; constant memory usage",
            "wrong",
            "state L M d; the activations of a segment add B (h S (S + M) + 6 S d) where scores are kept; training "
            "through all segments keeps them all",
        ),
        Claim(
            "compute N d^2",
            "incomplete",
            "30 N d^2 + 8 (N / S) M d^2 + 4 N (S + M) d + 4 N M d a layer as sketched: attention rules from "
            "S + 2 M = 7.5 d on, and neither S nor M appears in the claim",
        ),
        Claim(
            "recurrent memory transformer",
            "misnamed",
            "a cache of outputs of the same layer, without memory tokens; the published method is rmt",
        ),
    ),
)
