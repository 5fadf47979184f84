"""Cases and their contenders, registered by decorators.

A case is one problem (an op at a few sizes); a contender is one way to compute it. A file per op reads::

    @case("block_cs.step", suite="ops", sizes=(size("1x1x512x512", n=1, height=512, width=512), ...))
    def step(dtype, device, *, n, height, width) -> Problem: ...

    @step.contender("lorun_fast", kind=OURS)
    def _(p: Problem): return lambda: ...

A contender's function receives the problem and returns what to time: a callable without arguments, or a
:class:`Run`. It raises :class:`Unavailable` with the reason where it cannot take part.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

OURS, RIVAL, LIMIT = "ours", "rival", "limit"
FORWARD, TRAIN = "forward", "forward+backward"
MODES = (FORWARD, TRAIN)
COLD, WARM, OVERHEAD = "cold", "warm", "overhead"
REGIMES = (COLD, WARM, OVERHEAD)
SUITES = ("ops", "layers", "network")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


class Unavailable(Exception):
    """A contender cannot take part: its package is missing, or it does not cover this problem."""


@dataclass(frozen=True)
class Size:
    """One size of a case. ``args`` are the keyword arguments of the function that makes the problem.

    dtypes, modes, regimes: what to run, each combination a table. devices: where it makes sense.
    quick: --quick runs this size, and only sizes so marked. compiled: the compiled variants of the case's
    contenders take part here.
    """

    label: str
    args: dict
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    regimes: tuple[str, ...]
    devices: tuple[str, ...]
    quick: bool
    compiled: bool


def size(
    label: str,
    *,
    dtypes: Sequence[str] = ("fp32",),
    modes: Sequence[str] = MODES,
    regimes: Sequence[str] = (COLD, WARM),
    devices: Sequence[str] = ("cpu", "cuda"),
    quick: bool = False,
    compiled: bool = False,
    **args,
) -> Size:
    """A :class:`Size`; further keyword arguments reach the function that makes the problem."""
    for name, given, known in (("dtypes", dtypes, DTYPES), ("modes", modes, MODES), ("regimes", regimes, REGIMES)):
        unknown = set(given) - set(known)
        if unknown:
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return Size(label, args, tuple(dtypes), tuple(modes), tuple(regimes), tuple(devices), quick, compiled)


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do: bytes moved (inputs read once, outputs written once), operations."""

    bytes: float
    flops: float


@dataclass
class Problem:
    """What the contenders of one table share.

    inputs: tensors they may read, and must not write. reference: the definition, a function of ``inputs``
    by name; it is called with float64 tensors. forward, train: the least work of each mode.
    wrt: names of the inputs that forward+backward differentiates. items: images, for images per second.
    tolerance: largest accepted error relative to the largest value; by default set by the dtype.
    jumps: the gradients jump where an activation's input crosses zero, so that rounding may move single values by
    far more than itself; they are compared in the L2 norm of them all (see check.error).
    dtype, device, mode, args: filled in by the harness.
    """

    inputs: dict[str, Tensor]
    reference: Callable[..., Tensor]
    forward: Work
    train: Work | None = None
    wrt: tuple[str, ...] = ()
    items: int | None = None
    tolerance: float | None = None
    jumps: bool = False
    dtype: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mode: str = FORWARD
    args: dict = field(default_factory=dict)

    @property
    def work(self) -> Work:
        return self.forward if self.mode == FORWARD else self.train

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["inputs"][name]
        except KeyError:
            raise AttributeError(f"the problem has no input {name!r}") from None


@dataclass
class Run:
    """What to time, where a bare callable does not say enough.

    fn: returns the result. reference: its own definition, for a limit row that computes something else than
    the problem; wrt: the names of the inputs that one differentiates, where not the problem's. parameters:
    the tensors to differentiate for, in the order of the names, where they are not the inputs themselves. backend: of
    the LoRA ops, forward and backward, as for lorun_fast.use_backend. recorded: fn replays a CUDA graph, which keeps
    its memory between calls, so that the peak of a call does not tell what it takes. step: a whole call in the
    problem's mode, the result and its gradients, where that is not fn with a backward pass of its own.
    """

    fn: Callable[[], Tensor]
    reference: Callable[..., Tensor] | None = None
    wrt: tuple[str, ...] | None = None
    parameters: tuple[Tensor, ...] | None = None
    backend: str | None = None
    recorded: bool = False
    step: Callable[[], tuple[Tensor, ...]] | None = None


