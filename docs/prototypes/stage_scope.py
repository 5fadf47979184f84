"""Four ways to tell the layers of an untouched denoiser which stage runs, under compile, export and threads.

    python docs/prototypes/stage_scope.py

Prints one row per candidate; docs/stages.md discusses the result.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import types
import warnings

import torch
import torch.nn.functional as F
from torch import nn

K, WIDTH = 9, 4
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)


class GlobalValue:
    """A value in a module-level object."""

    def __init__(self):
        self.holder = types.SimpleNamespace(stage=None)

    def get(self):
        return self.holder.stage

    def call(self, stage, fn, x):
        before, self.holder.stage = self.holder.stage, stage
        try:
            return fn(x)
        finally:
            self.holder.stage = before


class ThreadLocal(GlobalValue):
    """The same in a threading.local()."""

    def __init__(self):
        self.holder = threading.local()
        self.holder.stage = None

    def call(self, stage, fn, x):
        self.holder.stage = getattr(self.holder, "stage", None)
        return super().call(stage, fn, x)


class ContextVar:
    """A contextvars.ContextVar."""

    def __init__(self):
        self.variable = contextvars.ContextVar("stage", default=None)

    def get(self):
        return self.variable.get()

    def call(self, stage, fn, x):
        token = self.variable.set(stage)
        try:
            return fn(x)
        finally:
            self.variable.reset(token)


SCOPES = {cls.__name__: cls() for cls in (GlobalValue, ThreadLocal, ContextVar)}


class Layer(nn.Module):
    def __init__(self, scope):
        super().__init__()
        self.scope = scope
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3) / 6)
        self.down = nn.Parameter(torch.randn(K, 6, 3 * WIDTH) / 6)
        self.up = nn.Parameter(torch.randn(K, 3 * WIDTH, 6) / 6)

    def forward(self, x):
        stage = SCOPES[self.scope].get()
        update = self.up[stage] @ self.down[stage]
        if isinstance(stage, torch.Tensor):
            n, c, h, w = x.shape
            weight = (self.weight + update.view(n, *self.weight.shape)).flatten(0, 1)
            return F.conv2d(x.reshape(1, n * c, h, w), weight, padding=1, groups=n).view(n, WIDTH, h, w)
        return F.conv2d(x, self.weight + update.view_as(self.weight), padding=1)


class Scoped(nn.Module):
    """The layers read a value that the call sets."""

    def __init__(self, scope):
        super().__init__()
        self.scope = scope
        self.denoiser = nn.Sequential(Layer(scope), nn.ReLU(), Layer(scope))

    def forward(self, x, stage):
        return SCOPES[self.scope].call(stage, self.denoiser, x)


class FunctionalCall(nn.Module):
    """torch.func.functional_call of the untouched denoiser with the stage's merged weights."""

    def __init__(self):
        super().__init__()
        self.denoiser = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        )
        self.down = nn.Parameter(torch.randn(K, 6, 3 * WIDTH) / 6)
        self.up = nn.Parameter(torch.randn(K, 3 * WIDTH, 6) / 6)

    def forward(self, x, stage):
        update = (self.up[stage] @ self.down[stage]).view(WIDTH, WIDTH, 3, 3)
        weights = {f"{i}.weight": getattr(self.denoiser, str(i)).weight + update for i in (0, 2)}
        return torch.func.functional_call(self.denoiser, weights, (x,))


class Unfolded(nn.Module):
    def __init__(self, staged):
        super().__init__()
        self.staged = staged

    def forward(self, x):
        for k in range(K):
            x = self.staged(x, k)
        return x


def attempt(check) -> str:
    try:
        return str(check())
    except Exception as error:
        return f"no ({type(error).__name__})"


def graphs(staged, stages) -> str:
    torch._dynamo.reset()
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(staged, fullgraph=True, backend=backend)
    x = torch.randn(2, WIDTH, 8, 8)
    for stage in stages:
        torch.testing.assert_close(compiled(x, stage), staged(x, stage))
    return f"{count} graphs"


def export(staged, strict: bool) -> str:
    net, x = Unfolded(staged), torch.randn(2, WIDTH, 8, 8)
    torch.testing.assert_close(torch.export.export(net, (x,), strict=strict).module()(x), net(x))
    return "yes"


def wrong_in_threads(staged, calls: int = 200) -> str:
    x = torch.randn(2, WIDTH, 64, 64)
    expected = {k: staged(x, k) for k in (1, 5)}
    wrong = [0]

    def work(k):
        for _ in range(calls):
            try:
                wrong[0] += not torch.allclose(staged(x, k), expected[k], atol=1e-4)
            except Exception:
                wrong[0] += 1

    threads = [threading.Thread(target=work, args=(k,)) for k in expected]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return f"{wrong[0]} of {2 * calls} wrong"


def main() -> None:
    torch.manual_seed(0)
    columns = ("candidate", "9 stages, fullgraph", "stage per sample", "export", "strict export", "two threads")
    print("".join(f"{c:<22}" for c in columns))
    per_sample = [torch.tensor([0, 8]), torch.tensor([3, 1])]
    for name in (*SCOPES, "FunctionalCall"):
        staged = Scoped(name) if name in SCOPES else FunctionalCall()
        row = (
            name,
            attempt(lambda s=staged: graphs(s, range(K))),
            attempt(lambda s=staged: graphs(s, per_sample)),
            attempt(lambda s=staged: export(s, False)),
            attempt(lambda s=staged: export(s, True)),
            attempt(lambda s=staged: wrong_in_threads(s)),
        )
        print("".join(f"{c:<22}" for c in row))


if __name__ == "__main__":
    main()
