"""Training in two phases: a single block, then its frozen base with an adapter set and a step size per stage.

Batches and learning rates are functions of the step, and a checkpoint holds everything else, so a run that is
killed at any moment and started again gives the numbers of one that was not.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import json
import math
import os
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lorun_fast import _native
from lorun_fast.apps import background, models, runtime, tasks
from lorun_fast.apps.batches import Batch
from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.apps.files import make_folder, replacing, writing
from lorun_fast.apps.progress import bar
from lorun_fast.apps.runtime import at_least_one, none_or_more, not_negative, percentage, seed
from lorun_fast.apps.sampling import fingerprint
from lorun_fast.apps.training_step import RecordedStep, Step
from lorun_fast.io import save
from lorun_fast.network import LoRun, falling_step_sizes
from lorun_fast.ops._backends import use_backend
from lorun_fast.optimize import fastest_convolutions

_COLUMNS = ("phase", "step", "loss", "gradient_norm", "learning_rate", "validation_psnr_db", "seconds")
# What may change between two starts of one run: nothing that the numbers depend on.
_FREE = ("resume", "checkpoint_every", "threads", "stop_after", "cuda_graph", "func", "command", "output")
# Settings that name files, which are the same from every folder.
_PATHS = ("data", "init", "mask", "warm_start")
_DATA_FILES = "data_files"  # the setting that tells changed training data apart
_RESUME = "resume"
# Threads that draw batches for a GPU: one takes as long for some as the step that they are for.
_DRAWING = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``lorun-fast train TASK``, with the options of all runs and those of the task."""
    choices = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for task in tasks.NAMES:
        line = f"train a network for {tasks.TITLES[task]}"
        one = choices.add_parser(task, help=line, description=line)
        _add_common_arguments(one)
        tasks.recipe(task).add_arguments(one)
    line = "go on with a run that was stopped or killed, by its own settings"
    one = choices.add_parser(_RESUME, help=line, description=line)
    one.add_argument("output", type=Path, metavar="RUN", help="folder of the run")
    _add_free_arguments(one)


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", nargs="+", type=Path, required=True, metavar="DIR", help="folders of training data")
    add("-o", "--output", type=Path, required=True, metavar="RUN", help="folder of the run")
    add("--resume", action="store_true", help="continue the run in the output folder, which must have these settings")
    add(
        "--init",
        type=Path,
        metavar="RUN|NAME|FILE",
        help="what phase 2 starts from instead of a phase 1 of its own: the base of another run, a saved network with "
        "one denoiser (tied), or one to go on from, of the same stages and sharing",
    )
    add(
        "--warm-start",
        metavar="NAME|FILE",
        help="a network, of any task, from whose base phase 1 takes every tensor of the same name and shape",
    )
    add("--stages", type=at_least_one, default=9, help="K (default 9)")
    add("--gamma", type=percentage, default=10, help="rank in percent of min(in, out) (default 10)")
    add("--form", choices=("loralib", "peft"), default="loralib", help="of the adapters (default loralib)")
    add(
        "--sharing",
        choices=("lora", "tied", "untied"),
        default="lora",
        help="a base with an adapter per stage (default), one denoiser for all stages, or one for each",
    )
    add(
        "--train-base",
        action="store_true",
        help="phase 2 of --sharing lora also trains the shared base, which is frozen otherwise",
    )
    add("--base-steps", type=at_least_one, default=3000, help="steps of phase 1 (default 3000)")
    add("--steps", type=at_least_one, default=4000, help="steps of phase 2 (default 4000)")
    add("--batch", type=at_least_one, default=8, help="images of a step (default 8)")
    add("--lr", type=not_negative, default=1e-3, help="peak learning rate (default 1e-3)")
    add("--operator-lr", type=not_negative, default=3e-4, help="of a learned operator (default 3e-4)")
    add("--warm-up", type=none_or_more, default=100, help="steps of linear warm-up (default 100)")
    add("--clip", type=not_negative, default=0.1, help="gradient norm above which it is scaled (default 0.1)")
    add("--pretrain-unroll", type=none_or_more, default=4, help="own passes that phase 1 learns from (default 4)")
    add("--checkpoint", action="store_true", help="recompute activations per stage to save memory")
    add(
        "--dtype",
        choices=tuple(runtime.DTYPES),
        help="of the denoiser (autocast); default: the fastest, bf16 on a GPU and on a CPU with AMX or AVX512-bf16, "
        "fp32 elsewhere",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        default=runtime.default_device(),
        help="default: cuda where there is one, else cpu",
    )
    add("--seed", type=seed, default=0, help="of weights and batches (default 0)")
    add("--validate-every", type=at_least_one, default=250, help="steps between validations (default 250)")
    _add_free_arguments(parser)


