"""Problems: layers as far as they decide which kernel is compiled and how long it runs, by the names users type.

forward 64 k3 bf16                  64 -> 64 channels, 3 x 3, 256 x 256 pixels, batch 16
backward 64-128 k3 s2 64px b1 fp16 mixed relu rank7
forward linear 64-192 b4            lora_linear: 4 x 256 x 256 rows
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lorun_fast.kernels._geometry import ACTIVATIONS

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_STAGES = 9


@dataclass(frozen=True)
class Problem:
    """One layer. rank: None for the rank rule's at gamma 10. linear: rows of lora_linear instead of an image."""

    channels: int
    out: int = 0
    k: int = 3
    stride: int = 1
    px: int = 256
    batch: int = 16
    dtype: str = "bfloat16"
    form: str = "peft"  # or "merged": no factors; or "merge": the lora_merge kernel
    factors: str = ""
    mixed: bool = False
    activation: str | None = None
    residual: bool = False
    backward: bool = False
    rank: int | None = None
    linear: bool = False

    @property
    def name(self) -> str:
        """What parse() reads; without words for what is usual. The factors' dtype is not part of it."""
        kind = "merge" if self.form == "merge" else "backward" if self.backward else "forward"
        parts = [kind, *(["linear"] if self.linear else [])]
        parts += [f"{self.channels}-{self.out}" if self.out else f"{self.channels}"]
        parts += [] if self.linear else [f"k{self.k}"]
        parts += [f"s{self.stride}"] if self.stride > 1 else []
        parts += [f"{self.px}px"] if self.px != 256 else []
        parts += [f"b{self.batch}"] if self.batch != 16 else []
        parts += [_DTYPES[self.dtype]]
        parts += [self.form] if self.form == "merged" else []
        parts += ["mixed"] if self.mixed else []
        parts += [self.activation] if self.activation else []
        parts += ["residual"] if self.residual else []
        parts += [f"rank{self.rank}"] if self.rank is not None else []
        return " ".join(parts)

    @property
    def knows(self) -> bool:
        """Whether the library keeps the forward result for the backward pass, whose sign tells the derivative."""
        return self.activation in ("relu", "leaky_relu") and not self.residual

    @staticmethod
    def parse(text: str) -> Problem:
        """The problem of a name. Raises ValueError for a word that says nothing."""
        found: dict = {}
        numbers = {"k": "k", "s": "stride", "b": "batch", "rank": "rank"}
        for word in text.split():
            pair, number = re.fullmatch(r"(\d+)(?:-(\d+))?", word), re.fullmatch(r"(k|s|b|rank)(\d+)", word)
            if pair:
                found |= {"channels": int(pair[1]), "out": int(pair[2] or 0)}
            elif number:
                found[numbers[number[1]]] = int(number[2])
            elif re.fullmatch(r"\d+px", word):
                found["px"] = int(word[:-2])
            elif word in _DTYPES.values():
                found["dtype"] = next(long for long, short in _DTYPES.items() if short == word)
            elif word in ("forward", "backward"):
                found["backward"] = word == "backward"
            elif word == "merged":
                found["form"] = word
            elif word in ("mixed", "residual", "linear"):
                found[word] = True
            elif word in ACTIVATIONS:
                found["activation"] = word
            else:
                raise ValueError(
                    f"problem {text!r}: expected words such as forward, backward, linear, 64 or 64-128 (channels), k3, "
                    f"s2, 256px, b16, bf16, merged, mixed, relu, residual, rank7, got {word!r}"
                )
        if "channels" not in found:
            raise ValueError(f"problem {text!r}: expected channels, such as 64 or 64-128, got none")
        small = [name for name, value in found.items() if type(value) is int and value < 1 and name != "out"]
        if small:
            raise ValueError(f"problem {text!r}: expected {small[0]} of 1 or more, got {found[small[0]]}")
        if found.get("linear"):
            found["k"] = 1
            if found.get("stride", 1) != 1:
                raise ValueError(f"problem {text!r}: expected no stride for a linear layer, got s{found['stride']}")
        if found.get("form") == "merged" and "rank" in found:
            raise ValueError(f"problem {text!r}: expected no rank with merged weights, got rank{found['rank']}")
        return Problem(**found)


