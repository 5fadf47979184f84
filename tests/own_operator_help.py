"""A sensing operator as somebody else writes one."""

from __future__ import annotations

import torch

import lorun_fast as lf


class Inpainting(lf.SensingOperator):
    """Known pixels: the two methods that a subclass needs."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask

    def adjoint(self, y, size=None):
        return y * self.mask


class Coils(lf.SensingOperator):
    """Magnetic resonance with several coils: a complex image in two channels, complex y, no closed form.

    maps (2, coils, H, W): real and imaginary part of what each coil receives, learned. lines (W,): 1 where measured.
    """

    def __init__(self, maps, lines):
        super().__init__()
        self.maps = torch.nn.Parameter(maps)
        self.register_buffer("lines", lines)

    def forward(self, x):
        image = torch.complex(x[:, 0], x[:, 1])[:, None] * torch.complex(*self.maps)
        return self.lines * torch.fft.fft2(image, norm="ortho")

    def adjoint(self, y, size=None):
        image = (torch.fft.ifft2(self.lines * y, norm="ortho") * torch.complex(*self.maps).conj()).sum(1)
        return torch.stack([image.real, image.imag], 1)
