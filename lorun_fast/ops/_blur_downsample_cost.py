"""Which method of the blur ops is faster here: the direct sum costs kh*kw/s^2 per pixel, the FFT a constant."""

from __future__ import annotations

TAPS_PER_PIXEL = {"cpu": 100.0, "cuda": 100.0}


def prefer_fft(height: int, width: int, kh: int, kw: int, scale: int, device: str) -> bool:
    taps = kh * kw / (scale * scale)
    return taps > TAPS_PER_PIXEL.get(device, 100.0)