def _add_free_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threads", type=runtime.threads, help="CPU threads (default: all)")
    add("--checkpoint-every", type=at_least_one, default=100, help="steps between checkpoints (default 100)")
    add(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, record a step once and replay it (default), or launch its thousands of kernels each time",
    )
    add("--stop-after", type=at_least_one, help="stop after this many steps of this start, to resume later")


def learning_rate_factor(step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _write(path: Path, text: str) -> None:
    with replacing(path) as f:
        f.write(text.encode())


def _peaks(net: LoRun, args: argparse.Namespace) -> list[tuple[list[Tensor], float]]:
    """What learns, in groups, and the peak learning rate of each."""
    operator = [p for p in net.op.parameters() if p.requires_grad]
    own = {id(p) for p in operator}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in own]
    return [(rest, args.lr), *([(operator, args.operator_lr)] if operator else [])]


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
        self.recipe = tasks.recipe(args.task).Recipe(args)
        if args.dtype is None:
            args.dtype = runtime.fastest_dtype(self.device)
        self.settings = {k: _plain(v) for k, v in sorted(vars(args).items()) if k not in _FREE}
        self.settings[_DATA_FILES] = fingerprint(args.data, self.recipe.paths)
        self.taken = 0
        self._held: int | None = None  # the folder, locked

    def open(self) -> dict | None:
        """Creates the folder, or reads its checkpoint; refuses to mix two runs."""
        config, state = self.folder / "config.json", self.folder / "checkpoint.pt"
        if not self.args.resume:
            if config.exists():
                how = f"lorun-fast train {_RESUME} {self.folder}"
                raise UserError(f"{self.folder}: expected a new folder, got one that holds a run, to go on with: {how}")
            make_folder(self.folder)
            self._hold()
            _write(config, json.dumps(self.settings, indent=1))
            return None
        before = _absolute(_settings(self.folder))
        self._hold()
        changed = [k for k in self.settings if k in before and before[k] != self.settings[k]]
        if changed == [_DATA_FILES]:
            data = ", ".join(self.settings["data"])
            raise UserError(
                f"{self.folder}: expected the training data of the run, but names or sizes changed in {data}"
            )
        if changed:
            what = ", ".join(f"{k} was {before.get(k)!r} and is {self.settings[k]!r}" for k in changed)
            raise UserError(f"{self.folder}: expected the settings of the run, but {what}")
        if not state.exists():
            return None
        return _readable(state, lambda path: torch.load(path, map_location=self.device, weights_only=True))

    def _hold(self) -> None:
        """Refuses the folder of a run that another process trains: both would write its checkpoint and its log."""
        self._held = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: expected a run that no other process trains, got one in use") from None
        except OSError:  # a file system without locks
            pass

    def close(self) -> None:
        """Lets go of the folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def phase(self, name: str, net: LoRun, steps: int, resume: dict | None) -> bool:
        """Trains ``net`` in place; False if --stop-after ended it."""
        with use_backend(self._backend()):
            return self._phase(name, net, steps, resume)

    def _backend(self) -> str:
        """Of the layers with adapters: what LORUN_BACKEND says, else minimal filtering where it is the fastest."""
        if _native.WISH != "auto":
            return _native.WISH
        kind, _ = fastest_convolutions(runtime.DTYPES[self.args.dtype], self.device)
        return kind if kind == "winograd" else "auto"

    def _phase(self, name: str, net: LoRun, steps: int, resume: dict | None) -> bool:
        args, device = self.args, self.device
        net.to(device).train()
        step = Step(net, self.recipe, _peaks(net, args), args.clip, runtime.DTYPES[args.dtype], device)
        take = RecordedStep(step) if device.type == "cuda" and args.cuda_graph else step
        first, seconds = 0, 0.0
        total_loss, counted = 0.0, 0
        unread: Tensor | None = None  # the last step's loss: reading it waits for the device
        if resume is not None:
            net.load_state_dict(resume["net"])
            step.load_state_dict(resume["optimizer"])
            first, seconds = resume["step"], resume["seconds"]
            total_loss, counted = resume["total_loss"], resume["counted"]
        self._truncate_log(name, first)
        clock = time.perf_counter() - seconds
        progress = bar(steps, f"phase {name}", "step")
        progress.update(first)

        def read(done: int) -> None:
            nonlocal total_loss, counted, unread
            if unread is None:
                return
            loss, unread = unread.item(), None
            if not math.isfinite(loss):
                progress.close()
                kept = (self.folder / "checkpoint.pt").exists()
                raise UserError(
                    f"{self.folder}: expected a finite loss, got {loss} in step {done} of phase {name}: try a lower "
                    f"--lr; {'what the last checkpoint holds is still there' if kept else 'there is no checkpoint yet'}"
                )
            total_loss, counted = total_loss + loss, counted + 1

        def keep(done: int) -> None:
            read(done)
            state = {
                "phase": name,
                "step": done,
                "seconds": time.perf_counter() - clock,
                "total_loss": total_loss,
                "counted": counted,
                "net": net.state_dict(),
                "optimizer": step.optimizer.state_dict(),
            }
            content = io.BytesIO()
            torch.save(state, content)  # which makes a RuntimeError of a full disk, where it writes to a file
            with replacing(self.folder / "checkpoint.pt") as f:
                f.write(content.getbuffer())

        for index, batch in self._drawn(name, net, range(first, steps)):
            if args.stop_after is not None and self.taken >= args.stop_after:
                keep(index)
                progress.close()
                return False
            factor = learning_rate_factor(index, steps, args.warm_up)
            step.set_rates(factor)
            loss, norm = take(batch)
            read(index)
            unread, done = loss, index + 1
            self.taken += 1
            progress.update()
            validates = done % args.validate_every == 0 or done == steps
            if validates:
                read(done)
                net.eval()
                with step.autocast():
                    score = self.recipe.score(net, device)
                net.train()
                row = (name, done, total_loss / counted, norm.item(), args.lr * factor, score)
                self._log(row, time.perf_counter() - clock)
                total_loss, counted = 0.0, 0
            if validates or done % args.checkpoint_every == 0:
                keep(done)
        progress.close()
        return True

    def _drawn(self, phase: str, net: LoRun, steps: range) -> Iterator[tuple[int, Batch]]:
        """(step, its batch); on a GPU the next batches are drawn meanwhile."""
        offset = 0 if phase == "base" else 10_000_000  # the two phases draw different batches

        def draw(step: int) -> Batch:
            return self.recipe.draw(net, offset + step)

        if self.device.type == "cuda":
            return background.ahead(steps, lambda step: draw(step).pinned(), _DRAWING)
        return ((step, draw(step)) for step in steps)

    def _truncate_log(self, phase: str, step: int) -> None:
        """Drops rows that a killed run wrote after its last checkpoint."""
        path = self.folder / "log.csv"
        if not path.exists():
            _write(path, ",".join(_COLUMNS) + "\n")
            return
        with path.open() as f:
            rows = list(csv.DictReader(f))
        keep = [
            r
            for r in rows
            if (r["phase"] == "base") > (phase == "base") or (r["phase"] == phase and int(r["step"]) <= step)
        ]

        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _COLUMNS)
        writer.writeheader()
        writer.writerows(keep)
        _write(path, text.getvalue())

    def _log(self, row: tuple, seconds: float) -> None:
        phase, step, loss, norm, lr, score = row
        path = self.folder / "log.csv"
        with writing(path), path.open("a", newline="") as f:
            csv.writer(f).writerow(
                (phase, step, f"{loss:.6e}", f"{norm:.4e}", f"{lr:.3e}", f"{score:.4f}", f"{seconds:.1f}")
            )
        tqdm.write(
            f"{phase:>6} step {step:6d}  loss {loss:.3e}  gradient {norm:.2e}"
            f"  validation {score:.3f} dB  {seconds:7.0f} s",
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
        # The weights travel; the paths of the machine they were trained on do not.
        public = {k: v for k, v in self.settings.items() if k not in ("data", _DATA_FILES, "init", "warm_start")}
        public["data"] = [folder.name for folder in self.args.data]
        public |= {k: v.name for k, v in vars(self.args).items() if k in public and isinstance(v, Path)}
        facts = {k: summary[k] for k in ("seconds", "peak_memory_gib", "threads", "torch")}
        model = self.folder / "model.safetensors"
        with writing(model):
            save(net, model, notes={"training": {**facts, "settings": public}})
        _write(self.folder / "summary.json", json.dumps(summary, indent=1))
        _plot(self.folder / "log.csv", self.folder / "curve.png")


def _readable(path: Path, read):
    """read(path), or a UserError that says that the run's file is damaged."""
    try:
        return read(path)
    except Exception as error:  # what torch raises for damaged files is any of a dozen
        raise UserError(f"expected a file of the run, got a damaged {path}: {first_line(error)}") from error


