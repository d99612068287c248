"""The operator in plain PyTorch: the oracle that faster implementations are compared with.

B batch, H heads, T queries, S keys (the last T of them are the queries' own tokens), D head width.
"""

import torch


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Softmax attention over the last ``window`` keys; ``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``."""
    T, S = q.shape[2], k.shape[2]
    queries = torch.arange(S - T, S, device=q.device).unsqueeze(1)
    keys = torch.arange(S, device=q.device)
    visible = (keys <= queries) & (keys > queries - window)  # [T, S]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, T, S]
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=3) @ v
