"""My method: causal attention over the last ``window`` tokens. Data only: no torch here."""

from ctxbench.method import Impl, Method

from .params import WindowParams

METHOD = Method(
    name="my_method",
    title="My method",
    family="sparse",
    idea="Every token attends to itself and the tokens just before it.",
    build=f"{__name__}.layer:build",
    params=WindowParams,
    memory_parameter="window",
    modes=("forward", "train", "stream", "decode"),
    causal=(True,),
    impls=(Impl("reference", run=f"{__name__}.reference:attend", note="masks a full score matrix"),),
    cost=f"{__name__}.cost:cost",
    reach=f"{__name__}.params:reach",
)
