"""Spectral scenes to train on: held as integers, cropped and interpolated to the wanted wavelengths on demand.

Two kinds of files are read: what cubes.py reads (a cube in a .mat, .npy or .npz file, or a folder of band images),
and ``*.npy.xz`` beside a meta.json: 8-bit square roots, differences between bands, xz. Decoded, 24 scenes of 512 x 512
with 21 bands take 0.13 GB; as float32 with 28 wavelengths they would take 0.7 GB, and the 205 scenes of 1024 x 1024 of
the usual training set 24 GB.
"""

from __future__ import annotations

import json
import lzma
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from lorun_fast.apps.errors import UserError, first_line

_LEVELS = 65535


def resampling(source_nm: np.ndarray, target_nm: np.ndarray) -> np.ndarray:
    """(targets, sources): linear interpolation between neighbouring bands; beyond the ends the last band holds."""
    return np.stack([np.interp(target_nm, source_nm, unit) for unit in np.eye(len(source_nm))], 1).astype(np.float32)


def _mixed(matrix: np.ndarray, bands: np.ndarray) -> np.ndarray:
    """matrix @ bands, of the few weights a row that interpolation has: a fifth of a matrix product's time, and no BLAS,
    for whose threads batches drawn in several would wait.
    """
    out = np.empty((len(matrix), *bands.shape[1:]), np.float32)
    for weights, to in zip(matrix, out, strict=True):
        first, *others = np.flatnonzero(weights)
        np.multiply(bands[first], weights[first], out=to)
        for band in others:
            to += weights[band] * bands[band]
    return out


@dataclass(frozen=True)
class Scene:
    """One cube (L, H, W) of integers. values: what the integers stand for; matrix: bands to wavelengths, or None."""

    codes: np.ndarray
    values: np.ndarray
    matrix: np.ndarray | None = None

    @property
    def height(self) -> int:
        return self.codes.shape[1]

    @property
    def width(self) -> int:
        return self.codes.shape[2]

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(L, height, width) float32."""
        part = np.take(self.values, self.codes[:, top : top + height, left : left + width])
        return part if self.matrix is None else _mixed(self.matrix, part)


def quantised(cube: np.ndarray) -> Scene:
    """A cube of numbers >= 0 as 16-bit levels of its own largest value."""
    peak = float(cube.max()) or 1.0
    codes = np.rint(np.clip(cube, 0, None) * (_LEVELS / peak)).astype(np.uint16)
    return Scene(codes, (np.arange(_LEVELS + 1) * (peak / _LEVELS)).astype(np.float32))


def companded(path: Path, wavelengths: np.ndarray) -> Scene:
    """A ``*.npy.xz`` file, as the meta.json beside it or one folder up describes it."""
    meta_path = next((p for p in (path.parent / "meta.json", path.parent.parent / "meta.json") if p.is_file()), None)
    if meta_path is None:
        raise UserError(f"expected a meta.json beside {path} or one folder up, got none")
    name = path.name.removesuffix(".npy.xz")
    try:
        meta = json.loads(meta_path.read_text())
        bands, peak = np.array(meta["bands_nm"], float), float(meta["scenes"][name]["peak"])
        with lzma.open(path) as f:
            codes = np.cumsum(np.load(f, allow_pickle=False), axis=0, dtype=np.uint8)
    except (OSError, ValueError, KeyError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"expected a scene that {meta_path} describes, got {path}: {first_line(error)}") from error
    if codes.ndim != 3 or len(codes) != len(bands):
        raise UserError(f"{path}: expected {len(bands)} bands (L, H, W) as in {meta_path}, got {codes.shape}")
    values = ((np.arange(256) / 255) ** 2 * peak).astype(np.float32)
    return Scene(codes, values, resampling(bands, wavelengths))


class Library:
    """Scenes by index, read when first asked for; the least recently used leave when ``memory`` bytes are full."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Scene], memory: int):
        self.paths, self.read, self.memory = list(paths), read, memory
        self._held: OrderedDict[int, Scene] = OrderedDict()
        self._lock = Lock()  # batches are drawn in several threads
        self._room: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Scene:
        with self._lock:
            if index not in self._held:
                scene = self.read(self.paths[index])
                held = sum(s.codes.nbytes for s in self._held.values())
                while self._held and held + scene.codes.nbytes > self.memory:
                    held -= self._held.popitem(last=False)[1].codes.nbytes
                self._held[index] = scene
            self._held.move_to_end(index)
            return self._held[index]

    def room(self) -> int:
        """How many scenes of the first one's size fit the memory."""
        if self._room is None:
            self._room = max(1, self.memory // self[0].codes.nbytes)
        return self._room


class CropSampler:
    """Crops with flips and quarter turns, some of them mosaics of four; a function of (seed, step) alone.

    Where not all scenes fit the memory, each run of ``window`` steps draws from as many as do, so that a scene is
    read once a window and not once a crop. Raises UserError for scenes too small: for the first one when it is made.
    """

    def __init__(
        self, source: Library, size: tuple[int, int], batch: int, seed: int, mosaic: float = 0.25, window: int = 200
    ):
        self.source, self.size, self.batch, self.seed = source, size, batch, seed
        self.mosaic, self.window = mosaic, window
        # What a turned crop would meet at some step is said at once, of the scene that room() reads anyway.
        longest = max(size) if mosaic < 1 else (max(size) + 1) // 2
        self._check_holds(source[0], longest, longest)

    @staticmethod
    def _check_holds(scene: Scene, height: int, width: int) -> None:
        if scene.height < height or scene.width < width:
            raise UserError(
                f"--data: expected scenes of at least {height} x {width} pixels, got {scene.height} x {scene.width}"
            )

    def _choice(self, step: int) -> np.ndarray:
        count, room = len(self.source), self.source.room()
        if room >= count:
            return np.arange(count)
        return np.random.default_rng((self.seed, step // self.window, 2)).choice(count, room, replace=False)

    def _crop(self, rng: np.random.Generator, scenes: np.ndarray, height: int, width: int) -> np.ndarray:
        scene = self.source[int(rng.choice(scenes))]
        turns = int(rng.integers(4))
        tall, wide = (width, height) if turns % 2 else (height, width)
        self._check_holds(scene, tall, wide)
        top, left = rng.integers(scene.height - tall + 1), rng.integers(scene.width - wide + 1)
        crop = np.rot90(scene.crop(top, left, tall, wide), turns, (1, 2))
        return crop[:, :, ::-1] if rng.integers(2) else crop

    def __call__(self, step: int) -> np.ndarray:
        """(batch, L, height, width) float32."""
        rng, scenes = np.random.default_rng((self.seed, step)), self._choice(step)
        height, width = self.size
        crops = []
        for _ in range(self.batch):
            if rng.random() >= self.mosaic:
                crops.append(self._crop(rng, scenes, height, width))
                continue
            rows, columns = (height // 2, height - height // 2), (width // 2, width - width // 2)
            crops.append(
                np.concatenate([np.concatenate([self._crop(rng, scenes, h, w) for w in columns], 2) for h in rows], 1)
            )
        return np.ascontiguousarray(np.stack(crops), np.float32)
