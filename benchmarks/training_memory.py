"""python -m benchmarks.training_memory: peak memory and time of whole training steps, LoRA against untied stages.

Unlike the suite's memory column, which is one forward and backward pass, this counts all that training holds: weights,
gradients, both moments of AdamW, activations. Every variant starts from the same weights and data.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import functools
import gc
import sys
import time
from pathlib import Path

import torch
from torch import nn

import lorun_fast as lf
from benchmarks.harness import allocator, machine
from benchmarks.harness.memory import reset_peak, resident

STAGES, BATCH, PIXELS = 9, 8, 96


def clock() -> float:
    """Seconds: of the wall on a GPU, of all threads on a CPU, which other programs on the machine change less."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


# name -> (sharing, stages recomputed in the backward pass)
VARIANTS = {
    "untied": ("untied", 0),
    "tied": ("tied", 0),
    "LoRA": ("lora", 0),
    "LoRA, 2 stages recomputed": ("lora", 2),
    "LoRA, 3 stages recomputed": ("lora", 3),
    "LoRA, 5 stages recomputed": ("lora", 5),
    "LoRA, all stages recomputed": ("lora", True),
}


def build(denoiser: nn.Module, op: lf.BlockCS, sharing: str, recomputed: bool | int, form: str) -> lf.LoRun:
    torch.manual_seed(1)
    net = lf.LoRun(copy.deepcopy(op), denoiser, STAGES, sharing=sharing, form=form, checkpoint=recomputed)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.02)
    return net.train()


def step(net: lf.LoRun, optimizer: torch.optim.Optimizer, x: torch.Tensor, bf16: bool) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        loss = (net(net.op(x)) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(make, x: torch.Tensor, steps: int, bf16: bool) -> tuple[int, float]:
    """(bytes, seconds of the fastest step): what the network adds to the process at its peak, and time after the first.

    On CUDA the allocator's peak; on a CPU that of the resident set, every freed block going back to the system.
    """
    cuda = x.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        allocator.apply("return")
        before = resident("VmRSS")
        reset_peak()
    net = make().to(x.device)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-6)
    seconds = []
    for _ in range(steps + 1):
        began = clock()
        step(net, optimizer, x, bf16)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return peak - before, min(seconds[1:])


def gradients_agree(denoiser: nn.Module, op: lf.BlockCS, x: torch.Tensor, form: str) -> float:
    """Largest difference between gradients with and without recomputation, relative to the largest gradient."""
    grads = []
    for recomputed in (False, True):
        net = build(denoiser, op, "lora", recomputed, form).to(x.device)
        (net(net.op(x)) - x).square().mean().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    worst = max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True))
    return worst / max(float(g.abs().max()) for g in grads[0])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.training_memory", description=__doc__)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 64], help="of the residual U-Net")
    p.add_argument("--form", choices=("loralib", "peft"), default="loralib")
    p.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    p.add_argument("--steps", type=int, default=2, help="timed steps (default 2)")
    p.add_argument("--only", nargs="+", choices=tuple(VARIANTS), help="these variants, untied first")
    p.add_argument("--out", type=Path, metavar="DIR", help="also write a CSV file there")
    args = p.parse_args(argv)
    torch.manual_seed(0)
    denoiser, op = lf.ResUNet(channels=args.channels), lf.BlockCS.gaussian(0.25, 32)
    x = torch.rand(BATCH, 1, PIXELS, PIXELS, device=args.device)
    op = op.to(x.device)
    rows = []
    for name in args.only or VARIANTS:
        sharing, recomputed = VARIANTS[name]
        make = functools.partial(build, denoiser, op, sharing, recomputed, args.form)
        peak, seconds = measure(make, x, args.steps, args.bf16)
        rows.append({"variant": name, "peak_mib": round(peak / 2**20, 1), "seconds_per_step": round(seconds, 3)})
        first = rows[0]
        rows[-1] |= {
            "memory_ratio": round(rows[-1]["peak_mib"] / first["peak_mib"], 3),
            "time_ratio": round(rows[-1]["seconds_per_step"] / first["seconds_per_step"], 3),
        }
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(f"gradients with and without recomputation differ by {gradients_agree(denoiser, op, x, args.form):.1e}")
    if args.out is not None:
        facts = {
            "channels": "-".join(map(str, args.channels)), "form": args.form, "dtype": "bf16" if args.bf16 else "fp32",
            "stages": STAGES, "batch": BATCH, "pixels": PIXELS, "torch": torch.__version__,
            "device": machine.device_name(x.device),
        }  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"training-memory-{args.device}-{datetime.datetime.now():%Y%m%d-%H%M%S}.csv"
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, [*rows[0], *facts])
            writer.writeheader()
            writer.writerows(row | facts for row in rows)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