def _settings(folder: Path) -> dict:
    """Of the run in a folder, as its config.json holds them."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder}: expected a run to resume, found no config.json")
    return _readable(config, lambda path: dict(json.loads(path.read_text())))


def _absolute(settings: dict) -> dict:
    """With the absolute paths of files and folders; names of shipped networks and of what is not there stay."""
    names = {*models.shipped(), *tasks.NAMES}

    def one(value, known=()):
        return type(value)(Path(value).resolve()) if str(value) not in known and Path(value).exists() else value

    given = {k: settings[k] for k in _PATHS if settings.get(k) is not None}
    return settings | {k: [one(v) for v in value] if k == "data" else one(value, names) for k, value in given.items()}


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
    axes[0].set(xlabel="minutes", ylabel="training loss")
    axes[1].set(xlabel="minutes", ylabel="validation PSNR (dB)")
    axes[1].legend()
    with replacing(picture) as f:
        figure.savefig(f, dpi=120, format="png")
    plt.close(figure)


def _init_file(init: Path) -> Path:
    path = init / "base.safetensors" if init.is_dir() else models.shipped().get(str(init), init)
    if not path.is_file():
        raise UserError(f"--init: expected a run folder with base.safetensors or a saved network, got {init}")
    return path


def _staged(base: LoRun, args: argparse.Namespace) -> LoRun:
    """Phase 2: K stages that start as the base's, or as K times its single block."""
    settings = {"checkpoint": args.checkpoint, "data_step": base.data_step, "noise_map": base.noise_map}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "adapt: ")  # grouped layers of our own bases, as intended
            net = LoRun(base.op, base.denoiser.base, args.stages, args.gamma, args.form, args.sharing, **settings)
    except ValueError as error:
        raise UserError(f"expected options that fit the base denoiser, got: {error}") from error
    falling = base.noise_map == "stage"
    with torch.no_grad():
        if base.stages == args.stages:
            net.step_size.copy_(base.step_size)
        else:
            net.step_size.copy_(falling_step_sizes(args.stages) if falling else base.step_size.mean())
    return net


