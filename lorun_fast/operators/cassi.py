"""Single-disperser snapshot spectral imaging (CASSI) as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorun_fast.operators.base import SensingOperator, as_matrix, one_per_sample
from lorun_fast.ops import cassi as ops
from lorun_fast.ops._checks import check_image, check_tensor, pair, whole


def shift_bands(x: Tensor, step: int) -> Tensor:
    """V2 to V1: (N, L, H, W) -> (N, L, H, W + step*(L-1)), band c moved c*step columns to the right, zeros around.

    V1 is the state of networks that keep every band at its place on the detector (28 x 256 x 310 for 256 px, step 2)
    and undo the dispersion by circular rolls; V2 keeps the bands aligned and cropped (28 x 256 x 256).
    """
    n, bands, height, width = _check_bands("x", x, step, "(N, L, H, W)")
    wide = ops.measured_width(width, bands, step)
    strides = (bands * height * wide, height * wide + step, wide, 1)
    return torch.as_strided_scatter(x.new_zeros((n, bands, height, wide)), x, x.shape, strides)


def unshift_bands(v: Tensor, step: int) -> Tensor:
    """V1 to V2: (N, L, H, W + step*(L-1)) -> (N, L, H, W), the inverse of :func:`shift_bands`.

    What lies outside a band's window is dropped: rolling back and cropping to W columns gives the same.
    """
    return _unshift("v", v, step)


def _unshift(name: str, v: Tensor, step: int) -> Tensor:
    n, bands, height, wide = _check_bands(name, v, step, "(N, L, H, W + step*(L-1))")
    width = wide - step * (bands - 1)
    if width < 1:
        raise ValueError(
            f"{name}: expected more than step*(L-1) = {step * (bands - 1)} columns for {bands} bands at step {step}, "
            f"got {wide}"
        )
    v = v.contiguous()
    strides = (bands * height * wide, height * wide + step, wide, 1)
    return v.as_strided((n, bands, height, width), strides).contiguous()


def _check_bands(name: str, t: Tensor, step: int, layout: str) -> torch.Size:
    check_tensor(name, t)
    if t.ndim != 4:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(t.shape)}")
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}")
    return t.shape


class CASSI(SensingOperator):
    """y[i, j] = sum_c mask_c[i, j - c*step] * x_c[i, j - c*step]: code, disperse, add up the bands.

    mask: the coded aperture, (H, W) for all bands, or (L, H, W); or one for each sample of a batch, (N, 1, H, W) or
        (N, L, H, W), which then serves batches of N alone. fp32 or fp64 tensor or array.
    bands: L. Default 28 for a mask that is the same for all bands; another one brings its own.
    step: columns between neighbouring bands, >= 0. Default 2.
    learn: make the mask a trainable parameter instead of a buffer.

    Images are (N, L, H, W) in the V2 layout (bands aligned), measurements (N, H, W + step*(L-1)).
    :meth:`to_v1` and :meth:`from_v1` convert to the layout (N, L, H, W + step*(L-1)) of other networks.
    ``size`` may be left out everywhere: the mask tells it. Step 0, no dispersion, is snapshot compressive video: the
    bands are frames, each behind its own mask.

    Raises ValueError for a mask of another rank or band count, or with NaN or infinite entries.
    """

    task = "cassi"

    def __init__(self, mask: Tensor, bands: int | None = None, step: int = 2, *, learn: bool = False):
        super().__init__()
        mask = as_matrix("mask", mask, (2, 3, 4))
        shared = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1)  # by all bands
        if bands is None:
            bands = 28 if shared else mask.shape[-3]
        bands, step = whole("bands", bands, 1), whole("step", step, 0)
        if not shared and mask.shape[-3] != bands:
            raise ValueError(
                f"mask: expected (H, W) or ({bands}, H, W) for bands={bands}, or one per sample, "
                f"(N, 1 or {bands}, H, W), got shape {tuple(mask.shape)}"
            )
        self.bands, self.step = bands, step
        if learn:
            self.mask = nn.Parameter(mask.detach().clone().contiguous())
        else:
            self.register_buffer("mask", mask.contiguous())

    @classmethod
    def from_phi(cls, phi: Tensor, step: int = 2, *, learn: bool = False) -> CASSI:
        """From a full sensing array on the detector, (L, H, W + step*(L-1)), such as a calibrated ``mask_3d_shift``.

        Or from one per sample, (N, L, H, W + step*(L-1)).
        Band c of an image reaches only the columns c*step to c*step + W - 1. What phi holds outside that window is
        ignored (it would multiply zeros), also in Phi_s: so the proximal step stays exact. The window is kept as a
        mask (L, H, W), or (N, L, H, W).
        """
        phi, step = as_matrix("phi", phi, (3, 4)), whole("step", step, 0)
        mask = _unshift("phi", phi if phi.ndim == 4 else phi[None], step)
        return cls(mask if phi.ndim == 4 else mask[0], phi.shape[-3], step, learn=learn)

    @property
    def phi(self) -> Tensor:
        """The full sensing array, (L, H, W + step*(L-1)), zero outside each band's window; (N, ...) of N masks."""
        if self.mask.ndim == 4:
            return self.to_v1(self.mask.expand(-1, self.bands, -1, -1))
        return self.to_v1(self.mask.expand(1, self.bands, *self.mask.shape[-2:]))[0]

    def extra_repr(self) -> str:
        kind = "(H, W)" if self.mask.ndim == 2 else "(L, H, W)"
        if self.mask.ndim == 4:
            kind = f"({self.mask.shape[0]}, {'1' if self.mask.shape[1] == 1 else 'L'}, H, W), one per sample"
        learned = ", learned" if isinstance(self.mask, nn.Parameter) else ""
        height, width = self.mask.shape[-2:]
        return f"{height}x{width}, bands={self.bands}, step={self.step}, mask={kind}{learned}"

    def config(self) -> dict:
        return {"bands": self.bands, "step": self.step, "learn": isinstance(self.mask, nn.Parameter)}

    @classmethod
    def from_config(cls, config: dict, state: dict[str, Tensor]) -> CASSI:
        return cls(state["mask"], config["bands"], config["step"], learn=config["learn"])

    def image_size(self, y: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
        """(H, W) of the mask; raises if ``size`` says otherwise."""
        height, width = self.mask.shape[-2:]
        if size is not None and pair(size) != (height, width):
            raise ValueError(f"size: expected the mask's ({height}, {width}) or None, got {tuple(size)}")
        return height, width

    def _own_bands(self, x: Tensor) -> Tensor:
        # A mask (H, W) alone would take any number of bands.
        shape = getattr(x, "shape", ())
        if len(shape) == 4 and shape[1] != self.bands:
            raise ValueError(f"x: expected {self.bands} bands, got {shape[1]}")
        return x

    def forward(self, x: Tensor) -> Tensor:
        return ops.cassi(self._own_bands(x), self._beside("mask", x), step=self.step)

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is not None:
            self.image_size(y, size)
        return ops.cassi_adjoint(y, self._beside("mask", y), bands=self.bands, step=self.step)

    def gradient_step(self, x: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        return ops.cassi_step(self._own_bands(x), y, self._beside("mask", x), rho, step=self.step)

    def initial(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """y*step/L, shifted back per band (step 0: y/L), (N, L, H, W)."""
        height, width = self.image_size(y, size)
        check_image("y", y, 3, "(N, H, W + step*(L-1))")
        want = (height, ops.measured_width(width, self.bands, self.step))
        if tuple(y.shape[1:]) != want:
            raise ValueError(f"y: expected (N, {want[0]}, {want[1]}), got shape {tuple(y.shape)}")
        if self.mask.ndim == 4 and y.shape[0] != self.mask.shape[0]:
            raise ValueError(f"y: expected {self.mask.shape[0]} samples, one for each mask, got {y.shape[0]}")
        scaled = y * (max(self.step, 1) / self.bands)
        if self.step == 0:
            return scaled.unsqueeze(1).repeat(1, self.bands, 1, 1)
        return scaled.unfold(2, width, self.step).transpose(1, 2).contiguous()

    def energy(self) -> Tensor:
        """Phi_s = sum_c Phi_c^2, the diagonal of Phi Phi^T, (H, W + step*(L-1)); (N, H, W + step*(L-1)) of N masks."""
        return ops.energy(self.mask, bands=self.bands, step=self.step)

    def norm(self) -> Tensor:
        """The largest singular value of Phi: the root of Phi_s's largest entry."""
        return self.energy().max().sqrt()

    def prox(self, x: Tensor, y: Tensor, mu: float | Tensor) -> Tensor:
        """argmin_v ||Phi v - y||^2 / 2 + mu ||v - x||^2 / 2 = x + Phi^T ((y - Phi x) / (mu + Phi_s)), exact.

        mu: a number >= 0, a 0-d tensor, (N,), or broadcastable to (N, 1, 1, 1). Zeros of Phi_s count as 1.
        """
        mu = one_per_sample(mu)
        return ops.cassi_prox(self._own_bands(x), y, self._beside("mask", x), mu, step=self.step)

    def to_v1(self, x: Tensor) -> Tensor:
        """(N, L, H, W) -> (N, L, H, W + step*(L-1)): each band at its place on the detector, zeros around."""
        return shift_bands(self._own_bands(x), self.step)

    def from_v1(self, v: Tensor) -> Tensor:
        """(N, L, H, W + step*(L-1)) -> (N, L, H, W): the window of each band, aligned."""
        return unshift_bands(self._own_bands(v), self.step)
