"""Block attention with a state: full attention inside blocks, and a few vectors that pass from block to block."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import DIAGONAL, LOOP, NATIVE, SLABS
from ctxbench.implementations._shared.products_table import slabs_impl
from ctxbench.implementations.block_state.params import BlockStateParams
from ctxbench.method import ROPE, Claim, Impl, Method, Paper

METHOD = Method(
    name="block_state",
    title="Local blocks with a state",
    family="recurrent",
    idea="Full causal attention inside a block, behind state vectors that a small network makes of the block before.",
    paper=Paper("Source document, Hybrid Local + State; its published relative is block_recurrent"),
    params=BlockStateParams,
    variants=({"variant": "layer", "update": "gru", "num_states": 3}, {"variant": "layer", "pool": "last"}),
    memory_parameter="num_states",
    segment="block_len",
    build=f"{__name__}.layer:build",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "its term is one of a memory of tokens; a state vector has no distance to a token",
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="keeps a block's scores"),
        Impl(
            "blocked", run=f"{__name__}.blocked:attend", support=f"{__name__}.params:fused_support",
            note="fused attention inside a block",
        ),
        slabs_impl(f"{__name__}.slabs:attend", positions=("none", *ROPE)),
        Impl(
            "diagonal", run=f"{__name__}.blocked:attend", support=f"{__name__}.params:diagonal_support",
            note="as blocked, but block t of layer l together with block t + 1 of layer l - 1; variant layer",
        ),
        native_impl(f"{__name__}.triton:attend"),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:triton_support",
            note="our kernels inside a block, without a mask where a call continues it",
        ),
        Impl(
            "diagonal_triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            positions=("none", *ROPE),
            support=f"{__name__}.params:diagonal_triton_support",
            note="as diagonal, with one launch of our kernels for all cells of a diagonal",
        ),
        Impl(
            "graph",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "stream"),
            support=f"{__name__}.params:graph_support",
            note="as triton, but whole blocks are replayed from a recording: no launches from Python",
        ),
    ),
    picks=(NATIVE, *SLABS, DIAGONAL, *LOOP),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    deviations=(
        "state rows come first and are causal among themselves: a whole block is plain causal attention",
        "positions count rows of the block, states included, and begin anew in every block",
        "the pooled block is its mean or its last output; there is no pooling by learned queries",
    ),
    claims=(
        Claim(
            "constant memory growth",
            "misnamed",
            "the memory is constant, its growth is 0: k d numbers a state and at most one block of keys and values",
        ),
    ),
)  # fmt: skip