def problems() -> Iterator[Problem]:
    """What is shipped: every width class, kernel size, stride and mode that leads to a tile of its own."""
    for channels in (28, 32, 64, 96, 128, 256):
        yield Problem(channels)
        yield Problem(channels, backward=True)
    for channels in (31, 64, 128):
        busy = {"mixed": True, "activation": "gelu"}
        yield Problem(channels, residual=True, factors="float32", **busy)
        yield Problem(channels, backward=True, factors="float32", **busy)
    for channels in (32, 64):
        yield Problem(channels, form="merged")
        yield Problem(channels, form="merged", backward=True)
    for channels in (32, 64, 128):
        yield Problem(channels, px=64, form="merged", mixed=True, activation="relu")
        yield Problem(channels, px=64, form="merged", mixed=True, activation="relu", backward=True)
    # What inference on merged weights is made of, and one image of it.
    for channels in (16, 96, 128):
        yield Problem(channels, px=256 if channels == 16 else 64, form="merged", activation="relu")
    for channels in (96, 128):
        yield Problem(channels, px=64, form="merged", residual=True)
    for channels in (32, 96, 128):
        yield Problem(channels, px=64, batch=1, form="merged", activation="relu", residual=True)
    yield Problem(1, 32, form="merged")
    yield Problem(32, 1, form="merged")
    # ReLU from the saved output; in fp32 also an activation whose convolution is computed again.
    yield Problem(28, activation="relu", backward=True)
    yield Problem(64, activation="relu", backward=True)
    yield Problem(64, dtype="float32", activation="silu", backward=True)
    for backward in (False, True):
        yield Problem(64, 128, stride=2, backward=backward)
        yield Problem(32, k=5, activation="silu", backward=backward)
        yield Problem(64, 192, k=1, backward=backward)
        yield Problem(256, k=1, activation="leaky_relu", backward=backward)
        yield Problem(28, dtype="float32", backward=backward)
        yield Problem(64, dtype="float32", activation="relu", backward=backward)
        yield Problem(64, dtype="float16", backward=backward)
    for dtype in ("bfloat16", "float32"):
        yield Problem(64, dtype=dtype, form="merge", factors="float32")


def small(problem: Problem) -> Problem:
    """The same layer on images that the tests on a GPU can compare in float64; its own tiles may be others."""
    return replace(problem, px=80 if problem.px > 64 else 48, batch=min(problem.batch, 3))


@dataclass
class Tensors:
    """One problem's tensors, laid out as the library lays them out. down and up: None with merged weights."""

    x: object  # (N, C, H, W)
    weight: object
    bias: object
    down: object
    up: object
    stage: object
    dy: object  # (N, O, P, Q), as the residual is

    def read(self, problem: Problem):
        """What lora_conv2d.read() makes of these tensors: (what the kernels read, the signature)."""
        from lorun_fast.kernels import lora_conv2d

        return lora_conv2d.read(
            self.x, self.weight, self.bias, self.down, self.up, 1.0, self.stage, problem.stride, problem.k // 2, 1,
            problem.activation, False, None,
        )  # fmt: skip


