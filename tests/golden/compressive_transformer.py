"""Make compressive_transformer.npz: outputs, gradients and losses over several segments, by the package labml-nn.

In an environment with compressive_transformer_requirements.txt, the packages labml* installed with ``--no-deps``::

    python tests/golden/compressive_transformer.py tests/golden/compressive_transformer.npz

Taken from the package: the layer's attention over compressed, memory and segment; the convolution; the rule by which
memories are merged and compressed; the attention-reconstruction loss. Set by this script: the order of the norms (the
package norms before, the paper after), learned tables of distances that equal the paper's sinusoids and projections,
and that outputs give the convolution no gradient. ``tracker.debug``, which the package calls, no longer exists in
labml; torchvision, which its experiment imports for data, is not needed.
"""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import labml.configs
import labml.tracker
import numpy as np
import torch
from torch import nn

for name in ("torchvision", "labml_nn.helpers.metrics"):
    sys.modules[name] = MagicMock()
sys.modules["labml_nn.experiments.nlp_autoregression"] = SimpleNamespace(NLPAutoRegressionConfigs=labml.configs.BaseConfigs)

labml.tracker.debug = lambda *args, **kwargs: None

from labml_nn.transformers.compressive import (
    AttentionReconstructionLoss,
    CompressiveTransformerLayer,
    Conv1dCompression,
)
from labml_nn.transformers.compressive.experiment import CompressedMemory, Configs
from labml_nn.transformers.xl.relative_mha import RelativeMultiHeadAttention

BATCH, LENGTH, D_MODEL, HEADS, D_FF = 2, 22, 8, 2, 12
CASES = {
    "two_layers": {"layers": 2, "segment_len": 4, "mem_len": 4, "compressed_len": 4, "rate": 2},
    "overlapping": {"layers": 1, "segment_len": 6, "mem_len": 3, "compressed_len": 3, "rate": 3},
    "long": {"layers": 1, "segment_len": 2, "mem_len": 6, "compressed_len": 5, "rate": 2},
}


