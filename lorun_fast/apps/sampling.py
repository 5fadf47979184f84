"""Random training patches, drawn so that a resumed run sees what an uninterrupted one would have seen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lorun_fast.apps import files, images
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.progress import note, over

T = TypeVar("T")


def find_images(folders: Sequence[Path]) -> list[Path]:
    """All image files below these folders, in a fixed order. Raises UserError for a folder without any."""
    found = []
    for folder in folders:
        below = files.below(folder, images.SUFFIXES)
        if not below:
            raise UserError(f"--data: expected a folder with images below it, got {folder}")
        found += below
    return found


def fingerprint(folders: Sequence[Path], paths: Sequence[Path]) -> str:
    """Of these files and folders of images: their names below ``folders`` and their sizes, so that nothing is read."""
    digest = hashlib.sha256()
    for path in paths:
        for file in files.below(path, images.SUFFIXES) if path.is_dir() else [path]:
            name = next((file.relative_to(f) for f in folders if file.is_relative_to(f)), file.name)
            digest.update(b"%s\0%d\0" % (os.fsencode(name), file.stat().st_size))
    return digest.hexdigest()


def held_out(items: Sequence[T], most: int) -> tuple[list[T], list[T]]:
    """(validation, training): at most ``most`` and a tenth of the items, spread evenly, and the others.

    What is held out only draws the curve; no checkpoint is chosen by it.
    """
    count = max(1, min(most, len(items) // 10))
    chosen = range(0, len(items), max(1, len(items) // count))[:count]
    return [items[i] for i in chosen], [item for i, item in enumerate(items) if i not in chosen]


def load_gray(paths: Sequence[Path], smallest: int) -> list[np.ndarray]:
    """Luma images as uint8 (H, W); those smaller than ``smallest`` on a side are left out with a note."""
    pixels = (np.rint(images.load(path, "y")[0] * 255).astype(np.uint8) for path in over(paths, "reading images"))
    return _large_enough(paths, pixels, smallest)


def load_colour(paths: Sequence[Path], smallest: int) -> list[np.ndarray]:
    """Images as uint8 (H, W, 3), the three channels of a gray one equal; small ones are left out as by load_gray."""
    pixels = (np.rint(images.load(path, "channels") * 255).astype(np.uint8) for path in over(paths, "reading images"))
    shown = (p.transpose(1, 2, 0) for p in pixels)
    return _large_enough(paths, (np.broadcast_to(p, (*p.shape[:2], 3)) for p in shown), smallest)


def _large_enough(paths: Sequence[Path], pixels: Iterable[np.ndarray], smallest: int) -> list[np.ndarray]:
    found, small = [], []
    for path, image in zip(paths, pixels, strict=True):
        if min(image.shape[:2]) < smallest:
            small.append(path.name)
        else:
            found.append(image)
    if small:
        names = ", ".join(small[:3]) + (", ..." if len(small) > 3 else "")
        note(f"--data: left out {len(small)} images smaller than {smallest}x{smallest} pixels: {names}")
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
