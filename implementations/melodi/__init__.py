"""MELODI: windows that hand a short-term memory on in every layer, and a long-term memory in the middle one."""

from ctxbench.implementations._shared.native_table import TRAINED, native_impl
from ctxbench.implementations._shared.picks_table import DIAGONAL, LOOP, NATIVE, NATIVE_TRAINED, SLABS
from ctxbench.implementations._shared.products_table import slabs_impl
from ctxbench.implementations.melodi.params import MelodiParams
from ctxbench.method import ROPE, Claim, Impl, Method, Paper

METHOD = Method(
    name="melodi",
    title="MELODI",
    family="memory",
    idea="Every layer hands slots to the next window; the middle layer also keeps some of every window.",
    paper=Paper("Chen et al. 2025, MELODI: Exploring Memory Compression for Long Contexts", "arXiv:2410.03156"),
    build=f"{__name__}.layer:build",
    params=MelodiParams,
    variants=({"summary_tokens": 0}, {"short_slots": 0, "summary_tokens": 0}),
    memory_parameter="long_slots",
    segment="window",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("t5", "none", "alibi", *ROPE),
    without_positions={
        "transformer_xl": "scores are products of unit vectors and a bias; its term depends on the content of queries"
    },
    impls=(
        Impl(
            "reference", run=f"{__name__}.reference:OPERATORS", note="keeps all scores, empty slots are rows of zeros"
        ),
        Impl("blocked", run=f"{__name__}.blocked:OPERATORS", note="fused attention, one null slot for all empty ones"),
        slabs_impl(f"{__name__}.slabs:OPERATORS"),
        native_impl(f"{__name__}.triton:OPERATORS", modes=TRAINED, counts_as=""),
        Impl(
            "triton",
            run=f"{__name__}.triton:OPERATORS",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:triton_support",
            note="our kernels, the null slot in closed form",
        ),
        Impl(
            "diagonal_triton",
            run=f"{__name__}.triton:OPERATORS",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:diagonal_support",
            note="as triton, but window t of layer l together with window t + 1 of layer l - 1",
        ),
        Impl(
            "graph",
            run=f"{__name__}.triton:OPERATORS",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "stream"),
            support=f"{__name__}.params:graph_support",
            note="as triton, but windows with full memories are replayed from a recording: no launches from Python",
        ),
    ),
    picks=(NATIVE, NATIVE_TRAINED, *SLABS, DIAGONAL, *LOOP),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    deviations=(
        "the last layer has no mixing for summary tokens, which nobody would read",
        "a last window that is not full is open: its tokens are computed, nothing is handed on (published code: "
        "windows are always full)",
        "gradients pass all windows of a call (published code: cut after each segment of 4096 tokens)",
        "one layer is a long-term layer, which does all that a short-term layer does (published: 12 and 13 layers)",
        "no dropout, no final norm; the scale starts at sqrt(head_dim), the gate half open",
    ),
    claims=(
        Claim(
            "older memories are pushed into a smaller buffer, no past state is kept at full resolution",
            "right",
            "a window of 512 tokens leaves 64 short slots a layer, which the next window replaces, and 32 long slots "
            "in one layer, which stay for 128 windows",
        ),
    ),
)
