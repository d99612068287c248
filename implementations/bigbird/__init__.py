"""BigBird: blocks of queries against two global blocks, their neighbours, and a few random blocks."""

from ctxbench.implementations._shared.flex_table import flex_impl
from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import BLOCKED, KERNELS, TILES
from ctxbench.implementations.bigbird.params import BigBirdParams
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper

METHOD = Method(
    name="bigbird",
    title="BigBird",
    family="sparse",
    idea="Blocks of tokens attend to the first and the last block, to their neighbours, and to a few blocks drawn at "
    "random once; the first and the last attend to all. Or else global tokens of their own do.",
    paper=Paper("Zaheer et al. 2020, Big Bird: Transformers for Longer Sequences", "arXiv:2007.14062", "2 and D"),
    build=f"{__name__}.layer:build",
    params=BigBirdParams,
    variants=({"num_random": 1, "random_within": 5}, {"plan": "official", "num_random": 1}),
    memory_parameter="block_size",
    support=f"{__name__}.params:support",
    without=dict.fromkeys(
        ("stream", "decode"),
        "BigBird cannot be continued: its first block sees all later tokens, and all tokens see its last block",
    ),
    causal=(False,),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "its term is a part of its layer, with weights and a product a pair of its own; dense and "
        "transformer_xl have it",
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:attend", note="materialises all scores and masks most of them"),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:attend",
            note="gathered blocks in slabs of 256 queries, without a mask; probabilities are recomputed in backward",
        ),
        native_impl(
            f"{__name__}.native:attend",
            note="blocks read where they lie, in C++, their scores in the caches; gradients as in blocked",
            modes=("forward", "train"),
            positions=("none", *ROPE),
            support=f"{__name__}.params:native_support",
            counts_as="",
        ),
        Impl(
            "triton",
            run=f"{__name__}.triton:attend",
            needs=("triton",),
            devices=("cuda",),
            positions=("none", *ROPE, "t5", "alibi"),
            support=f"{__name__}.params:triton_support",
            note="flash kernels of our own over lists of blocks; nothing is gathered",
        ),
        flex_impl(
            f"{__name__}.flex:attend",
            f"{__name__}.params:flex_support",
            "PyTorch's FlexAttention, compiled, with blocks as its tiles",
            positions=("none", *ROPE, "t5", "alibi"),
        ),
    ),
    picks=(TILES, BLOCKED, *KERNELS),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(
        Equivalence("one block holds the sequence", other="dense", params={"block_size": 1 << 20}),
        Equivalence("there are as many random blocks as blocks", other="dense", params={"num_random": 1 << 20}),
    ),
    deviations=(
        "random blocks come from the whole sequence and are a set, in evaluation as in training; the published code "
        "takes them from the first few blocks (random_within), may count one twice, and draws none in evaluation",
        "any length: the last block may be shorter; the published code wants a multiple of block_size and turns dense "
        "up to 5 + 2 num_random blocks",
        "the external construction has no table of relative positions",
        "pre-norm layer; the released encoder is post-norm",
        "no padding mask: all sequences of a batch have one length",
    ),
    claims=(
        Claim(
            "approximates full attention in O(N) time",
            "right in order of growth",
            "N b (7 + r) - b^2 (12 + 2 r) pairs a head in whole blocks; all N^2 up to 4 + r blocks (448 tokens at the "
            "published sizes), and projections outweigh attention where 2 d > b (7 + r)",
        ),
    ),
)
