"""What the base denoisers do with their input before the first layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.ops._checks import check_image, in_16_bits, number_or_tensor, shape_of, whole
from lorun_fast.ops._direct import transforms_active
from lorun_fast.ops.relayout import LEAST_CHANNELS, relayout


def sizes(name: str, values: Sequence[int], least: int) -> tuple[int, ...]:
    """A user's whole numbers of at least ``least``, one per scale; an array of them too."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"{name}: expected one number per scale, got {values!r}")
    return tuple(whole(name, value, least) for value in values)


def check_channels(in_channels: int, out_channels: int, residual: bool) -> tuple[int, int]:
    """Both numbers. Raises where a residual network would have more channels to correct than it is given."""
    in_channels, out_channels = whole("in_channels", in_channels, 1), whole("out_channels", out_channels, 1)
    if residual and out_channels > in_channels:
        raise ValueError(f"residual needs out_channels <= in_channels, got {out_channels} > {in_channels}")
    return in_channels, out_channels


def check_images(z: Tensor, channels: int) -> None:
    """Raises ValueError or TypeError unless z is (N, channels, H, W), H and W not 0, of floating-point values."""
    check_image("z", z, 4, f"(N, {channels}, H, W)")
    if z.shape[1] != channels:
        raise ValueError(f"z: expected (N, {channels}, H, W), got shape {tuple(z.shape)}")
    if z.shape[2] < 1 or z.shape[3] < 1:
        raise ValueError(f"z: expected at least one row and one column, got shape {tuple(z.shape)}")


def with_noise_map(z: Tensor, sigma: float | Tensor | None, wanted: bool, name: str) -> Tensor:
    """z with one more, constant channel that holds sigma (a number, 0-d or (N,)); z itself where none is wanted."""
    if not wanted:
        if sigma is not None:
            raise ValueError(f"this {name} was built without noise_level=True and takes no sigma")
        return z
    if sigma is None:
        raise ValueError(f"this {name} was built with noise_level=True: pass sigma")
    n, _, h, w = z.shape
    sigma = number_or_tensor("sigma", sigma, z.dtype, z.device)
    if sigma.numel() not in (1, n):
        raise ValueError(f"sigma: expected a number, 0-d or ({n},), got shape {shape_of(sigma)}")
    return torch.cat([z, sigma.reshape(-1, 1, 1, 1).expand(n, 1, h, w)], 1)


def _holds(*conditions: bool) -> bool:
    """Whether all hold; while a program for any size is exported, whether they do for all of these."""
    if not torch.compiler.is_exporting() or all(isinstance(c, bool) for c in conditions):
        return all(conditions)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # its import takes a while

    return all(statically_known_true(c) for c in conditions)


def whole_cells(x: Tensor, cell: int) -> Tensor:
    """x, its last row and column repeated until height and width are multiples of ``cell``; x itself if they are."""
    height, width = x.shape[2:]
    down, across = ((side + cell - 1) // cell * cell - side for side in (height, width))
    if _holds(down == 0, across == 0):
        return x
    # On a CPU autocast takes this for an operation that needs fp32.
    return F.pad(x, (0, across, 0, down), mode="replicate").to(x.dtype)


def cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first rows and columns of x, as many as ``size`` says."""
    height, width = size
    if _holds(height <= x.shape[2], width <= x.shape[3]):
        return x[:, :, :height, :width]
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))  # a slice would ask whether there are so many


def channels_last(x: Tensor) -> Tensor:
    """x in that layout; as it is under transforms of torch.func, where torch.vmap has no layouts."""
    return x if transforms_active() else relayout(x, torch.channels_last)


def for_convolution(x: Tensor) -> Tensor:
    """x as a first convolution takes it in the least time: on a CPU channels innermost, unless few are in fp32."""
    if x.device.type != "cpu":
        return x
    narrow = in_16_bits(x) or torch.is_autocast_enabled("cpu")
    return channels_last(x) if narrow or x.shape[1] >= LEAST_CHANNELS else x


def to_correct(z: Tensor, x: Tensor, channels: int) -> Tensor:
    """What a residual network adds its result to: z, by the name x in the layout of its first layer.

    On a CPU in that layout, for a sum of two layouts takes four times as long there.
    """
    return cropped(x[:, :channels], z.shape[2:]) if z.device.type == "cpu" else z[:, :channels]
