"""Block-Recurrent Transformer: a sliding window, and one layer whose states read the tokens and are read by them."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import LOOP, NATIVE, SLABS
from ctxbench.implementations._shared.products_table import slabs_impl
from ctxbench.implementations.block_recurrent.params import BlockRecurrentParams
from ctxbench.method import ROPE, Claim, Impl, Method, Paper

METHOD = Method(
    name="block_recurrent",
    title="Block-Recurrent Transformer",
    family="recurrent",
    idea="One layer carries state vectors from window to window: tokens attend to them, and they to the tokens.",
    paper=Paper("Hutchins et al. 2022, Block-Recurrent Transformers", "arXiv:2203.07852", "3"),
    params=BlockRecurrentParams,
    memory_parameter="num_states",
    segment="window",
    build=f"{__name__}.layer:build",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("t5", "none", "alibi"),
    without_positions={
        "transformer_xl": "its term needs a query of its own for distances; the layer has one bias a distance",
        **dict.fromkeys(
            ROPE,
            "states read the same keys as tokens, and have no position to be rotated to",
        ),
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:OPERATORS", note="keeps all scores, windows one after the other"),
        Impl("blocked", run=f"{__name__}.blocked:OPERATORS", note="fused attention to states, windows in blocks"),
        slabs_impl(
            f"{__name__}.slabs:OPERATORS",
            note="plain products to states, windows in blocks: for bf16, in which the fused kernel is slow on CPU",
        ),
        native_impl(f"{__name__}.triton:OPERATORS"),
        Impl(
            "triton",
            run=f"{__name__}.triton:OPERATORS",
            needs=("triton",),
            devices=("cuda",),
            support=f"{__name__}.params:triton_support",
            note="our kernels: windows in one launch, states without a mask",
        ),
        Impl(
            "graph",
            run=f"{__name__}.triton:OPERATORS",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "stream"),
            support=f"{__name__}.params:graph_support",
            note="as triton, but windows after the first are replayed from a recording: no launches from Python",
        ),
    ),
    picks=(NATIVE, *SLABS, *LOOP),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    deviations=(
        "a token sees itself locally (authors' code: strictly earlier tokens); the first one would see nothing",
        "of the paper's configurations only skip, which it recommends: states have no feed-forward network",
        "keys of the first update are those of one window: there are none before it",
        "gradients pass all windows of a call and stop between calls (paper: segments of eight windows)",
        "the recurrent layer is the third from the top, or the lowest of a shallower stack",
    ),
    claims=(
        Claim(
            "a tiny MLP or RNN compresses each block into a state vector that is prepended to the next block; constant "
            "memory growth",
            "true of block_state, not of its published relative; misnamed for both",
            "here num_states vectors of one layer read a window by attention and are gated, and nothing is prepended. "
            "The state, 3 d num_states and 2 d window numbers a layer at most, is constant: its growth is 0",
        ),
    ),
)
