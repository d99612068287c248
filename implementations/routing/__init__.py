"""Routing Transformer: local heads beside heads whose tokens attend inside clusters found by online k-means."""

from ctxbench.implementations._shared.native_table import native_impl
from ctxbench.implementations._shared.picks_table import NATIVE_FORWARD, TRITON
from ctxbench.implementations.routing.params import RoutingParams
from ctxbench.method import ROPE, Claim, Equivalence, Impl, Method, Paper

METHOD = Method(
    name="routing",
    title="Routing Transformer",
    family="sparse",
    idea="Half of the heads attend to nearby blocks; in the others a token attends to the tokens of its own cluster.",
    paper=Paper(
        "Roy et al. 2020, Efficient Content-Based Sparse Attention with Routing Transformers", "arXiv:2003.05997", "4"
    ),
    build=f"{__name__}.layer:build",
    params=RoutingParams,
    variants=({"selection": "topw", "num_clusters": 3, "cluster_size": 5},),  # masked: test_routing, at more heads
    modes=("forward", "train", "stream", "decode"),
    causal=(True, False),
    positions=("none", *ROPE, "t5", "alibi"),
    without_positions={
        "transformer_xl": "its term is a product of every query with projected distances, and members of a cluster lie "
        "anywhere: each pair would have a product of its own; t5 and alibi are a number by distance, which is gathered",
    },
    support=f"{__name__}.params:support",
    segment="local_block",
    discrete=True,
    impls=(
        Impl(
            "reference",
            run=f"{__name__}.reference:OPERATORS",
            note="strict and local heads materialise all scores and mask most of them",
        ),
        Impl(
            "blocked",
            run=f"{__name__}.blocked:OPERATORS",
            note="cluster by cluster, probabilities recomputed in backward; FLOPs of strict heads are those of equally "
            "full clusters, the least that any contents need: the real load is data",
        ),
        native_impl(
            f"{__name__}.native:OPERATORS",
            modes=("forward",),
            counts_as="native",
            note="clusters as ranges of sorted tokens, in C++; FLOPs of strict heads are those of blocked",
        ),
        Impl(
            "triton",
            run=f"{__name__}.triton:OPERATORS",
            needs=("triton",),
            devices=("cuda",),
            modes=("forward", "train", "stream"),
            support=f"{__name__}.params:triton_support",
            note="gathers the rows of a cluster inside the kernel; FLOPs of strict heads are those of blocked",
        ),
    ),
    picks=(NATIVE_FORWARD, TRITON),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
    equals=(
        Equivalence(
            "all heads are local and one block holds the sequence",
            other="dense",
            params={"local_share": 1.0, "local_block": 1 << 20},
        ),
    ),
    deviations=(
        "strict selection is ours: the published top-w selection over the whole sequence leaks later tokens into "
        "earlier outputs and leaves tokens without a cluster; it is here as selection=topw, never as a causal form",
        "routed scores are divided by sqrt(D); the published code normalises queries after its scale and so has none",
        "the mean over the clusters of a token is exact; the published code divides by the count + 0.01",
        "the running sums of the centroids begin at the centroids with counts of 1; the published counts begin at 0",
        "the number of clusters is fixed; the paper takes sequence length / cluster size for each data set",
        "no learned vectors by rank inside a cluster, no extra map between heads, biases in the projections",
    ),
    claims=(
        Claim(
            "dynamically select a subset of keys per query based on learned routing",
            "right with a reservation",
            "the routing is k-means with moving averages: no gradient passes through the choice. With k clusters "
            "a causal head still has T^2 / (2 k) pairs at best; only k = sqrt(T) makes that T^1.5, and only balanced",
        ),
    ),
)
