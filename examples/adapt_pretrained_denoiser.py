"""A pretrained denoiser learns further noise levels: its weights stay, each level gets an adapter.

    python examples/adapt_pretrained_denoiser.py            # a small denoiser, trained here first
    python examples/adapt_pretrained_denoiser.py --deepinv  # deepinv's DnCNN as the base

The denoiser is a plain module that knows nothing of stages. One batch holds samples of all levels: the stage is a
tensor with one entry per sample.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import lorun_fast as lf

LEVELS = torch.tensor([0.05, 0.1, 0.3])
PRETRAINED_ON = 0.1


def pictures(n: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Rectangles of random grey on one another: edges and flat parts, and nothing to download."""
    images = torch.rand(n, 1, 1, 1, generator=generator).expand(n, 1, size, size).clone()
    for image in images:
        for _ in range(12):
            top, left, height, width = (torch.rand(4, generator=generator) * size).long().tolist()
            image[:, top : top + height, left : left + width] = torch.rand(1, generator=generator)
    return images


class DnCNN(nn.Module):
    """Convolutions, norms and a skip, as in torchvision's style: what a user has on disk."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, x, sigma=None):
        return x - self.layers(x)


def fit(parameters, loss, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(list(parameters), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()


def psnr(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float(-10 * (x - truth).square().mean((1, 2, 3)).log10().mean())


def main(argv: list[str] | None = None) -> list[tuple[float, float, float]]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--deepinv", action="store_true", help="deepinv's DnCNN as the base")
    p.add_argument("--steps", type=int, default=300, help="of each of the two trainings")
    p.add_argument("--size", type=int, default=40, help="of the training pictures")
    args = p.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    if args.deepinv:
        denoiser = lf.interop.deepinv.deepinv.models.DnCNN(1, 1, depth=5, nf=24, pretrained=None)
    else:
        denoiser = DnCNN()
    clean = pictures(48, args.size, generator)

    def batch(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = clean[torch.randint(len(clean), (len(levels),), generator=generator)]
        return x, x + levels[:, None, None, None] * torch.randn(x.shape, generator=generator)

    def pretraining():
        x, noisy = batch(torch.full((12,), PRETRAINED_ON))
        return (denoiser(noisy, PRETRAINED_ON) - x).square().mean()

    fit(denoiser.parameters(), pretraining, args.steps, 3e-3)
    denoiser.eval()  # norms keep their statistics from here on

    staged = lf.adapt(denoiser, stages=len(LEVELS), gamma=20)

    def adapting():
        stage = torch.arange(12) % len(LEVELS)
        x, noisy = batch(LEVELS[stage])
        # An error counts by what its level lets expect: else the noisiest level alone is learned.
        weight = 1 / LEVELS[stage][:, None, None, None]
        return (weight * (staged(noisy, stage=stage, sigma=PRETRAINED_ON) - x)).square().mean()

    fit(staged.adapter_parameters(), adapting, args.steps, 1e-2)
    staged.merge()

    test = pictures(16, 64, torch.Generator().manual_seed(1))
    rows = []
    print(f"{'noise':>6}  {'noisy':>6}  {'base':>6}  adapted  (PSNR, dB)")
    with torch.no_grad():
        for k, level in enumerate(LEVELS):
            noisy = test + level * torch.randn(test.shape, generator=torch.Generator().manual_seed(2))
            scores = [noisy, denoiser(noisy, PRETRAINED_ON), staged(noisy, stage=k, sigma=PRETRAINED_ON)]
            rows.append(tuple(psnr(x, test) for x in scores))
            print(f"{level:>6.2f}  " + "  ".join(f"{score:>6.2f}" for score in rows[-1]))
    report = staged.parameter_report()
    print(f"adapter of one level: {100 * report.per_stage / report.base:.0f} % of the base's parameters")
    return rows


if __name__ == "__main__":
    main()
