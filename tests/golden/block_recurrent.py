"""Make block_recurrent.npz: outputs and gradients of the recurrent attention, by block-recurrent-transformer-pytorch.

::

    python tests/golden/block_recurrent.py tests/golden/block_recurrent.npz

in an environment with block_recurrent_requirements.txt (the package itself without its dependencies). The package's
``StateContainer`` and ``Attention`` do all the work. This script walks the windows and hands them what the paper says:
a band of W keys as mask, and keys of the previous and the current window to the states. Rotary positions are left out.
All in float64.
"""

import sys

import numpy as np
import torch
from block_recurrent_transformer_pytorch import block_recurrent_transformer_pytorch as package
from torch import nn

BATCH, LENGTH, D_MODEL, HEADS = 2, 11, 8, 2
WIDTH = D_MODEL // HEADS
CASES = {"few_states": {"window": 4, "num_states": 3}, "many_states": {"window": 3, "num_states": 5}}


class Layer(nn.Module):
    """Tokens' own projections around the package's modules."""

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(D_MODEL, D_MODEL, bias=False)
        self.to_kv = nn.Linear(D_MODEL, 2 * WIDTH, bias=False)
        self.to_out = nn.Linear(2 * D_MODEL, D_MODEL, bias=False)
        self.attend = package.Attention(WIDTH, qk_rmsnorm=True)
        self.states = package.StateContainer(
            D_MODEL, num_state_vectors=num_states, dim_head=WIDTH, heads=HEADS, qk_rmsnorm=True
        )

    def forward(self, x: torch.Tensor, window: int) -> torch.Tensor:
        outputs, states, past = [], None, None
        for tokens in x.split(window, dim=1):
            n = tokens.shape[1]
            own = self.to_kv(tokens).chunk(2, dim=-1)
            keys, values = own if past is None else (torch.cat(pair, dim=1) for pair in zip(past, own, strict=True))
            K = keys.shape[1]
            distance = torch.arange(K - n, K)[:, None] - torch.arange(K)
            q = self.to_q(tokens).unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
            local = self.attend(q, keys, values, mask=(distance >= 0) & (distance < window))
            self.states.set_next_read_state(states)
            read = self.states.read(tokens)
            states = self.states.write(memories=(keys, values))
            outputs.append(self.to_out(torch.cat((local.transpose(1, 2).flatten(2), read), dim=2)))
            past = own
        return torch.cat(outputs, dim=1)


def run(window: int, num_states: int) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    layer = Layer(num_states).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-48, 49, parameter.shape) / 64)  # short numbers make a small file
        for part in (layer.attend, layer.states.to_state_cross_attn, layer.states.state_self_attn,
                     layer.states.from_state_cross_attn):  # fmt: skip
            part.q_scale.fill_(float(torch.randint(4, 20, ()) / 4))  # ours is one number a head
            part.k_scale.fill_(1.0)
    x, grad = (torch.randint(-96, 97, (BATCH, LENGTH, D_MODEL)).double() / 64 for _ in range(2))
    x.requires_grad_()
    y = layer(x, window)
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    for name, parameter in layer.named_parameters():
        made[name] = parameter
        if parameter.grad is not None:
            made[f"grad.{name}"] = parameter.grad
    return {name: tensor.detach().numpy() for name, tensor in made.items()}


if __name__ == "__main__":
    arrays = {f"{case}/{key}": value for case, sizes in CASES.items() for key, value in run(**sizes).items()}
    np.savez_compressed(sys.argv[1], **arrays)
