"""Measurements in, images out: batches of one size through a network, timed."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import Runtime
from lorun_fast.network import LoRun
from lorun_fast.operators import SensingOperator
from lorun_fast.optimize import fastest_convolutions, optimize


def batches(keys: Sequence[Hashable], batch: int) -> Iterator[list[int]]:
    """Indices of equal keys, at most ``batch`` at a time, groups in the order of their first member."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for members in groups.values():
        for start in range(0, len(members), batch):
            yield members[start : start + batch]


def noise_source(seed: int, image: int) -> np.random.Generator:
    """Of one image, by its place among the inputs: the noise depends on no batch and no command."""
    return np.random.default_rng((seed, image))


def prepared(net: LoRun, runtime: Runtime) -> LoRun:
    """The network as it restores fastest: mostly what ``net.optimize()`` makes of it.

    In bf16 on a GPU and where the CPU has kernels for it; elsewhere autocast takes as long and rounds less. A GPU
    records sizes that come a second time.
    """
    device, dtype = runtime.device, runtime.dtype
    if device.type == "cpu" and dtype != torch.float32 and fastest_convolutions(dtype, device)[0] == "direct":
        return net
    return optimize(net, dtype=runtime.dtype, record_after=1)


@torch.inference_mode()
def measure(
    op: SensingOperator,
    x: np.ndarray,
    noise: float,
    rng: np.random.Generator,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """y = Phi x + noise in fp32. x (N, C, H, W) in [0, 1]; noise: standard deviation; device: the operator's."""
    y = op(torch.from_numpy(x).to(device)).cpu().numpy()
    return y + np.float32(noise) * rng.standard_normal(y.shape, dtype=np.float32) if noise else y


@torch.inference_mode()
def start(net: LoRun, y: np.ndarray, size: tuple[int, int] | None, runtime: Runtime) -> np.ndarray:
    """x_0, what the stages start from: (N, C, H, W) fp32."""
    return net.op.initial(torch.from_numpy(y).to(runtime.device), size).cpu().numpy()


@torch.inference_mode()
def restore(
    net: LoRun,
    y: np.ndarray,
    size: tuple[int, int] | None,
    runtime: Runtime,
    *,
    op: SensingOperator | None = None,
    sigma: float | None = None,
) -> tuple[np.ndarray, float]:
    """x_K as (N, C, H, W) fp32, and the seconds from y in host memory to x_K in host memory.

    op: another operator than the network's. sigma: noise level, for a network that takes one.
    """
    runtime.synchronize()
    began = time.perf_counter()
    with torch.autocast(runtime.device.type, runtime.dtype, enabled=runtime.dtype != torch.float32):
        x: Tensor = net(torch.from_numpy(y).to(runtime.device), op=op, size=size, sigma=sigma)
    image = x.float().cpu().numpy()
    seconds = time.perf_counter() - began
    if not np.isfinite(image).all():
        raise UserError("expected finite images, got NaN or infinite values: do the network's weights hold any?")
    return image, seconds
