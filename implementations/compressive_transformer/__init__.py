"""Compressive Transformer: Transformer-XL whose oldest memories are compressed instead of dropped."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import BLOCKED, TILES, TRITON
from ctxbench.implementations.compressive_transformer.params import CompressiveTransformerParams
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper

METHOD = Method(
    name="compressive_transformer",
    title="Compressive Transformer",
    family="recurrent",
    idea="A segment sees the mem_len inputs before it, and before these compressed_len entries of rate inputs each.",
    paper=Paper("Rae et al. 2019, Compressive Transformers for Long-Range Sequence Modelling", "arXiv:1911.05507", "3"),
    params=CompressiveTransformerParams,
    variants=({"compression": "dilated_conv", "auxiliary": "auto_encoding"},),
    memory_parameter="compressed_len",
    segment="segment_len",
    build=f"{__name__}.layer:build",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("transformer_xl",),
    without_positions=dict.fromkeys(
        ("none", "t5", "alibi", *ROPE),
        "distances run on through compressed entries, memory and segment and are part of this method's own score",
    ),
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="the published loop over segments"),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:attend",
            support=f"{__name__}.params:blocked_support",
            note="all segments and all compressions at once",
        ),
        native_impl(
            f"{__name__}.native:attend",
            note="the forward pass in C++, all segments in one call; one token is faster by blocked's projections",
            modes=("forward", "train", "stream"),
            support=f"{__name__}.params:native_support",
            counts_as="",
        ),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "train", "stream"),
            support=f"{__name__}.params:triton_support",
            note="fused kernels of our own: entries, memory and segment under one softmax, all segments in one launch",
        ),
    ),
    picks=(TILES, BLOCKED, TRITON),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(
        Equivalence(
            "nothing is compressed",
            other="transformer_xl",
            params={"compressed_len": 0, "segment_len": 4, "mem_len": 6},
            other_params={"segment_len": 4, "mem_len": 6},
        ),
    ),
    deviations=(
        "memories start empty, their length grows; the paper's algorithm starts from zero vectors that are seen",
        "u and v belong to each layer, as in Transformer-XL with untie_r",
        "dilated_conv, of which the paper says no more than its name: kernels of 3, dilations 1 and 2, ReLU, then conv",
        "most_used averages attention over all queries that could see a token, from its own on, and over heads",
        "both losses are means over elements, weighted 1; a compression that no later token of the call sees has none",
        "no dropout, no embedding: a benchmark has no vocabulary and no regularisation",
    ),
    claims=(
        Claim(
            "suits unbounded histories",
            "wrong",
            "an output depends on the last L (mem_len + rate compressed_len) + segment_len tokens at most; the cost of "
            "a token stays bounded, and so does what it can know",
        ),
        Claim(
            "older memories go into a smaller buffer, so past states are never all kept in full",
            "right, but incomplete",
            "entries get no gradient from the output: the compression needs a loss of its own, which the source "
            "documents do not mention",
        ),
    ),
)
