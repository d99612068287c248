"""Memory bank: self-attention inside segments, and a bank of slots that carries what earlier segments wrote."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import NATIVE, SLABS, TRITON
from ctxbench.implementations._shared.products_table import slabs_impl
from ctxbench.implementations.memory_bank.params import MemoryBankParams
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper

METHOD = Method(
    name="memory_bank",
    title="Memory-augmented transformer",
    family="memory",
    idea="Attends inside a segment, reads a bank of slots through a gate, and writes one slot when the segment ends.",
    paper=Paper(
        "Source document, ExternalMemoryBank and MemoryAugmentedTransformer; reading as in Weston et al. 2015, "
        "Memory Networks",
        "arXiv:1410.3916",
    ),
    build=f"{__name__}.layer:build",
    params=MemoryBankParams,
    memory_parameter="num_slots",
    segment="segment_len",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "its term is a part of its layer, with weights and a product a pair of its own; dense and "
        "transformer_xl have it",
    },
    impls=(
        Impl("reference", run=f"{__name__}.reference:run", note="keeps all scores, projects the whole bank each write"),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:run",
            note="fused attention, whole segments at once up to the read, one bank row projected each write",
        ),
        slabs_impl(
            f"{__name__}.slabs:run",
            positions=("none", *ROPE),
            note="plain products by slabs of queries: the schedule of blocked, for bf16",
        ),
        native_impl(f"{__name__}.native:run", positions=("none", *ROPE), counts_as="blocked"),
        Impl(
            "triton",
            run=f"{__name__}.triton:run",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "train", "stream"),
            positions=("none", *ROPE),
            support=f"{__name__}.params:triton_support",
            note="the schedule of blocked with flash kernels, and the gate of the read as one product with an epilogue",
        ),
        Impl(
            "as_written",
            run=f"{__name__}.as_written:SketchTransformer",
            modes=("forward", "train"),
            positions=("none",),
            defects={
                "agreement": "another function: attention runs over the batch axis, the read has one head and no "
                "output projection, the residual is doubled, the bank is shared by layers and rows",
                "causality": "a layer writes the mean of the whole sequence, which the next layer and the next call "
                "read: later tokens reach earlier outputs",
                "batch_independence": "nn.MultiheadAttention without batch_first reads the batch as the sequence, and "
                "the rows write into one bank",
                "receptive_field": "no token attends to another token of its sequence, and through the bank a token "
                "reaches outputs before it",
                "state": "the bank is a parameter that forward rewrites: the same input gives another output the next "
                "time, and nothing can be carried, reset or streamed",
            },
            note="the source document's sketch",
        ),
    ),
    picks=(NATIVE, SLABS[1], TRITON),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(
        Equivalence(
            "the bank has one slot, whichever way it is chosen",
            other="memory_bank",
            params={"num_slots": 1, "write": "argmax"},
            other_params={"num_slots": 1, "write": "least_used"},
        ),
    ),
    deviations=(
        "the bank is state, one a layer and batch row, from a learned initial bank (source document: one parameter for "
        "all layers and rows, rewritten through .data)",
        "one write a segment, after it; segments read what earlier ones wrote (source document: one write a layer and "
        "call, of the mean over the whole input)",
        "self-attention is causal and stays inside the segment (source document: over the batch axis, no mask)",
        "a slot and its key are written together (source document: keys never change)",
        "pre-norm, and the read is added once: x + g * o (source document: x + g * o + (1 - g) * x, post-norm)",
        "the read has num_heads heads and an output projection (source document: one head as wide as the model)",
        "what is written passes a norm, so that a slot keeps the scale of the initial bank",
        "the slot written least often is the default; write=argmax is the source document's choice, made trainable by "
        "a straight-through estimator",
    ),
    claims=(
        Claim(
            "memory N d + M d",
            "wrong",
            "the intended layer keeps all its scores, B (h N^2 + N M), and about 19 B N d activations in training; the "
            "bank is 2 M d, slots and keys. In segments: B h S^2 and B S M of scores at a time, or none when fused",
        ),
        Claim(
            "compute N M d + N^2 d",
            "wrong",
            "the intended layer takes B (30 N d^2 + 4 N^2 d + 4 N M d + 2 M d + 4 d^2) + 4 M d^2: linear maps rule "
            "below N + M = 7.5 d; as sketched there is no N^2 term (attention over the batch), in segments 2 S N d",
        ),
        Claim(
            "context beyond the attention window",
            "partly right",
            "what crosses a segment is one averaged vector, in one of M slots",
        ),
    ),
)
