"""Where a denoiser's own code computes with a layer's weight instead of calling the layer.

Adapters have no part in that, so adapt() says so. Read from the source: nothing is run or replaced for it, and code
that hides which layer it means is not found.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from lorun_fast.layers import LAYERS

# What is asked of a weight without computing with its values.
_FACTS = {
    "device",
    "dim",
    "dtype",
    "element_size",
    "grad",
    "is_cuda",
    "ndim",
    "numel",
    "requires_grad",
    "shape",
    "size",
}
_LIKE_ANOTHER = {"to", "type_as"}
_WEIGHTS = {name for layer in LAYERS.values() for name in layer.WEIGHTS}


def weight_reads(denoiser: nn.Module) -> Iterator[tuple[str, str]]:
    """(name of the layer, "file:line") of weights that forward methods, and what they call of self, compute with."""
    of_class: dict[type, list[tuple[str, str]]] = {}
    for name, module in denoiser.named_modules():
        kind = type(module)
        if kind not in of_class:
            of_class[kind] = list(_of_class(kind))
        for path, place in of_class[kind]:
            yield f"{name}.{path}" if name else path, place


def _of_class(kind: type) -> Iterator[tuple[str, str]]:
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        method = inspect.getattr_static(kind, name, None)
        method = method.fget if isinstance(method, property) else method
        if name in seen or not isinstance(method, FunctionType):
            continue
        if (method.__module__ or "").split(".")[0] == "torch":  # a traced graph's method has none
            continue
        seen.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
            file = inspect.getsourcefile(method)
        except (OSError, TypeError, SyntaxError):  # typed at a prompt, or made by a program
            continue
        arguments = method.__code__.co_varnames[:1]
        parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
        for node in ast.walk(tree):
            path = _path(node, arguments)
            if path is None:
                continue
            if len(path) == 1:
                waiting += path
            elif path[-1] in _WEIGHTS and not _facts_alone(node, parents):
                yield ".".join(path[:-1]), f"{file}:{method.__code__.co_firstlineno + node.lineno - 1}"


def _path(node: ast.AST, arguments: tuple[str, ...]) -> list[str] | None:
    """["a", "0", "weight"] of self.a[0].weight; None for what does not start with self or has no fixed names."""
    path: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            path.append(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            path.append(str(node.slice.value))
        else:
            return None
        node = node.value
    return path[::-1] if path and node.id in arguments else None


def _facts_alone(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a weight is only asked for its shape, dtype or device."""
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr in _FACTS or parent.attr.startswith("new_")
    if not isinstance(parent, ast.Call):
        return False
    called = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
    return called in _LIKE_ANOTHER or called.endswith("_like")
