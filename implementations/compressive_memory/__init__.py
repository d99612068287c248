"""Compressive memory: segments that retrieve items from a memory of recent tokens and learned compressions."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import NATIVE, SLABS, TRITON
from ctxbench.implementations._shared.products_table import slabs_impl
from ctxbench.implementations.compressive_memory.params import CompressiveMemoryParams
from ctxbench.method import ROPE, Claim, Impl, Method, Paper

METHOD = Method(
    name="compressive_memory",
    title="Compressive memory with retrieval",
    family="memory",
    idea="A segment also sees the top_k items, of recent tokens or of learned compressions, most like the one before.",
    paper=Paper("Source document, CompressiveMemory; compression as in Rae et al. 2019", "arXiv:1911.05507"),
    build=f"{__name__}.layer:build",
    params=CompressiveMemoryParams,
    variants=({"top_k": 1, "rate": 2},),
    memory_parameter="compressed_len",
    segment="segment_len",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "its term is a product of every query with a projected row for each distance, and every row "
        "of the batch retrieves at distances of its own; t5 and alibi add a number by distance",
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="segment after segment, keeps all scores"),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:attend",
            note="all segments choose at once and are stacked into the batch of one fused attention; with a bias, "
            "slabs of queries",
        ),
        slabs_impl(
            f"{__name__}.slabs:attend", note="plain products by slabs of queries: the schedule of blocked, for bf16"
        ),
        native_impl(f"{__name__}.triton:attend"),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "train", "stream"),
            positions=("none", *ROPE),
            without=dict.fromkeys(
                ("t5", "alibi"),
                "its kernels have distances from keys of consecutive tokens, and every row of the batch retrieves "
                "elsewhere; blocked takes it",
            ),
            support=f"{__name__}.params:triton_support",
            note="the schedule of blocked; one softmax spans retrieved and own keys where they lie",
        ),
        Impl(
            "as_written",
            run=f"{__name__}.as_written:SketchTransformer",
            modes=("forward",),
            positions=("none",),
            defects={
                "agreement": "another function: the whole input asks once, it has no attention of its own, and tokens "
                "far apart are merged",
                "causality": "the question is the mean of the whole input, whose blocks are all in memory already",
                "batch_independence": "one choice for the whole batch, by similarities averaged over its rows",
                "receptive_field": "every output depends on every token of the blocks that were retrieved",
                "state": "lists on the module keep the blocks of earlier calls: the same input gives another output",
            },
            note="the source document's sketch, connected as simply as it can be",
        ),
    ),
    picks=(NATIVE, *SLABS, TRITON),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    deviations=(
        "capacity is recent tokens and entries (source document: blocks of any length, a 1 / rate part of them recent)",
        "an entry is made of neighbouring tokens (source document: of tokens a block apart)",
        "one question a segment, by the segment before and through a learned map (source document: the whole input)",
        "each batch row chooses for itself",
        "values of what is retrieved are weighted by its similarity, which trains the map and the compression",
        "positions, and the distances of a bias: a retrieved row stands where its token stood, an entry where the last "
        "of its tokens did; what is chosen does not depend on them",
        "rows in memory carry no gradient (source document: their graphs)",
        "the layer around it, causal attention inside segments and a network, is ours: the sketch has none",
    ),
    claims=(
        Claim(
            "summarises old information",
            "not as sketched",
            "nothing is compressed before capacity // rate blocks exist, and entries mix tokens a block apart; no loss "
            "reaches the compressor unless one of its blocks happens to be retrieved",
        ),
    ),
)