def _phase_two(net: LoRun, path: Path, base: LoRun, args: argparse.Namespace) -> LoRun:
    """What phase 2 trains, from the network ``net`` of the file ``path``: a tied network like the recipe's ``base`` is
    staged, a network that is what phase 2 makes of it goes on.
    """

    def shape(net: LoRun) -> dict:
        shapes = {k: v.shape for k, v in net.state_dict().items() if k != "step_size"}
        return shapes | {"sharing": net.sharing, "data_step": net.data_step, "noise_map": net.noise_map}

    if shape(net) == shape(base):
        return _staged(net, args)
    fresh = _staged(base, args)
    got, want = shape(net), shape(fresh)
    if net.stages != fresh.stages or got != want:
        nearest = shape(base) if net.sharing == "tied" else want
        differ = [k for k in {**nearest, **got} if nearest.get(k) != got.get(k)]
        raise UserError(
            f"--init: expected a tied network with the operator and denoiser that the options name, or a network with "
            f"also their stages and sharing, got {path}: {net.stages} stages, {net.sharing}, {len(differ)} properties "
            f"of which differ ({', '.join(differ[:3])})"
        )
    net.checkpoint = args.checkpoint
    return net


def _copy_what_fits(source: LoRun, target: LoRun) -> None:
    """Base tensors of the same name and shape; the adapters, steps and operator of the source stay behind."""
    known = source.denoiser.one().state_dict()
    own = target.denoiser.base.state_dict()
    fitting = {name: known[name] for name, t in own.items() if name in known and known[name].shape == t.shape}
    if not fitting:
        raise UserError("--warm-start: expected a network with a base of the same kind, got one that shares no tensor")
    target.denoiser.base.load_state_dict(fitting, strict=False)


