"""Attention across the channels of an image, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-30
"""Of a product of two squared norms: channels without light have no direction."""


def _split(qkv: Tensor, heads: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (N, heads, P, d) and h (N, P, hidden)."""
    *parts, h = qkv.split([(qkv.shape[2] - hidden) // 3] * 3 + [hidden], dim=-1)
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in parts)
    return q, k, v, h


def _weights(q: Tensor, k: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(A, q^T k, squared norms of q, of k, 1 / |q_i| |k_j|), in fp32 (fp64). The norms divide the small product."""
    wide = torch.promote_types(q.dtype, torch.float32)
    product = (q.transpose(2, 3) @ k).to(wide)
    of_q, of_k = (t.to(wide).square().sum(2) for t in (q, k))
    inverse = (of_q[..., None] * of_k[..., None, :]).clamp(min=SMALLEST).rsqrt()
    weights = torch.softmax(temperature.view(-1, 1, 1) * product * inverse, dim=-1)
    return weights, product, of_q, of_k, inverse


def _joined(t: Tensor) -> Tensor:
    """(N, heads, P, d) -> (N, P, heads * d)"""
    return t.transpose(1, 2).flatten(2)


def spectral_attention(qkv: Tensor, temperature: Tensor, hidden: int) -> Tensor:
    """(N, P, 3 C + hidden) -> (N, P, C + hidden), [A v, relu(h)] of [q, k, v, h].

    A = softmax_j(temperature * cos(q_i, k_j)) over the channels i, j of one head, the cosine over all P pixels.
    temperature: (heads,), fp32 (fp64).
    """
    q, k, v, h = _split(qkv, temperature.shape[0], hidden)
    weights = _weights(q, k, temperature)[0].to(v.dtype)
    return torch.cat([_joined(v @ weights.transpose(2, 3)), F.relu(h)], -1)


def spectral_attention_backward(grad: Tensor, qkv: Tensor, temperature: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """The gradients for ``qkv`` and ``temperature``."""
    q, k, v, h = _split(qkv, temperature.shape[0], hidden)
    of_y, of_h = grad.split([grad.shape[2] - hidden, hidden], dim=-1)
    g = of_y.unflatten(2, (temperature.shape[0], -1)).transpose(1, 2)
    weights, product, of_q, of_k, inverse = _weights(q, k, temperature)
    of_weights = (g.transpose(2, 3) @ v).to(weights.dtype)
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    of_product = of_logits * temperature.view(-1, 1, 1) * inverse
    # The cosine does not change with the length of q_i: what q_i's gradient has along q_i is taken out.
    along = torch.where(inverse < SMALLEST**-0.5, of_product * product, 0)
    along_q, along_k = (
        torch.where(square > 0, along.sum(axis) / square, 0)[..., None, :] for axis, square in ((-1, of_q), (-2, of_k))
    )
    narrow = of_product.to(qkv.dtype)
    parts = (
        k @ narrow.transpose(2, 3) - q * along_q.to(qkv.dtype),
        q @ narrow - k * along_k.to(qkv.dtype),
        g @ weights.to(qkv.dtype),
    )
    of_qkv = torch.cat([*(_joined(t) for t in parts), torch.where(h <= 0, 0, of_h)], -1)
    return of_qkv, (of_logits * product * inverse).sum((0, 2, 3))
