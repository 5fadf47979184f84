"""A sensing operator of your own: magnetic resonance, which samples a few lines of the image's Fourier transform.

    python examples/own_operator.py               # half a minute: trains on drawn ellipses, restores a phantom
    python examples/own_operator.py --gradient    # gradient steps instead of the exact data step
    python examples/own_operator.py --coils 4     # several coils, whose exact data step takes conjugate gradients

Two methods are all that an operator needs. With one coil the proximal step has a closed form, one FFT each way; with
several it has none, and the one that every operator has goes by conjugate gradients, as in MoDL (Aggarwal et al.).
Networks, adapters, saving, optimize() and check_operator() know no more of it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import lorun_fast as lf
from lorun_fast.operators import check_operator, register_operator


@register_operator
class Fourier(lf.SensingOperator):
    """lines (W,): 1 where a column of k-space is measured. x (N, 2, H, W), real and imaginary part; y (N, H, W)."""

    def __init__(self, lines: Tensor):
        super().__init__()
        self.register_buffer("lines", lines)

    def forward(self, x: Tensor) -> Tensor:
        return self.lines * torch.fft.fft2(torch.complex(x[:, 0], x[:, 1]), norm="ortho")

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        image = torch.fft.ifft2(self.lines * y, norm="ortho")
        return torch.stack([image.real, image.imag], 1)

    def prox(self, x: Tensor, y: Tensor, mu: float | Tensor) -> Tensor:
        # Phi^T Phi is diagonal in k-space, with the lines' zeros and ones: what was measured moves towards y.
        mu = mu.reshape(-1, 1, 1) if isinstance(mu, Tensor) else mu
        missing = y - self(x)
        return x + self.adjoint(missing / (1 + mu))


@register_operator
class Coils(lf.SensingOperator):
    """maps (2, coils, H, W): real and imaginary part of what each coil receives. y (N, coils, H, W)."""

    prox_iterations, prox_tolerance = 10, 0.0  # as many for every image, come how far they may

    def __init__(self, maps: Tensor, lines: Tensor):
        super().__init__()
        self.register_buffer("maps", maps)
        self.register_buffer("lines", lines)

    def forward(self, x: Tensor) -> Tensor:
        image = torch.complex(x[:, 0], x[:, 1])[:, None] * torch.complex(*self.maps)
        return self.lines * torch.fft.fft2(image, norm="ortho")

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        image = (torch.fft.ifft2(self.lines * y, norm="ortho") * torch.complex(*self.maps).conj()).sum(1)
        return torch.stack([image.real, image.imag], 1)


def coil_maps(coils: int, size: int) -> Tensor:
    """Coils around the image, each with a phase of its own; their squares add up to 1. (2, coils, size, size)."""
    at, angle = torch.linspace(-1, 1, size), torch.arange(coils) * (6.2832 / coils)
    far = (at[:, None] - angle.sin()[:, None, None]).square() + (at - angle.cos()[:, None, None]).square()
    maps = torch.stack([angle.cos(), angle.sin()])[:, :, None, None] * (-far).exp()
    return maps / maps.square().sum((0, 1)).sqrt()


def sampled(width: int, share: float, generator: torch.Generator) -> Tensor:
    """A random share of the columns, an eighth of all around frequency 0 among them."""
    lines = torch.rand(width, generator=generator) < share
    low = width // 16
    lines[:low] = lines[-low:] = True
    return lines.float()


def ellipses(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Slices of a kind: ellipses on one another, with a smooth phase. (N, 2, size, size)."""
    at = torch.linspace(-1, 1, size)
    y, x = at[:, None], at[None]
    image = torch.zeros(n, size, size)
    for sample in image:
        for k in range(10):
            a, b, cx, cy, angle, grey = torch.rand(6, generator=generator).tolist()
            reach, off = (0.9, 0.1) if k == 0 else (0.4, 0.6)  # the head, and what is in it
            cx, cy, angle = off * (2 * cx - 1), off * (2 * cy - 1), 3.14 * angle
            u = (x - cx) * torch.tensor(angle).cos() + (y - cy) * torch.tensor(angle).sin()
            v = (y - cy) * torch.tensor(angle).cos() - (x - cx) * torch.tensor(angle).sin()
            inside = (u / (0.1 + reach * a)).square() + (v / (0.1 + reach * b)).square() < 1
            sample[inside] = grey
    slope = torch.rand(n, 2, 1, 1, generator=generator) - 0.5
    phase = slope[:, 0] * x + slope[:, 1] * y
    return torch.stack([image * phase.cos(), image * phase.sin()], 1)


def phantom(size: int) -> Tensor:
    """scikit-image's Shepp-Logan phantom, which the network never sees in training. (1, 2, size, size)."""
    from skimage.data import shepp_logan_phantom
    from skimage.transform import resize

    image = torch.from_numpy(resize(shepp_logan_phantom(), (size, size), anti_aliasing=True)).float()
    return torch.stack([image, torch.zeros_like(image)])[None]


def psnr(x: Tensor, truth: Tensor) -> float:
    """Of the magnitudes, dB."""
    error = (x.square().sum(1).sqrt() - truth.square().sum(1).sqrt()).square().mean()
    return float(-10 * error.log10())


def main(argv: list[str] | None = None) -> tuple[float, float]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gradient", action="store_true", help="gradient steps instead of the exact data step")
    p.add_argument("--steps", type=int, default=200, help="of training")
    p.add_argument("--size", type=int, default=64, help="of the square images, a multiple of 16")
    p.add_argument("--share", type=float, default=0.3, help="of the columns that are measured")
    p.add_argument("--coils", type=int, default=1)
    args = p.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    lines = sampled(args.size, args.share, generator)
    op = Fourier(lines) if args.coils == 1 else Coils(coil_maps(args.coils, args.size), lines)
    check_operator(op, (2, 2, args.size, args.size))
    print(f"{int(op.lines.sum())} of {args.size} lines measured")
    # mu = 1.3e-4 / rho^2: conjugate gradients come as far as they should where it is not that small.
    rho = 0.05 if args.coils > 1 and not args.gradient else 1.0
    net = lf.LoRun(
        op, lf.ResUNet(2, 2, (16, 32), 1), stages=5, data_step="gradient" if args.gradient else "prox", step_size=rho
    )
    net.denoiser.freeze_base(False)  # nothing is pretrained here: base and adapters learn together
    images = ellipses(64, args.size, generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    with lf.use_backend("winograd"):  # the fastest convolutions of a CPU in fp32
        for _ in range(args.steps):
            x = images[torch.randint(len(images), (4,), generator=generator)]
            loss = (net(op(x)) - x).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()

    with tempfile.TemporaryDirectory() as folder:
        lf.save(net, Path(folder) / "mri.safetensors")
        net = lf.load(Path(folder) / "mri.safetensors")  # finds the class by its name
    fast = net.optimize()
    truth = phantom(args.size)
    with torch.no_grad():
        y = op(truth)
        scores = psnr(op.initial(y), truth), psnr(fast(y), truth)
    print("Shepp-Logan phantom: {:.2f} dB as measured, {:.2f} dB restored".format(*scores))
    return scores


if __name__ == "__main__":
    main()