class Layer(nn.Module):
    """The package's layer without its norms and network, inside a post-norm layer with weights by our names."""

    def __init__(self, rate: int, keys: int):
        super().__init__()
        attention = RelativeMultiHeadAttention(HEADS, D_MODEL, dropout_prob=0.0)
        zero = nn.Module()
        zero.forward = torch.zeros_like
        compression = Conv1dCompression(rate, D_MODEL)
        self.inner = CompressiveTransformerLayer(
            d_model=D_MODEL, self_attn=attention, feed_forward=zero, dropout_prob=0.0, compress=compression
        )
        self.inner.norm_self_attn, self.inner.norm_ff = nn.Identity(), nn.Identity()
        del attention.key_pos_embeddings, attention.key_pos_bias
        self.r = nn.Linear(D_MODEL, D_MODEL, bias=False)
        self.position_bias = nn.Parameter(torch.empty(HEADS, D_MODEL // HEADS))
        self.norm_mixer, self.norm_ffn = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.up, self.down = nn.Linear(D_MODEL, D_FF), nn.Linear(D_FF, D_MODEL)
        self.keys = keys
        for part in (attention.value.linear, attention.output):  # the paper's projections have no bias
            nn.init.zeros_(part.bias)
            part.bias.requires_grad_(False)

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by our names."""
        attention = self.inner.self_attn
        mixer = {
            "q.weight": attention.query.linear.weight, "k.weight": attention.key.linear.weight,
            "v.weight": attention.value.linear.weight, "o.weight": attention.output.weight, "r.weight": self.r.weight,
            "content_bias": attention.query_pos_bias, "position_bias": self.position_bias,
            "compress.weight": self.inner.compress.conv.weight, "compress.bias": self.inner.compress.conv.bias,
        }
        rest = {"norm_mixer": self.norm_mixer, "ffn.up": self.up, "ffn.down": self.down, "norm_ffn": self.norm_ffn}
        names = {f"mixer.{name}": value for name, value in mixer.items()}
        return names | {f"{part}.{kind}": getattr(m, kind) for part, m in rest.items() for kind in ("weight", "bias")}

    def tables(self) -> None:
        """Row P - distance of the learned tables from sinusoids, their projection and the position bias."""
        attention = self.inner.self_attn
        distance = torch.arange(self.keys, -1, -1, dtype=torch.float64)[:, None]
        angle = distance * 10000.0 ** -(torch.arange(0, D_MODEL, 2, dtype=torch.float64) / D_MODEL)
        r = self.r(torch.cat((angle.sin(), angle.cos()), dim=1)).view(-1, HEADS, D_MODEL // HEADS)
        future = r.new_zeros(attention.P - 1, *r.shape[1:])
        farther = r.new_zeros(attention.P - self.keys, *r.shape[1:])
        attention.key_pos_embeddings = torch.cat((farther, r, future))
        bias = (r * self.position_bias).sum(2)
        attention.key_pos_bias = torch.cat((farther[..., 0], bias, future[..., 0]))

    def forward(self, x: torch.Tensor, mem: torch.Tensor | None, c_mem: torch.Tensor | None) -> torch.Tensor:
        before = sum(len(part) for part in (mem, c_mem) if part is not None)
        mask = torch.ones(len(x), before + len(x)).tril(before)[:, :, None]
        a = self.norm_mixer(self.inner(x=x, mem=mem, c_mem=c_mem, mask=mask))
        return self.norm_ffn(a + self.down(self.up(a).relu()))


def run(layers: int, segment_len: int, mem_len: int, compressed_len: int, rate: int) -> dict[str, np.ndarray]:
    """Segment after segment, memories handed on; one loss over all outputs, another over all compressions."""
    torch.manual_seed(0)
    keys = segment_len + mem_len + compressed_len
    stack = nn.ModuleList(Layer(rate, keys) for _ in range(layers)).double()
    weights = {f"layers.{i}.{key}": value for i, layer in enumerate(stack) for key, value in layer.named().items()}
    with torch.no_grad():
        for value in weights.values():
            value.normal_(std=0.5)
    for layer in stack:
        layer.tables()
    configs = SimpleNamespace(
        mem_len=mem_len, c_mem_len=compressed_len, compression_rate=rate,
        model=SimpleNamespace(transformer=SimpleNamespace(layers=[layer.inner for layer in stack])),
    )  # fmt: skip
    reconstruction = AttentionReconstructionLoss(configs.model.transformer.layers)
    reconstruction.norm = lambda norm, rows: rows
    x = torch.randn(LENGTH, BATCH, D_MODEL, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    outputs, losses, memory = [], [], None
    segments = x.split(segment_len)
    for number, segment in enumerate(segments):
        inputs = []
        for index, layer in enumerate(stack):
            inputs.append(segment.detach())
            mem = memory.mem[index] if memory and memory.mem else None
            c_mem = memory.c_mem[index] if memory and memory.c_mem else None
            segment = layer(segment, mem, c_mem)
        outputs.append(segment)
        if number + 1 < len(segments):
            memory, old = Configs.merge_compress_memory(configs, memory, inputs)
            if old:
                losses.append(reconstruction(inputs, old))
            memory = CompressedMemory(memory.mem, [entries.detach() for entries in memory.c_mem])
    y = torch.cat(outputs)
    y.backward(grad)
    torch.stack(losses).sum().backward()
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    made = {name: value.transpose(0, 1) for name, value in made.items()} | {"losses": torch.stack(losses)}
    made |= weights | {f"grad.{name}": value.grad for name, value in weights.items()}
    return {name: value.detach().numpy() for name, value in made.items()}


if __name__ == "__main__":
    arrays = {f"{name}/{key}": array for name, case in CASES.items() for key, array in run(**case).items()}
    np.savez_compressed(sys.argv[1], **arrays)
