"""Training in two phases: a single block, then its frozen base with an adapter set and a step size per stage.

Batches and learning rates are functions of the step, and a checkpoint holds everything else, so a run that is
killed at any moment and started again gives the numbers of one that was not.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import resource
import time
from pathlib import Path

import torch
from torch import nn

from lorun_fast import io
from lorun_fast.apps.tasks import cs_training
from lorun_fast.network import LoRun

_COLUMNS = ("phase", "step", "loss", "gradient_norm", "learning_rate", "validation_psnr_db", "seconds")
_RECIPES = {"cs": cs_training.CSTraining}
# What may change between two starts of one run: nothing that the numbers depend on.
_FREE = ("resume", "checkpoint_every", "threads", "stop_after", "func", "command", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast train``."""
    parser.add_argument("task", choices=sorted(_RECIPES))
    parser.add_argument("--data", nargs="+", required=True, help="folders of training images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--init", type=Path, help="a run folder whose phase 1 to start from instead of training one")
    parser.add_argument("--stages", type=int, default=9, help="K (default 9)")
    parser.add_argument("--gamma", type=float, default=10, help="rank in percent of min(in, out) (default 10)")
    parser.add_argument("--form", choices=("loralib", "peft"), default="loralib")
    parser.add_argument("--sharing", choices=("lora", "tied", "untied"), default="lora")
    parser.add_argument("--base-steps", type=int, default=3000, help="steps of phase 1 (default 3000)")
    parser.add_argument("--steps", type=int, default=4000, help="steps of phase 2 (default 4000)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--operator-lr", type=float, default=3e-4, help="of a learned operator (default 3e-4)")
    parser.add_argument("--warm-up", type=int, default=100, help="steps of linear warm-up (default 100)")
    parser.add_argument("--clip", type=float, default=0.1, help="gradient norm above which it is scaled (default 0.1)")
    parser.add_argument(
        "--pretrain-unroll", type=int, default=4, help="own passes that phase 1 learns from (default 4)"
    )
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations per stage to save memory")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the denoiser (autocast)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=int, default=250, help="steps between validations (default 250)")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints (default 100)")
    parser.add_argument("--stop-after", type=int, help="stop after this many steps of this start, to resume later")
    cs_training.add_arguments(parser)


