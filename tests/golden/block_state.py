"""Make block_state.npz: outputs and gradients over several blocks, by transformers' GPT-2 and torch's GRU.

::

    python tests/golden/block_state.py tests/golden/block_state.npz

in an environment with block_state_requirements.txt. A block is a call of GPT-2 on ``[states; tokens]`` as embeddings,
its learned positions and its last norm taken away; ``GRUCell`` or a sequential network makes the next state. In the
cases ``layer/*`` every layer is a GPT-2 of one layer with a state of its own. All in float64.
"""

import sys

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

BATCH, LENGTH, BLOCK, D_MODEL, HEADS, D_FF, LAYERS = 2, 11, 4, 8, 2, 12, 2
CASES = {
    "bottom/gru": {"num_states": 1, "pool": "mean"},
    "bottom/mlp": {"num_states": 3, "pool": "last"},
    "layer/gru": {"num_states": 2, "pool": "last"},
    "layer/mlp": {"num_states": 1, "pool": "mean"},
}


class Network(nn.Module):
    """``s + W2 gelu(W1 [s; r])``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * D_MODEL, D_MODEL), nn.GELU(), nn.Linear(D_MODEL, D_MODEL))

    def forward(self, pooled: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return state + self.net(torch.cat((state, pooled), dim=-1))


def gpt2(layers: int) -> GPT2Model:
    config = GPT2Config(
        vocab_size=4, n_positions=64, n_embd=D_MODEL, n_layer=layers, n_head=HEADS, n_inner=D_FF,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2Model(config)
    model.ln_f = nn.Identity()
    return model


def ours(model: GPT2Model, first: int) -> dict[str, tuple[nn.Parameter, object]]:
    """Parameters of the layers by our names; GPT-2 stores matrices as inputs by outputs, and q, k, v in one."""
    names: dict[str, tuple[nn.Parameter, object]] = {}
    for index, layer in enumerate(model.h, first):
        parts = {f"mixer.{name}": (layer.attn.c_attn, part) for part, name in enumerate("qkv")}
        parts |= {"mixer.o": (layer.attn.c_proj, None), "ffn.up": (layer.mlp.c_fc, None)}
        parts |= {"ffn.down": (layer.mlp.c_proj, None)}
        for name, (module, part) in parts.items():
            names[f"layers.{index}.{name}.weight"] = (module.weight, ("matrix", part))
            names[f"layers.{index}.{name}.bias"] = (module.bias, ("vector", part))
        for name, module in {"norm_mixer": layer.ln_1, "norm_ffn": layer.ln_2}.items():
            names[f"layers.{index}.{name}.weight"] = (module.weight, ("vector", None))
            names[f"layers.{index}.{name}.bias"] = (module.bias, ("vector", None))
    return names


def in_our_layout(tensor: torch.Tensor, layout: object) -> torch.Tensor:
    kind, part = layout
    if part is not None:
        tensor = tensor[..., part * D_MODEL : (part + 1) * D_MODEL]
    return tensor.T if kind == "matrix" else tensor


def run(case: str, num_states: int, pool: str) -> dict[str, np.ndarray]:
    variant, _, update = case.partition("/")
    torch.manual_seed(0)
    models = [gpt2(LAYERS)] if variant == "bottom" else [gpt2(1) for _ in range(LAYERS)]
    units = [nn.GRUCell(D_MODEL, D_MODEL) if update == "gru" else Network() for _ in models]
    initial = [nn.Parameter(torch.empty(num_states, D_MODEL)) for _ in models]
    modules = nn.ModuleList([*models, *units, nn.ParameterList(initial)]).double()
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.copy_(torch.randint(-48, 49, parameter.shape) / 64)  # short numbers make a small file
        for model in models:
            model.wpe.weight.zero_()
    x, grad = (torch.randint(-96, 97, (BATCH, LENGTH, D_MODEL)).double() / 64 for _ in range(2))
    x.requires_grad_()
    states, outputs = [state.expand(BATCH, -1, -1) for state in initial], []
    for tokens in x.split(BLOCK, dim=1):
        after = []
        for model, unit, state in zip(models, units, states, strict=True):
            rows = model(inputs_embeds=torch.cat((state, tokens), dim=1), use_cache=False).last_hidden_state
            tokens = rows[:, num_states:]
            pooled = tokens.mean(dim=1) if pool == "mean" else tokens[:, -1]
            made = [unit(pooled, state[:, i]) for i in range(num_states)]
            after.append(torch.stack(made, dim=1))
        outputs.append(tokens)
        states = after
    y = torch.cat(outputs, dim=1)
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    plain = ("vector", None)
    names = {}
    for index, model in enumerate(models):
        names |= ours(model, index)
        names[f"updates.{index}.initial"] = (initial[index], plain)
        for name, parameter in units[index].named_parameters():
            place = name.replace("net.0", "up").replace("net.2", "down")
            names[f"updates.{index}.{'gru.' if update == 'gru' else ''}{place}"] = (parameter, plain)
    for name, (parameter, layout) in names.items():
        made[name] = in_our_layout(parameter, layout)
        made[f"grad.{name}"] = in_our_layout(parameter.grad, layout)
    return {name: tensor.detach().numpy() for name, tensor in made.items()}


if __name__ == "__main__":
    arrays = {f"{case}/{key}": value for case, sizes in CASES.items() for key, value in run(case, **sizes).items()}
    np.savez_compressed(sys.argv[1], **arrays)
