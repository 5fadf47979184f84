"""Calls of every op that has a C++ kernel, at sizes and strides that are hard on a kernel's edges."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable

import torch
from torch import Tensor

from lorun_fast import reference
from lorun_fast.ops._checks import parameter_dtype

DOUBLE, SINGLE, NARROW = torch.float64, torch.float32, (torch.bfloat16, torch.float16)
# Around the lanes of every vector, and the parts of tiles.
_COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33)


class Draw:
    """Random arguments, the same for a seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def count(self, least: int = 1, most: int = 33) -> int:
        return self.random.choice([c for c in _COUNTS if least <= c <= most])

    def any(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def one(self, *values):
        return self.random.choice(values)

    def batch(self) -> int:
        return self.random.choice((0, 1, 1, 2, 3))

    def storage(self) -> torch.dtype:
        return self.one(DOUBLE, SINGLE, *NARROW)

    def tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.laid(torch.randn(shape, generator=self.generator, dtype=DOUBLE).to(dtype))

    def maybe(self, *shape: int, dtype: torch.dtype) -> Tensor | None:
        return self.tensor(*shape, dtype=dtype) if self.random.random() < 0.6 else None

    def laid(self, t: Tensor) -> Tensor:
        """The tensor in some layout, NaN between its values; or one that says one value many times."""
        layout = self.one("dense", "dense", "last", "off", "apart", "strided", "expanded", "backwards")
        if layout == "last" and t.ndim == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "off":  # the last values of their memory, one value off any alignment
            return t.new_full((t.numel() + 1,), torch.nan)[1:].view(t.shape).copy_(t)
        if layout == "apart" and t.ndim:
            return t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan)[..., 1:-2].copy_(t)
        if layout == "strided" and t.ndim:
            return t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)[..., 1::2].copy_(t)
        if layout == "expanded" and t.ndim and t.shape[0]:
            return t[:1].expand(t.shape)
        if layout == "backwards" and t.ndim > 1:
            axes = list(range(t.ndim))[::-1]
            return t.permute(axes).contiguous().permute(axes)
        return t


def _rho(d: Draw, n: int, channels: int, dtype: torch.dtype) -> Tensor:
    return d.tensor(*d.one((1,), (n, channels)), dtype=dtype)