def learning_rate_factor(step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _write_atomically(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _optimizer(net: LoRun, args: argparse.Namespace) -> torch.optim.Optimizer:
    operator = [p for p in net.op.parameters() if p.requires_grad]
    own = {id(p) for p in operator}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in own]
    groups = [{"params": rest, "peak": args.lr}]
    if operator:
        groups.append({"params": operator, "peak": args.operator_lr})
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Run:
    """One run folder: config.json, log.csv, checkpoint.pt and base.safetensors while it runs, at its end also
    model.safetensors, summary.json and curve.png.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder: Path = args.output
        self.device = torch.device(args.device)
        self.settings = {k: _plain(v) for k, v in sorted(vars(args).items()) if k not in _FREE}
        self.recipe = _RECIPES[args.task](args)
        self.taken = 0
        self.started = time.perf_counter()

    def open(self) -> dict | None:
        """Creates the folder, or reads its checkpoint; refuses to mix two runs."""
        config, state = self.folder / "config.json", self.folder / "checkpoint.pt"
        if not self.args.resume:
            if config.exists():
                raise ValueError(f"{self.folder}: expected a new folder, got one that holds a run: add --resume")
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(config, lambda p: p.write_text(json.dumps(self.settings, indent=1)))
            return None
        if not config.exists():
            raise ValueError(f"{self.folder}: expected a run to resume, found no config.json")
        before = json.loads(config.read_text())
        changed = [k for k in self.settings if before.get(k) != self.settings[k]]
        if changed:
            what = ", ".join(f"{k} was {before.get(k)!r} and is {self.settings[k]!r}" for k in changed)
            raise ValueError(f"{self.folder}: expected the settings of the run, but {what}")
        return torch.load(state, map_location=self.device, weights_only=True) if state.exists() else None

    def phase(self, name: str, net: LoRun, steps: int, resume: dict | None) -> bool:
        """Trains ``net`` in place; False if --stop-after ended it."""
        args, device = self.args, self.device
        net.to(device).train()
        optimizer = _optimizer(net, args)
        first, seconds = 0, 0.0
        total_loss, counted = 0.0, 0
        if resume is not None:
            net.load_state_dict(resume["net"])
            optimizer.load_state_dict(resume["optimizer"])
            first, seconds = resume["step"], resume["seconds"]
            total_loss, counted = resume["total_loss"], resume["counted"]
        self._truncate_log(name, first)
        clock = time.perf_counter() - seconds
        offset = 0 if name == "base" else 10_000_000  # the two phases draw different batches
        trainable = [p for group in optimizer.param_groups for p in group["params"]]

        def save(step: int) -> None:
            state = {
                "phase": name,
                "step": step,
                "seconds": time.perf_counter() - clock,
                "total_loss": total_loss,
                "counted": counted,
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            _write_atomically(self.folder / "checkpoint.pt", lambda p: torch.save(state, p))

        for step in range(first, steps):
            if args.stop_after is not None and self.taken >= args.stop_after:
                save(step)
                return False
            factor = learning_rate_factor(step, steps, args.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss = self.recipe.loss(net, offset + step, device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trainable, args.clip)
            # A batch whose gradient overflows is left out instead of poisoning the optimizer's state.
            if torch.isfinite(norm):
                optimizer.step()
            total_loss, counted, self.taken = total_loss + loss.item(), counted + 1, self.taken + 1
            done = step + 1
            if done % args.validate_every == 0 or done == steps:
                net.eval()
                with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                    score = self.recipe.score(net, device)
                net.train()
                row = (name, done, total_loss / counted, norm.item(), args.lr * factor, score)
                self._log(row, time.perf_counter() - clock)
                total_loss, counted = 0.0, 0
                save(done)
            elif done % args.checkpoint_every == 0:
                save(done)
        return True

    def _truncate_log(self, phase: str, step: int) -> None:
        """Drops rows that a killed run wrote after its last checkpoint."""
        path = self.folder / "log.csv"
        if not path.exists():
            path.write_text(",".join(_COLUMNS) + "\n")
            return
        with path.open() as f:
            rows = list(csv.DictReader(f))
        keep = [
            r
            for r in rows
            if (r["phase"] == "base") > (phase == "base") or (r["phase"] == phase and int(r["step"]) <= step)
        ]

        def write(p: Path) -> None:
            with p.open("w", newline="") as f:
                writer = csv.DictWriter(f, _COLUMNS)
                writer.writeheader()
                writer.writerows(keep)

        _write_atomically(path, write)

    def _log(self, row: tuple, seconds: float) -> None:
        phase, step, loss, norm, lr, score = row
        with (self.folder / "log.csv").open("a", newline="") as f:
            csv.writer(f).writerow(
                (phase, step, f"{loss:.6e}", f"{norm:.4e}", f"{lr:.3e}", f"{score:.4f}", f"{seconds:.1f}")
            )
        print(
            f"{phase:>6} step {step:6d}  loss {loss:.3e}  gradient {norm:.2e}"
            f"  validation {score:.3f} dB  {seconds:7.0f} s",
            flush=True,
        )

    def finish(self, net: LoRun, seconds: dict[str, float]) -> None:
        summary = {
            "parameters": str(net.parameter_report()),
            "seconds": seconds,
            "peak_memory_gib": round(_peak_memory_gib(self.device), 3),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "step_size": net.step_size.tolist(),
            "settings": self.settings,
        }
        io.save(net, self.folder / "model.safetensors", notes={"training": {**summary, "parameters": None}})
        _write_atomically(self.folder / "summary.json", lambda p: p.write_text(json.dumps(summary, indent=1)))
        _plot(self.folder / "log.csv", self.folder / "curve.png")


def _plain(value):
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _plot(log: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with log.open() as f:
        rows = list(csv.DictReader(f))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for phase in dict.fromkeys(r["phase"] for r in rows):
        mine = [r for r in rows if r["phase"] == phase]
        minutes = [float(r["seconds"]) / 60 for r in mine]
        axes[0].semilogy(minutes, [float(r["loss"]) for r in mine], label=phase)
        axes[1].plot(minutes, [float(r["validation_psnr_db"]) for r in mine], label=phase)
    axes[0].set(xlabel="minutes", ylabel="training loss (MSE)")
    axes[1].set(xlabel="minutes", ylabel="validation PSNR (dB)")
    axes[1].legend()
    _write_atomically(picture, lambda p: figure.savefig(p, dpi=120, format="png"))
    plt.close(figure)


def run(args: argparse.Namespace) -> int:
    """Runs ``lorun-fast train``; the exit status is 0 also when --stop-after ended it."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training = Run(args)
    state = training.open()
    seconds: dict[str, float] = {}
    torch.manual_seed(args.seed)
    base = training.recipe.base()
    base_file = args.init / "base.safetensors" if args.init else training.folder / "base.safetensors"
    if state is None or state["phase"] == "base":
        if args.init is None:
            if not training.phase("base", base, args.base_steps, state):
                return 0
            io.save(base, base_file)
        state = None
    base.load_state_dict(io.load(base_file).state_dict())
    torch.manual_seed(args.seed + 1)
    net = training.recipe.staged(base)
    if not training.phase("stages", net, args.steps, state):
        return 0
    with (training.folder / "log.csv").open() as f:
        for row in csv.DictReader(f):
            seconds[row["phase"]] = float(row["seconds"])
    training.finish(net, seconds)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lorun-fast train", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
