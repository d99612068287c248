"""Recurrent memory transformer: memory tokens around every segment carry what the next one reads."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import LOOP, NATIVE, SLABS
from ctxbench.implementations._shared.products_table import slabs_impl
from ctxbench.implementations.rmt.params import RMTParams
from ctxbench.method import ROPE, Claim, Impl, Method, Paper

METHOD = Method(
    name="rmt",
    title="Recurrent memory transformer",
    family="recurrent",
    idea="Memory tokens stand before and after each segment; what the last ones become is the next segment's memory.",
    paper=Paper("Bulatov et al. 2022, Recurrent Memory Transformer", "arXiv:2207.06881", "3"),
    build=f"{__name__}.layer:build",
    params=RMTParams,
    variants=({"bptt_depth": 1}, {"variant": "xl", "bptt_depth": 0}),
    memory_parameter="num_memory",
    segment="segment_len",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "LM-RMT has it, but its term is a product of every query with projected distances, which no "
        "impl here makes; t5 and alibi add a number by distance",
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="all scores of a segment, with a mask"),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:attend",
            note="fused attention, no mask; with a bias, slabs of queries; the same loop over segments",
        ),
        slabs_impl(f"{__name__}.slabs:attend", positions=("none", *ROPE)),
        native_impl(f"{__name__}.triton:attend", counts_as=""),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:triton_support",
            note="one launch of our kernels a piece, in xl too",
        ),
        Impl(
            "graph",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "stream"),
            support=f"{__name__}.params:graph_support",
            note="as triton, but whole segments are replayed from a recording: no launches from Python",
        ),
    ),
    picks=(NATIVE, *SLABS, *LOOP),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    deviations=(
        "positions, and the distances of a bias, count the rows of a segment, memory tokens included, and begin anew "
        "in each; T5's buckets are causal, so that a later memory token, which xl shows, has the number of distance 0",
        "one pre-norm layer with a final norm for both variants; LM-RMT stands on Transformer-XL, whose relative "
        "positions and cache are left out",
        "the learned memory starts as independent normal rows in both variants; LM-RMT repeats one row, which without "
        "positions would stay one row for ever",
        "bptt_depth cuts in every implementation; the published wrapper of Hugging Face models computes a detached "
        "copy and goes on with the other one",
        "a whole sequence writes nothing after its last segment, and no read token passes the top layer's output "
        "projection and network: nobody would look",
    ),
    claims=(
        Claim(
            "a few tokens persist, are updated each segment and carry a global summary forward",
            "true",
            "m d elements are all that crosses a boundary; what they hold is trained over bptt_depth boundaries",
        ),
        Claim(
            "constant memory usage of recurrent transformers",
            "true of inference only",
            "training keeps the activations of every segment, since one loss needs the graph of all of them",
        ),
        Claim(
            "compute N d^2 of recurrent transformers",
            "incomplete",
            "N (24 d^2 + 2 S d) and (S + 2 m) / S times that for the memory tokens, in a chain of L N / S layer "
            "evaluations",
        ),
    ),
)