def _block_cs(d: Draw):
    dtype, n, block = d.storage(), d.batch(), d.any(1, 9)
    h, w, m = d.count(), d.count(), d.count(most=17)
    rows, cols = -(-h // block), -(-w // block)
    wide = parameter_dtype(dtype)
    x, phi = d.tensor(n, 1, h, w, dtype=dtype), d.tensor(m, block * block, dtype=wide)
    y = d.tensor(n, m, rows, cols, dtype=wide)
    step = (x, y, phi, _rho(d, n, 1, wide), block)
    yield "block_cs", (x, phi, block)
    yield "block_cs_adjoint", (d.tensor(n, m, rows, cols, dtype=dtype), phi, block, h, w)
    yield "block_cs_step", step
    yield "block_cs_step_residual", step
    yield "block_cs_grad_phi", (x, y, block)


def _blur_downsample(d: Draw):
    dtype, n, channels, scale = d.storage(), d.batch(), d.any(1, 3), d.any(1, 4)
    rows, cols, kh, kw = d.count(most=17), d.count(most=17), d.any(1, 12), d.any(1, 12)
    wide, each = parameter_dtype(dtype), d.one(True, False)
    x = d.tensor(n, channels, rows * scale, cols * scale, dtype=dtype)
    y = d.tensor(n, channels, rows, cols, dtype=wide)
    kernel = d.tensor(*((n,) if each else ()), kh, kw, dtype=wide)
    step = (x, y, kernel, _rho(d, n, channels, wide), scale)
    yield "blur_downsample", (x, kernel, scale)
    yield "blur_downsample_adjoint", (d.tensor(n, channels, rows, cols, dtype=dtype), kernel, scale)
    yield "blur_downsample_descend", step
    yield "blur_downsample_step", step
    yield "blur_downsample_grad_kernel", (x, y, kh, kw, scale, each)


def _cassi(d: Draw):
    dtype, n, bands, step = d.storage(), d.batch(), d.any(1, 9), d.one(0, 1, 2, 3, 4, 8, 40)
    h, w = d.any(1, 5), d.one(d.count(), 40, 70, 100)
    wide, each, measured = parameter_dtype(dtype), d.one(True, False), w + step * (bands - 1)
    x, y = d.tensor(n, bands, h, w, dtype=dtype), d.tensor(n, h, measured, dtype=wide)
    own = d.one((), (n,))
    mask = d.tensor(*own, *((bands,) if each else (1,) if own else ()), h, w, dtype=wide)
    weight = d.maybe(d.one(1, n), h, measured, dtype=wide)
    rho = d.tensor(*d.one((1,), (n, 1), (n, bands)), dtype=wide)
    yield "cassi", (x, mask, step)
    yield "cassi_adjoint", (d.tensor(n, h, measured, dtype=dtype), mask, bands, step)
    yield "cassi_step", (x, d.one(y, None), mask, rho, weight, step, d.one(True, False))
    yield "cassi_grad_mask", (x, y, step, each, bool(own))
    yield "cassi_prox_weight", (mask, 0.5 + d.tensor(n, dtype=wide).abs(), bands, step)


def _depthwise_conv2d(d: Draw):
    dtype, n, channels, h, w = d.storage(), d.batch(), d.count(), d.any(1, 9), d.one(d.count(), 70)
    x, weight = d.tensor(n, channels, h, w, dtype=dtype), d.tensor(channels, 1, 3, 3, dtype=dtype)
    yield "depthwise_conv2d", (x, weight, d.maybe(channels, dtype=dtype))
    yield "depthwise_conv2d_backward", (d.tensor(*x.shape, dtype=dtype), x, weight, d.one(True, False))


def _lora_merge(d: Draw):
    layers = []
    for _ in range(d.any(1, 3)):
        dtype, stages, k, r, out, in_ = d.storage(), d.any(1, 3), d.any(1, 3), d.any(1, 9), d.count(), d.count()
        form, flipped = d.one("linear", "loralib", "peft"), d.one(True, False)
        if form == "linear":
            weight, down, up, flipped = (out, in_), (r, in_), (out, r), False
        elif form == "loralib":
            weight, down, up = (out, in_, k, k), (r * k, in_ * k), (out * k, r * k)
            if flipped:
                weight, down, up = (in_, out, k, k), (r * k, in_ * k), (out * k, r * k)
        else:
            weight, down, up = (out, in_, k, k), (r, in_, k, k), (out, r)
            if flipped:
                weight, down = (in_, out, k, k), (in_, r, k, k)
        factor = d.one(dtype, parameter_dtype(dtype))
        tensors = (
            d.tensor(*s, dtype=t) for s, t in ((weight, dtype), ((stages, *down), factor), ((stages, *up), factor))
        )
        layers.append((*tensors, d.one(1.0, 0.3), flipped))
    weights, downs, ups, scales, flips = (list(column) for column in zip(*layers, strict=True))
    yield "lora_merge", (weights, downs, ups, scales, flips, d.one(None, d.storage()), d.one(None, True, False))
    stage = d.any(0, min(map(len, ups)) - 1)
    yield "lora_merge_stage", (weights, downs, ups, scales, flips, stage)
    grads = [d.tensor(*w.shape, dtype=w.dtype) for w in weights]
    yield "lora_merge_stage_backward", (grads, downs, ups, scales, flips, stage)


def _packed(d: Draw):
    dtype, n, in_, out, k = d.one(SINGLE, *NARROW, torch.bfloat16), d.batch(), d.count(), d.count(), d.any(1, 4)
    stride, padding, h, w = d.any(1, 3), d.any(0, 3), d.count(4, 17), d.one(d.count(4), 50)
    rows, cols = ((length + 2 * padding - k) // stride + 1 for length in (h, w))
    x, weight = d.tensor(n, in_, h, w, dtype=dtype), d.tensor(out, in_, k, k, dtype=dtype)
    r = d.any(1, 9)
    down, up = d.tensor(r, in_, k, k, dtype=SINGLE), d.tensor(out, r, dtype=SINGLE)
    yield "packed_weight", (weight, *d.one((None, None), (down, up)), 0.5, dtype, d.one(True, False))
    packed = torch.ops.lorun_fast.packed_weight(weight, None, None, 1.0, dtype, False)
    bias, residual = d.maybe(out, dtype=parameter_dtype(dtype)), d.maybe(n, out, rows, cols, dtype=dtype)
    yield "packed_conv2d", (x, packed, bias, residual, out, k, stride, padding, 1, d.one(True, False), None)
    gate = d.tensor(n, out, rows, cols, dtype=dtype)
    yield "packed_conv2d", (x, packed, bias, None, out, k, stride, padding, 1, False, gate)
    first, second = (d.tensor(*s, 3, 3, dtype=dtype) for s in ((out, in_), (in_, out)))
    first, second = (torch.ops.lorun_fast.packed_weight(t, None, None, 0.1, dtype, False) for t in (first, second))
    biases = d.maybe(out, dtype=parameter_dtype(dtype)), d.maybe(in_, dtype=parameter_dtype(dtype))
    yield "packed_block", (x, first, biases[0], second, biases[1], d.maybe(*x.shape, dtype=dtype), out)
    grad = d.tensor(n, out, h + 2 * padding - k + 1, w + 2 * padding - k + 1, dtype=dtype)
    yield "packed_weight_gradient", (grad, x, k, padding)
    yield "packed_factor_gradients", (grad, x, down.to(dtype), up.to(dtype), padding)


def _relayout(d: Draw):
    source = d.storage()
    dtype = d.one(source, *{DOUBLE: (), SINGLE: NARROW}.get(source, (SINGLE,)))
    x = d.tensor(d.batch(), d.count(), d.any(0, 9), d.one(d.count(), 130), dtype=source)
    yield "relayout", (x, d.one(True, False), dtype)


def _spectral_attention(d: Draw):
    dtype, n, heads, channels, hidden = d.storage(), d.batch(), d.any(1, 3), d.count(), d.one(0, d.count())
    pixels = d.one(2, 5, 63, 65, 300)
    qkv, temperature = (
        d.tensor(n, pixels, 3 * heads * channels + hidden, dtype=dtype),
        d.tensor(heads, dtype=parameter_dtype(dtype)),
    )
    yield "spectral_attention", (qkv, temperature, hidden)
    grad = d.tensor(n, pixels, heads * channels + hidden, dtype=dtype)
    yield "spectral_attention_backward", (grad, qkv, temperature, hidden)


def _thin_conv2d(d: Draw):
    dtype, n, h, w = d.storage(), d.batch(), d.any(1, 9), d.one(d.count(), 70)
    in_, out = d.one(1, -1) * d.any(1, 4), d.one(8, 16, 24, 40)
    in_, out = (in_, out) if in_ > 0 else (out, -in_)
    x, weight = d.tensor(n, in_, h, w, dtype=dtype), d.tensor(out, in_, 3, 3, dtype=dtype)
    bias, residual = d.maybe(out, dtype=dtype), d.maybe(n, out, h, w, dtype=dtype)
    yield "thin_conv2d", (x, weight, bias, residual, d.one(True, False))
    yield "thin_weight_gradient", (d.tensor(n, out, h, w, dtype=dtype), x)


def _winograd(d: Draw):
    dtype, n, h, w = d.storage(), d.batch(), d.count(most=17), d.one(d.count(), 70)
    in_, out = d.count(8), d.count(8)
    x, weight, bias = (
        d.tensor(n, in_, h, w, dtype=dtype),
        d.tensor(out, in_, 3, 3, dtype=dtype),
        d.maybe(out, dtype=parameter_dtype(dtype)),
    )
    yield "winograd_weight", (weight, d.one(True, False))
    points = torch.ops.lorun_fast.winograd_weight(0.1 * weight, False)
    back = torch.ops.lorun_fast.winograd_weight(0.1 * weight, True)
    yield "winograd_conv2d", (x, points, bias, d.one(True, False), d.maybe(n, out, h, w, dtype=dtype))
    other = d.maybe(in_, dtype=parameter_dtype(dtype))
    yield "winograd_block", (x, points, bias, back, other, d.maybe(*x.shape, dtype=dtype))
    yield "winograd_weight_gradient", (d.tensor(n, out, h, w, dtype=dtype), x)


FAMILIES: dict[str, Callable] = {
    f.__name__[1:]: f
    for f in (
        _block_cs,
        _blur_downsample,
        _cassi,
        _depthwise_conv2d,
        _lora_merge,
        _packed,
        _relayout,
        _spectral_attention,
        _thin_conv2d,
        _winograd,
    )
}


def _definitions() -> dict[str, Callable]:
    """Every op's definition, by the op's name."""
    found = {}
    for module in (
        "block_cs",
        "blur_downsample",
        "cassi",
        "depthwise_conv2d",
        "fused_conv2d",
        "lora",
        "packed_conv2d",
        "packed_factor_gradients",
        "packed_weight_gradient",
        "relayout",
        "spectral_attention",
        "winograd_conv2d",
    ):
        found |= vars(importlib.import_module(f"{reference.__name__}.{module}"))
    return {**found, "thin_conv2d": found["fused_conv2d"]}


_DEFINITIONS = _definitions()


_CLOSE = {DOUBLE: 1e-9, SINGLE: 1e-3, **dict.fromkeys(NARROW, 0.05)}


def _tensors(value) -> list[Tensor]:
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def _doubled(value):
    if isinstance(value, Tensor):
        return value.double().contiguous()
    return [_doubled(v) for v in value] if isinstance(value, list) else value


def _told(value):
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return [_told(v) for v in value] if isinstance(value, list | tuple) else value


def check_call(name: str, args: tuple) -> None:
    """One call against the definition in float64: a value from outside a tensor would be NaN or far off."""
    found = _tensors(getattr(torch.ops.lorun_fast, name)(*args))
    close = max(_CLOSE[t.dtype] for t in (*_tensors(args), *found))
    for got, want in zip(found, _tensors(_DEFINITIONS[name](*(_doubled(a) for a in args))), strict=True):
        assert got.shape == want.shape, f"expected {tuple(want.shape)}, got {tuple(got.shape)}"
        if got.numel():
            apart = (got.double() - want.double()).abs().max()
            assert apart <= close * (1 + want.abs().max()), f"{apart:.3g} from the definition"


def check_family(name: str, seed: int) -> None:
    for op, args in FAMILIES[name](Draw(seed)):
        try:
            check_call(op, args)
        except Exception as error:
            raise AssertionError(f"{op}, seed {seed}, {_told(args)}: {error}") from error


def check_all(seeds: int) -> None:
    """So many seeds of every family; says so in the end."""
    for name in FAMILIES:
        for seed in range(seeds):
            check_family(name, seed)
    print("checked")
