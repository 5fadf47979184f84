"""A model of the kernels: what each launch must move and compute, and the time that predicts on an H200.

    python -m lorun_fast.kernels.model      the table of docs/kernels.md; compiles for sm_90, needs no GPU

Four limits per launch: device memory, L2 to shared memory, shared memory to the tensor cores, the tensor cores. The
last three are per multiprocessor, so their time is stretched to whole waves of programs. Limits overlap; the largest
one, plus a launch, is the prediction. Predictions are lower bounds: latency that nothing hides is not in them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from lorun_fast.kernels._geometry import ceil_div
from lorun_fast.kernels._launch import Launch

LAUNCH = 3e-6  # s


@dataclass(frozen=True)
class Ceilings:
    """What one GPU can do at most, in bytes and operations per second; l2 and shared: into and out of shared memory."""

    name: str
    multiprocessors: int
    memory: float
    tensor: float  # 16-bit products on tensor cores
    cores: float  # strict fp32 products
    l2: float
    shared: float


# H200: copy and product rates were measured elsewhere (docs/kernels.md), l2 is assumed, the rest is clock times width.
# The other two: nine tenths of their data sheets, l2 in proportion to the multiprocessors; good for ranking only.
CEILINGS = {
    80: Ceilings("A100", 108, 1.8e12, 280e12, 17.5e12, 3.6e12, 19.5e12),
    90: Ceilings("H200", 132, 4.3e12, 790e12, 60e12, 5.5e12, 29.6e12),
    100: Ceilings("B200", 148, 7.2e12, 2000e12, 67e12, 6.2e12, 36e12),
}


@dataclass(frozen=True)
class Estimate:
    """Bytes, operations and predicted seconds of one launch."""

    memory: float
    l2: float
    shared: float
    flops: float
    programs: int
    per_sm: int
    gpu: Ceilings = CEILINGS[90]
    strict: bool = False  # fp32 products, which tensor cores do not do

    @property
    def waves(self) -> float:
        return self.programs / (self.gpu.multiprocessors * self.per_sm)

    @property
    def limits(self) -> dict[str, float]:
        """Seconds by each limit."""
        gpu = self.gpu
        stretch = ceil_div(self.programs, gpu.multiprocessors * self.per_sm) / self.waves
        return {
            "memory": self.memory / gpu.memory,
            "L2": stretch * self.l2 / gpu.l2,
            "shared memory": stretch * self.shared / gpu.shared,
            "fp32 cores" if self.strict else "tensor cores": stretch
            * self.flops
            / (gpu.cores if self.strict else gpu.tensor),
        }

    @property
    def seconds(self) -> float:
        return max(self.limits.values()) + LAUNCH

    @property
    def limit(self) -> str:
        return max(self.limits, key=self.limits.get)


def _product(m: int, k: int, n: int, size: int) -> tuple[float, float]:
    """(operations, bytes from shared memory) of one tl.dot: A once, B once per 64 rows, as wgmma reads them."""
    return 2.0 * m * k * n, size * (m * k + ceil_div(m, 64) * k * n)


def _patches(v: dict, size: int, pixels: int, tiles: int, blocks_in: int, base: bool, low: bool):
    """(operations, shared, L2 bytes) of accumulate_taps over ``tiles`` patches."""
    taps, bc, bo, r = v["KH"] * v["KW"], v["BC"], v["BO"], v["R"]
    steps = tiles * taps * blocks_in
    flops = shared = 0.0
    l2 = steps * pixels * bc
    for wanted, n in ((base, bo), (low, r)):
        if wanted:
            f, s = _product(pixels, bc, n, size)
            flops, shared, l2 = flops + steps * f, shared + steps * s, l2 + steps * bc * n
    return flops, shared, size * l2


def _strips(v: dict, size: int, programs: int, rows: int, k: int, inner: int, outer: int):
    """(operations, shared, L2 bytes) of convolve_strip."""
    steps = programs * (rows + k - 1) * k
    flops, shared = _product(v["BW"], inner, outer, size)
    return steps * k * flops, steps * k * shared, size * (steps * v["BW"] * inner + programs * k * k * inner * outer)


def estimate(launch: Launch, n: int, per_sm: int, arch: int = 90) -> Estimate:
    """The estimate of one launch of the convolution kernels for a batch of n, on the GPU of CEILINGS[arch].

    per_sm: programs that share a multiprocessor, from the compiler's report (check.py).
    """
    memory, l2, shared, flops = _demands(launch, n)
    strict = launch.constants.get("PRECISION") == "ieee"
    return Estimate(memory, l2, shared, flops, launch.programs, per_sm, CEILINGS[arch], strict)


def _demands(launch: Launch, n: int) -> tuple[float, float, float, float]:
    """(bytes of memory, of L2, of shared memory, operations) of one launch."""
    v, a = launch.constants, launch.args
    name = launch.kernel.fn.__name__
    if name == "reduce_parts":
        parts = sum(4 * a[key].numel() for key in ("part_down", "part_up", "part_bias") if a[key] is not None)
        return parts, parts, 0, 0
    size = getattr(a["x"], "base", a["x"]).element_size()
    x, y = n * a["H"] * a["W"] * v["C"] * size, n * a["P"] * a["Q"] * v["O"] * size
    if name == "lora_conv2d_taps":
        pixels = v["BH"] * v["BW"]
        inner = ceil_div(v["C"], v["BC"])
        flops, shared, l2 = _patches(v, size, pixels, launch.programs, inner, True, v["RANK"] > 0)
        return x + y * (1 + v["OTHER"]), l2, shared, flops
    if name == "lora_conv2d_rows":
        flops, shared, l2 = _strips(v, size, launch.programs, a["ROWS"], v["K"], v["BC"], v["BO"])
        return x + y * (1 + v["OTHER"]), l2, shared, flops
    t = n * a["P"] * a["Q"] * v["R"] * size if v["RANK"] else 0
    if name == "output_side":
        pixels, blocks = v["BH"] * v["BW"], ceil_div(v["O"], v["BO"])
        tiles, inner = n * a["patches"], ceil_div(v["C"], v["BC"])
        active, known = v["ACT"] is not None, v["KNOWN"]
        again = active and not known
        flops, shared, l2 = _patches(v, size, pixels, tiles * blocks, inner, again, False) if again else (0, 0, 0)
        if v["RANK"]:
            f, s, b = _patches(v, size, pixels, tiles, inner, False, True)
            small = _product(pixels, v["BO"], v["R"], size), _product(v["BO"], pixels, v["R"], size)
            flops += f + tiles * blocks * (small[0][0] + small[1][0])
            shared += s + tiles * blocks * (small[0][1] + small[1][1])
            l2 += b
        return x + y * (1 + active + known) + t, l2 + y * (1 + known), shared, flops
    if name == "output_rows":
        flops, shared, l2 = _strips(v, size, launch.programs, a["ROWS"], v["K"], v["BC"], v["R"])
        steps = launch.programs * (a["ROWS"] + v["K"] - 1)
        for f, s in (_product(v["BW"], v["BO"], v["R"], size), _product(v["BO"], v["BW"], v["R"], size)):
            flops, shared = flops + steps * f, shared + steps * s
        active, known = v["ACT"] is not None, v["KNOWN"]
        return x + y * (1 + active + known) + t, l2 + y * (1 + known), shared, flops
    # input_side: both roles
    if v["STRIPS"]:
        flops, shared, l2 = _strips(v, size, a["image_programs"], a["ROWS"], v["KH"], v["BO"], v["BC"])
    else:
        swapped = v | {"BC": v["BO"], "BO": v["BC"]}
        phases = v["SH"] * v["SW"]
        pixels, inner = v["BH"] * v["BW"], ceil_div(v["O"], v["BO"])
        flops, shared, l2 = _patches(swapped, size, pixels, a["image_programs"], inner, True, False)
        if v["RANK"]:
            f, s, b = _patches(swapped | {"BC": v["R"]}, size, pixels, a["image_programs"], 1, True, False)
            flops, shared, l2 = flops + f, shared + s, l2 + b
        flops, shared, l2 = flops / phases, shared / phases, l2 / phases
    pixels = v["FH"] * v["FW"]
    cells = (launch.programs - a["image_programs"]) // max(1, n * a["splits"])
    tiles = n * a["factor_patches"] * cells
    f, s = _product(v["G"] * v["FR"], pixels, v["FC"], size)
    shifted = n * a["factor_patches"] * ceil_div(v["C"], v["FC"]) * pixels * v["KH"] * v["KW"] * v["FR"]
    l2 += (tiles * pixels * v["FC"] + shifted) * size
    source = t or y
    return x * 2 + y + source * (1 if v["RANK"] else 0), l2, shared + tiles * s, flops + tiles * f


def main() -> None:
    from lorun_fast.kernels import check

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", type=Path, help="rows of check.py --json, instead of compiling again")
    args = parser.parse_args()
    rows = json.loads(args.compiled.read_text()) if args.compiled else []
    compiled = {(row["case"], row["kernel"]): row["per_sm"] for row in rows if row["arch"] == 90}
    print("| layer, bf16 | launch | programs per SM, waves | memory | L2 | shared | tensor | predicted us | measured |")
    print("|---|---|---|---|---|---|---|---|---|")
    for batch in (1, 16):
        for channels in (28, 32, 64, 128, 256):
            plain = check.Problem(channels, batch=batch)
            # An activation changes the first launch only: ReLU reads the output, SiLU computes the convolution again.
            acts = [replace(plain, backward=True, activation=a) for a in ("relu", "silu")]
            for problem in (plain, replace(plain, backward=True), *acts):
                for index, one in enumerate(check.launches(problem, 90)):
                    if problem.activation and index:
                        break
                    kernel = one.kernel.fn.__name__
                    known = compiled.get((replace(problem, batch=16).name, kernel))
                    e = estimate(one, batch, known or check.inspect(problem, index, 90).per_sm)
                    what = f"{kernel} {problem.activation}" if problem.activation else kernel
                    limits = " | ".join(f"{1e6 * t:.1f}" for t in e.limits.values())
                    print(
                        f"| {batch}x{channels}x256x256 | {what} | {e.per_sm}, {e.waves:.2f} "
                        f"| {limits} | **{1e6 * e.seconds:.0f}** ({e.limit}) | not measured |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
