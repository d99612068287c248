"""Memorizing Transformer: a sliding window, and one layer that also looks up its own past keys and values."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import BLOCKED, TRITON
from ctxbench.implementations.memorizing.params import MemorizingParams
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper, Pick

METHOD = Method(
    name="memorizing",
    title="Memorizing Transformer",
    family="memory",
    idea="One layer keeps its last memory_len keys and values and lets each query attend to those that fit it best.",
    paper=Paper("Wu et al. 2022, Memorizing Transformers", "arXiv:2203.08913", "3"),
    params=MemorizingParams,
    memory_parameter="memory_len",
    segment="segment_len",
    build=f"{__name__}.layer:build",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("t5", "none", "alibi"),
    without_positions={
        "transformer_xl": "its term needs a query of its own for distances; the layer has one bias a distance",
        **dict.fromkeys(
            ROPE,
            "what is in the memory has no position, and a rotated key has one",
        ),
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:OPERATORS", note="keeps all scores, windows one after the other"),
        Impl("blocked", run=f"{__name__}.blocked:OPERATORS", note="slabs of queries, gathers what was retrieved"),
        native_impl(
            f"{__name__}.native:OPERATORS",
            counts_as="",
            modes=(),
            note="one C++ kernel searches, selects and reads while a row's scores are in the caches",
        ),
        Impl(
            "triton",
            run=f"{__name__}.triton:OPERATORS",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "train", "stream"),
            support=f"{__name__}.params:triton_support",
            note="all segments look up in one launch, scores never leave a tile",
        ),
    ),
    picks=(
        Pick(
            "native",
            devices=("cpu",),
            dtypes=("fp32", "bf16"),
            why="with PyTorch's operators scores travel through memory, and selecting takes as long as making them",
            measured=True,
        ),
        BLOCKED,
        TRITON,
    ),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(
        Equivalence(
            "top_k is at least memory_len, a lookup of everything",
            other="memorizing",
            params={"lookup": "topk", "memory_len": 8, "top_k": 9},
            other_params={"lookup": "dense", "memory_len": 8},
        ),
    ),
    deviations=(
        "a token sees itself locally (authors' code: strictly earlier tokens); the first one would see nothing",
        "an empty memory answers 0, so the first segment's local part is scaled by 1 - gate",
        "lookup=topk is exact (paper: approximate on accelerators)",
        "rows stay in order of age instead of in a ring: a state is a value and is copied, once a segment, either way",
        "the layer with the memory is the fourth from the top, or the lowest of a shallower stack",
        "memories are cleared by starting from a new state; there are no documents inside a batch row",
    ),
    claims=(
        Claim(
            "external memory banks for long-term storage",
            "right for values, incomplete for training",
            "memory passes values and no gradients: what is stored is trained through the window alone",
        ),
    ),
)