def _settings_of(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments that the run in args.output was started with, and the free ones of this start."""
    settings = _settings(args.output)
    settings.pop(_DATA_FILES, None)
    task = settings.get("task")
    parser = argparse.ArgumentParser()
    _add_common_arguments(parser)
    tasks.get(task)
    tasks.recipe(task).add_arguments(parser)
    options = {action.dest: action for action in parser._actions if action.dest != "help"}
    unknown = settings.keys() - options.keys() - {"task"}
    if unknown:
        raise UserError(f"{args.output}: expected the options of this version, got {', '.join(sorted(unknown))} too")
    # What was not there yet when the run began has its default.
    values = {name: action.default for name, action in options.items()} | settings
    for name, action in options.items():
        if action.type is Path and values[name] is not None:
            given = values[name]
            values[name] = [Path(v) for v in given] if isinstance(given, list) else Path(given)
    values |= {name: value for name, value in vars(args).items() if name in _FREE}
    return argparse.Namespace(**values | {"resume": True})


def run(args: argparse.Namespace) -> int:
    """Runs ``lorun-fast train``; the exit status is 0 also when --stop-after ended it."""
    if args.task == _RESUME:
        args = _settings_of(args)
    args = argparse.Namespace(**_absolute(vars(args)))
    if args.threads:
        torch.set_num_threads(args.threads)
    init = _init_file(args.init) if args.init else None
    start = None if init is None else models.read_network(init)
    warm = models.read_network(models.locate(args.warm_start)) if args.warm_start else None
    runtime.usable(args.device)
    if args.train_base and args.sharing != "lora":
        raise UserError(f"--train-base: expected --sharing lora, got {args.sharing}, which trains every weight")
    training = Run(args)
    seconds: dict[str, float] = {}
    torch.manual_seed(args.seed)
    base = training.recipe.base()
    if warm is not None:
        _copy_what_fits(warm, base)
    # What phase 2 would refuse is refused before phase 1, and before there is a folder.
    _staged(base, args) if start is None else _phase_two(start, init, base, args)
    try:
        state = training.open()
        base_file = init or training.folder / "base.safetensors"
        if state is None or state["phase"] == "base":
            if init is None:
                if not training.phase("base", base, args.base_steps, state):
                    return 0
                with writing(base_file):
                    save(base, base_file)
            state = None
        torch.manual_seed(args.seed + 1)
        net = _phase_two(models.read_network(base_file) if start is None else start, base_file, base, args)
        if args.sharing == "lora":
            net.denoiser.freeze_base(not args.train_base)
        if not training.phase("stages", net, args.steps, state):
            return 0
        with (training.folder / "log.csv").open() as f:
            for row in csv.DictReader(f):
                seconds[row["phase"]] = float(row["seconds"])
        training.finish(net, seconds)
        return 0
    finally:
        training.close()
