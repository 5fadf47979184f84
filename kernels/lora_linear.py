"""LoRA linear layers and 1 x 1 convolutions: the convolution kernels at k = 1.

What it computes

    y[m, o]  =  act( sum_c x[m, c] * W[o, c]  +  scale * sum_r (sum_c x[m, c] * down[r, c]) * up[o, r]  +  bias[o] )
                +  residual[m, o]

for x (..., in), and its backward pass as in lora_conv2d_backward.py.

Bytes and operations. 2 * in * out per row, R / out of that for the adapter (R: r padded to 16); x and y once. In bf16
on an H200 the ridge lies at in = out = 367: the projections of a denoiser (28 to 256) are limited by memory, and what
fusing saves is traffic: torch's base product, two thin products and an addition read or write x twice and y three
times.

Tiling. The rows of one sample are an image one pixel high: 128 pixels x BO channels per program, no tile cut by a row's
end, the loop over input channels pipelined. With one stage per sample, the rows of a sample share its adapter.
"""

from __future__ import annotations

from torch import Tensor

from lorun_fast.kernels import lora_conv2d, lora_conv2d_backward


def _image(t: Tensor, samples: int) -> Tensor:
    """(..., channels) as (samples, channels, 1, rows), channels together."""
    return t.reshape(samples, 1, -1, t.shape[-1]).permute(0, 3, 1, 2)


def _kernel(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view(*t.shape, 1, 1)


def _samples(x: Tensor, stage) -> int:
    return x.shape[0] if isinstance(stage, Tensor) else 1


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, *, scale: float = 1.0,
    stage: int | Tensor | None = None, activation: str | None = None, residual: Tensor | None = None,
    out: Tensor | None = None, tf32: bool = False, tile=None,
) -> Tensor:  # fmt: skip
    """act(x (W + scale * dW)^T + bias) + residual, (..., out).

    x: (..., in), N leading when ``stage`` is a tensor (N,). weight: (out, in), or (K, out, in) merged weights of every
    stage with down = up = None. down: (r, in), up: (out, r), with a leading axis K exactly when ``stage`` is given.
    """
    n = _samples(x, stage)
    shape = (*x.shape[:-1], weight.shape[-2])
    out = x.new_empty(shape) if out is None else out
    lora_conv2d.forward(
        _image(x, n), _kernel(weight), bias, _kernel(down), up, scale=scale, stage=stage, activation=activation,
        residual=None if residual is None else _image(residual, n),
        out=out.view(n, 1, -1, shape[-1]).permute(0, 3, 1, 2), tf32=tf32, tile=tile,
    )  # fmt: skip
    return out


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, *,
    scale: float = 1.0, stage: int | Tensor | None = None, activation: str | None = None, output: Tensor | None = None,
    need: tuple[bool, bool, bool] = (True, True, False), tf32: bool = False, tile=None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, d down, d up, d bias), as lora_conv2d_backward.backward; d down is d weight where there is no adapter."""
    n = _samples(x, stage)
    dx, d_down, d_up, d_bias = lora_conv2d_backward.backward(
        _image(dy, n), _image(x, n), _kernel(weight), bias, _kernel(down), up, scale=scale, stage=stage,
        activation=activation, output=None if output is None else _image(output, n), need=need, tf32=tf32, tile=tile,
    )  # fmt: skip
    if dx is not None:
        dx = dx.permute(0, 2, 3, 1).reshape(x.shape)
    if d_down is not None:
        d_down = d_down.reshape((weight if down is None else down).shape)
    return dx, d_down, d_up, d_bias
