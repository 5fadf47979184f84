"""A network compiled ahead of time: torch.export and AOTInductor here, run from a fresh process.

    python examples/export_and_run.py                    # a tiny network, some seconds
    python examples/export_and_run.py --model cs-25 --size 256

The package holds plain convolutions with merged weights and the sensing operator's ops; the process that runs it
imports lorun_fast for those, and builds no network. For one that cannot import it, lorun_fast.interop.export makes a
program of torch's own ops, and lorun_fast.interop.onnx an ONNX file: docs/export.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import lorun_fast as lf

# The code around the kernels calls them once a stage: compiling it fast matters more than running it fast.
COMPILE = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
RUN = """
import sys
import torch
import lorun_fast  # registers the sensing operator's ops

package, y, out = sys.argv[1:]
network = torch._inductor.aoti_load_package(package)
torch.save(network(torch.load(y), size=[int(s) for s in open(y + ".size").read().split()]), out)
"""


def tiny() -> lf.LoRun:
    """Two stages of a small denoiser, with adapters as after training."""
    denoiser = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), denoiser, stages=2)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.05)
    return net.eval()


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a shipped network or a file instead of the tiny one")
    p.add_argument("--size", type=int, default=32, help="of the square image (default 32)")
    args = p.parse_args(argv)
    net = tiny() if args.model is None else lf.load_pretrained(args.model)
    # Not what suits this CPU best: a package may run on another.
    fast = net.optimize(dtype=torch.float32, convolutions="direct")
    size = (args.size, args.size)
    y = net.op(torch.rand(1, 1, *size))

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        package, data, out = (str(Path(folder) / name) for name in ("network.pt2", "y.pt", "x.pt"))
        program = torch.export.export(fast, (y,), {"size": size})
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=COMPILE)
        torch.save(y, data)
        Path(data + ".size").write_text(" ".join(map(str, size)))
        subprocess.run([sys.executable, "-c", RUN, package, data, out], check=True)
        x = torch.load(out)
        print(f"package: {Path(package).stat().st_size / 2**20:.1f} MiB")
        print(f"largest difference to the network here: {(x - net(y, size=size)).abs().max():.1e}")


if __name__ == "__main__":
    main()
