"""Make transformer_xl_*.npz: outputs and gradients over several segments, by the package transformers.

XLNet's one-way attention is Transformer-XL's, from an empty start; TransfoXL starts from zero vectors that are seen::

    python tests/golden/transformer_xl.py xlnet tests/golden/transformer_xl_xlnet.npz
    python tests/golden/transformer_xl.py transfo tests/golden/transformer_xl_transfo.npz

each in an environment with transformer_xl_xlnet_requirements.txt or transformer_xl_transfo_requirements.txt.
XLNet computes its sinusoids in float32, TransfoXL everything, so the tensors carry errors of about 1e-6.
"""

import sys
from typing import Any

import numpy as np
import torch

BATCH, LENGTH, D_MODEL, HEADS, D_FF, LAYERS = 2, 11, 8, 2, 12, 2
XLNET = {
    "short_memory": {"segment_len": 4, "mem_len": 3},
    "long_memory": {"segment_len": 3, "mem_len": 8},
}
TRANSFO = {
    "plain": {"segment_len": 4, "mem_len": 3},
    "same_length": {"segment_len": 4, "mem_len": 4, "same_length": True},
    "clamped": {"segment_len": 3, "mem_len": 7, "clamp_len": 4},
}


def xlnet(segment_len: int, mem_len: int) -> tuple[Any, dict[str, Any]]:
    """The model, and its parameters by our names."""
    from transformers import XLNetConfig, XLNetModel

    config = XLNetConfig(
        vocab_size=8, d_model=D_MODEL, n_layer=LAYERS, n_head=HEADS, d_inner=D_FF, ff_activation="relu", untie_r=True,
        attn_type="uni", bi_data=False, mem_len=mem_len, use_mems_eval=True, use_mems_train=True, dropout=0.0,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    model = XLNetModel(config)
    names = {}
    for index, layer in enumerate(model.layer):
        attention = layer.rel_attn
        mixer = {name: (getattr(attention, name), "matrix") for name in "qkvr"}
        mixer |= {"o": (attention.o, "output")}
        ours = {f"mixer.{name}.weight": pair for name, pair in mixer.items()}
        ours |= {"mixer.content_bias": attention.r_w_bias, "mixer.position_bias": attention.r_r_bias}
        ours |= _rest(attention.layer_norm, layer.ff.layer_1, layer.ff.layer_2, layer.ff.layer_norm)
        names |= {f"layers.{index}.{name}": value for name, value in ours.items()}
    return model, names


def transfo(segment_len: int, mem_len: int, same_length: bool = False, clamp_len: int = -1) -> tuple[Any, dict]:
    """The model, and its parameters by our names."""
    from transformers import TransfoXLConfig, TransfoXLModel

    config = TransfoXLConfig(
        vocab_size=4, cutoffs=[], d_model=D_MODEL, d_embed=D_MODEL, n_head=HEADS, d_head=D_MODEL // HEADS,
        d_inner=D_FF, n_layer=LAYERS, mem_len=mem_len, clamp_len=clamp_len, same_length=same_length, untie_r=True,
        div_val=1, dropout=0.0, dropatt=0.0,
    )  # fmt: skip
    model = TransfoXLModel(config)
    names = {}
    for index, layer in enumerate(model.layers):
        attention, network = layer.dec_attn, layer.pos_ff
        ours = {f"mixer.{name}.weight": (attention.qkv_net.weight, part) for part, name in enumerate("qkv")}
        ours |= {"mixer.o.weight": attention.o_net.weight, "mixer.r.weight": attention.r_net.weight}
        ours |= {"mixer.content_bias": attention.r_w_bias, "mixer.position_bias": attention.r_r_bias}
        ours |= _rest(attention.layer_norm, network.CoreNet[0], network.CoreNet[3], network.layer_norm)
        names |= {f"layers.{index}.{name}": value for name, value in ours.items()}
    return model, names


def _rest(norm_mixer: Any, up: Any, down: Any, norm_ffn: Any) -> dict[str, Any]:
    parts = {"norm_mixer": norm_mixer, "ffn.up": up, "ffn.down": down, "norm_ffn": norm_ffn}
    return {f"{name}.{kind}": getattr(part, kind) for name, part in parts.items() for kind in ("weight", "bias")}


def value_of(entry: Any, gradient: bool) -> torch.Tensor:
    """A parameter or its gradient in our layout: matrices map inputs to outputs as ``weight @ x``."""
    parameter, layout = entry if isinstance(entry, tuple) else (entry, "")
    tensor = parameter.grad if gradient else parameter
    if layout == "matrix":
        return tensor.reshape(D_MODEL, D_MODEL).T
    if layout == "output":
        return tensor.reshape(D_MODEL, D_MODEL)
    if isinstance(layout, int):
        return tensor[layout * D_MODEL : (layout + 1) * D_MODEL]
    return tensor


def run(make: Any, case: dict[str, Any], dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Segment after segment, memories handed on; one loss over all of them."""
    torch.manual_seed(0)
    model, names = make(**case)
    model = model.to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    outputs, mems = [], None
    for segment in x.split(case["segment_len"], dim=1):
        result = model(inputs_embeds=segment, mems=mems)
        outputs.append(result.last_hidden_state)
        mems = result.mems
    y = torch.cat(outputs, dim=1)
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    for name, entry in names.items():
        made[name] = value_of(entry, gradient=False)
        made[f"grad.{name}"] = value_of(entry, gradient=True)
    return {name: tensor.detach().numpy() for name, tensor in made.items()}


if __name__ == "__main__":
    sources = {"xlnet": (XLNET, xlnet, torch.float64), "transfo": (TRANSFO, transfo, torch.float32)}
    cases, make, dtype = sources[sys.argv[1]]
    arrays = {f"{name}/{key}": array for name, case in cases.items() for key, array in run(make, case, dtype).items()}
    np.savez_compressed(sys.argv[2], **arrays)
