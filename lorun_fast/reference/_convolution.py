"""What several convolutions have in common."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def weight_gradient_backward(grad_weight: Tensor, grad: Tensor, x: Tensor, padding: int = 1) -> tuple[Tensor, Tensor]:
    """Of a weight's gradient, a function of the result's gradient and of x: the gradients for these two."""
    weight = grad_weight.to(x.dtype)
    return F.conv2d(x, weight, padding=padding), F.conv_transpose2d(grad, weight, padding=padding)
