"""Random training patches, drawn so that a resumed run sees what an uninterrupted one would have seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorun_fast.apps import images
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.progress import over


def find_images(folders: Sequence[Path]) -> list[Path]:
    """All image files below these folders, in a fixed order. Raises UserError for a folder without any."""
    found = []
    for folder in folders:
        below = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in images.SUFFIXES)
        if not below:
            raise UserError(f"--data: expected a folder with images below it, got {folder}")
        found += below
    return found


def held_out(paths: Sequence[Path], most: int) -> tuple[list[Path], list[Path]]:
    """(validation, training): at most ``most`` and a tenth of the files, spread evenly, and the others.

    The held-out images only draw the curve; no checkpoint is chosen by them.
    """
    count = max(1, min(most, len(paths) // 10))
    chosen = set(paths[:: max(1, len(paths) // count)][:count])
    return [p for p in paths if p in chosen], [p for p in paths if p not in chosen]


def load_gray(paths: Sequence[Path], smallest: int) -> list[np.ndarray]:
    """Luma images as uint8 (H, W); those smaller than ``smallest`` on a side are left out."""
    gray = [np.rint(images.load(path, "y")[0] * 255).astype(np.uint8) for path in over(paths, "reading images")]
    return [image for image in gray if min(image.shape) >= smallest]


def load_colour(paths: Sequence[Path], smallest: int) -> list[np.ndarray]:
    """Images as uint8 (H, W, 3), the three channels of a gray one equal; small ones are left out as by load_gray."""
    found = []
    for path in over(paths, "reading images"):
        pixels = np.rint(images.load(path, "channels") * 255).astype(np.uint8).transpose(1, 2, 0)
        if min(pixels.shape[:2]) >= smallest:
            found.append(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    return found


class PatchSampler:
    """Square patches with flips and quarter turns, the batch of a step being a function of (seed, step) alone.

    Images are drawn with a probability that grows with their area, so that every pixel counts alike.
    """

    def __init__(self, pixels: Sequence[np.ndarray], patch: int, batch: int, seed: int):
        if not pixels:
            raise UserError(f"--data: expected at least two images of at least {patch}x{patch} pixels, got too few")
        self.images, self.patch, self.batch, self.seed = list(pixels), patch, batch, seed
        area = np.array([image.shape[0] * image.shape[1] for image in self.images], dtype=np.float64)
        self.weight = area / area.sum()

    def __call__(self, step: int) -> Tensor:
        """(batch, 1 or 3, patch, patch) in [0, 1]."""
        rng = np.random.default_rng((self.seed, step))
        patches = []
        for index in rng.choice(len(self.images), self.batch, p=self.weight):
            image, size = self.images[index], self.patch
            top = rng.integers(image.shape[0] - size + 1)
            left = rng.integers(image.shape[1] - size + 1)
            patch = np.rot90(image[top : top + size, left : left + size], rng.integers(4))
            patches.append(patch[:, ::-1] if rng.integers(2) else patch)
        pixels = np.stack(patches)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32) / 255)