@dataclass(frozen=True)
class Contender:
    """One way to compute a case. ``ops``: names of our ops it runs on, whose backend the table then names."""

    name: str
    kind: str
    build: Callable[[Problem], Callable[[], Tensor] | Run]
    modes: tuple[str, ...] = MODES
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False
    ops: tuple[str, ...] = ()


@dataclass(eq=False)
class Case:
    """A problem at several sizes, and its contenders."""

    name: str
    suite: str
    sizes: tuple[Size, ...]
    make: Callable[..., Problem]
    contenders: list[Contender] = field(default_factory=list)

    def contender(
        self,
        name: str,
        *,
        kind: str = RIVAL,
        modes: Sequence[str] = MODES,
        devices: Sequence[str] = ("cpu", "cuda"),
        compiled: bool = False,
        graphed: bool | Sequence[str] = False,
        compiles: bool = False,
        ops: Sequence[str] = (),
    ) -> Callable:
        """Registers a contender.

        compiled: also register it under torch.compile. graphed: also as a CUDA graph (CUDA only), of the forward pass
        or in the modes given. compiles: it calls torch.compile itself, and takes part where the compiled variants do.
        """
        if kind not in (OURS, RIVAL, LIMIT):
            raise ValueError(f"kind: expected {OURS}, {RIVAL} or {LIMIT}, got {kind!r}")

        def register(build: Callable) -> Callable:
            from benchmarks.harness import variants

            def add(label: str, build: Callable, **changes) -> None:
                if any(c.name == label for c in self.contenders):
                    raise ValueError(f"{self.name}: contender {label!r} is registered twice")
                settings = {"modes": tuple(modes), "devices": tuple(devices), "ops": tuple(ops)} | changes
                self.contenders.append(Contender(label, kind, build, **settings))

            add(name, build, compiled=compiles)
            if compiled:
                add(f"{name}, compiled", variants.compiled(build), compiled=True)
            if graphed:
                recorded = (FORWARD,) if graphed is True else tuple(graphed)
                graph = {"modes": recorded, "devices": ("cuda",), "compiled": compiles}
                add(f"{name}, CUDA graph", variants.graphed(build), **graph)
            return build

        return register

    def problem(self, chosen: Size, dtype: str, mode: str, device: torch.device) -> Problem:
        """The problem of one table, the same numbers at every call."""
        torch.manual_seed(0)
        p = self.make(DTYPES[dtype], device, **chosen.args)
        p.dtype, p.mode, p.device, p.args = dtype, mode, device, chosen.args
        for name in p.wrt:
            p.inputs[name].requires_grad_(mode == TRAIN)
        return p


CASES: dict[str, Case] = {}


def case(name: str, *, suite: str, sizes: Sequence[Size]) -> Callable[[Callable[..., Problem]], Case]:
    """Registers a case; the decorated function makes its problem and becomes the :class:`Case`."""
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")

    def register(make: Callable[..., Problem]) -> Case:
        if name in CASES:
            raise ValueError(f"case {name!r} is registered twice")
        CASES[name] = Case(name, suite, tuple(sizes), make)
        return CASES[name]

    return register


def matches(pattern: str | None, text: str) -> bool:
    """Whether a shell pattern, or a part of the text, selects it. No pattern selects everything."""
    return pattern is None or pattern in text or fnmatch.fnmatchcase(text, pattern)


def select(
    cases: Sequence[Case],
    *,
    suites: Sequence[str] = SUITES,
    patterns: Sequence[str] | None = None,
    device: str = "cpu",
    quick: bool = False,
) -> Iterator[tuple[Case, Size]]:
    """The sizes to run, in order: suites as listed, then the patterns as given, then the order of registration.

    patterns: one of them must match "case size", for example "cassi*" or "block_cs.step 16x*" or "256x256".
    quick: only the sizes marked quick.
    """
    for suite in suites:
        found: dict[tuple[str, str], tuple[Case, Size]] = {}
        for pattern in patterns or (None,):
            for one in (c for c in cases if c.suite == suite):
                for s in one.sizes:
                    fits = matches(pattern, f"{one.name} {s.label}")
                    if fits and device in s.devices and (s.quick or not quick):
                        found.setdefault((one.name, s.label), (one, s))
        yield from found.values()