def tensors(problem: Problem, device: str) -> Tensors:
    """Random numbers, the same at every call, of the size that a network would show; or nothing, on "meta"."""
    import torch

    from lorun_fast import adapters
    from lorun_fast.kernels._geometry import Geometry

    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    c, o, k, n = problem.channels, problem.out or problem.channels, problem.k, problem.batch
    h = w = problem.px
    if problem.linear:  # the rows of one sample are an image one pixel high; without stages all rows are one sample
        n, h, w = (n, 1, h * w) if problem.mixed else (1, 1, n * h * w)
    own = getattr(torch, problem.dtype)
    factors = getattr(torch, problem.factors) if problem.factors else own

    def draw(*shape, dtype=own, scale=1.0):
        return torch.randn(shape, device=device, dtype=dtype, generator=generator) * scale

    def image(channels, height, width):
        return draw(n, height, width, channels).permute(0, 3, 1, 2)

    merged, lead = problem.form == "merged", (_STAGES,) if problem.mixed else ()
    weight = draw(*(lead if merged else ()), o, k, k, c, scale=(c * k * k) ** -0.5).movedim(-1, -3)
    down = up = None
    if not merged:
        rank = adapters.rank(c, o, 10) if problem.rank is None else problem.rank
        shapes = adapters.factor_shapes((o, c, k, k), rank, "peft")
        down = draw(*lead, *shapes[0], dtype=factors, scale=(c * k * k) ** -0.5)
        up = draw(*lead, *shapes[1], dtype=factors)
    stage = torch.arange(n, device=device) % _STAGES if problem.mixed else None
    g = Geometry.of((n, c, h, w), weight.shape, problem.stride, k // 2)
    return Tensors(image(c, h, w), weight, draw(o), down, up, stage, image(o, g.p, g.q))


def shipped_tile(problem: Problem, g, dtype, arch: int, rank: int):
    """The tile, or the backward's tiles, that the library comes with for this problem."""
    from lorun_fast.kernels import configs

    if problem.backward:
        return configs.shipped_backward(g, dtype, arch, rank, problem.activation)
    return configs.shipped_forward(g, dtype, arch, rank, problem.mixed, problem.activation)


def tile_of(problem: Problem, arch: int):
    """The tile, or the backward's tiles, that the library comes with; None for a merge, which has none."""
    if problem.form == "merge":
        return None
    t = tensors(problem, "meta")
    _, s = t.read(problem)
    return shipped_tile(problem, s.arrange()[0], t.x.dtype, arch, s.rank)


def launches(problem: Problem, arch: int, tile=None) -> list:
    """The launches of one problem on meta tensors, with ``tile`` or the one shipped for this architecture."""
    import torch

    from lorun_fast.kernels import lora_conv2d, lora_conv2d_backward, lora_merge
    from lorun_fast.kernels._geometry import Layout

    t = tensors(problem, "meta")
    dtype = t.x.dtype
    if problem.form == "merge":
        merged = torch.empty(_STAGES, *t.weight.shape, device="meta", dtype=dtype)
        stacked = (f[None].expand(_STAGES, *f.shape) for f in (t.down, t.up))
        layer = lora_merge.Layer(t.weight, *stacked, merged, 1.0)
        return [one for layers in ([layer], [layer, layer]) for one in lora_merge.launches(layers)]
    values, s = t.read(problem)
    s = s._replace(tile=tile or shipped_tile(problem, s.arrange()[0], dtype, arch, s.rank))
    y = Layout.of(t.dy)
    if not problem.backward:
        return lora_conv2d.plan(s, y if problem.residual else None).over(values | {"residual": t.dy})
    need = (True, True, problem.activation is not None)
    factors = t.weight if t.down is None else t.down
    d_down, d_up = (None if f is None else (f.shape, f.dtype) for f in (factors, t.up))
    plan = lora_conv2d_backward.plan(
        s, y, y if problem.knows else None, need, _STAGES if problem.mixed else 1, d_down, d_up
    )  # fmt: skip
    return plan.over(values | {"dy": t.dy, "y": t.dy, "chosen": 0})


def fingerprint(problem: Problem, arch: int, tile) -> tuple:
    """What tells the launches of one tile from another's: some wishes change nothing, as bulk copies of 28 channels."""
    found = []
    for one in launches(problem, arch, tile):
        numbers = {name: value for name, value in one.args.items() if isinstance(value, int)}
        found.append((one.kernel, one.programs, one.warps, one.stages, str((one.options, one.constants, numbers))))
    return tuple(found)
