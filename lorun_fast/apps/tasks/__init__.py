"""What differs between the tasks.

A task's module is named as its operators' ``task`` and offers

    NAME, DEMO_MODEL                    of the task, as here below; of the shipped network that shows it
    LAYOUT, OPERATOR_KEYS               axes of one image's y; keys of a measurement file that describe Phi
    add_operator_arguments(parser)      options of ``measure`` that choose Phi
    operator(args)                      the operator that they name
    operator_arrays(op)                 Phi as arrays under OPERATOR_KEYS
    describe(op), facts(op)             one line for people; plain values for JSON
    operator_for(file, op, path, ...)   checks that measurements fit a network, and the operator to restore them with
"""

from __future__ import annotations

import importlib
from types import ModuleType

from lorun_fast.apps.errors import UserError

TITLES = {
    "cs": "block compressive sensing",
}
NAMES = tuple(TITLES)


def get(name: str) -> ModuleType:
    """The module of a task. Raises UserError for an unknown one."""
    if name not in NAMES:
        raise UserError(f"expected one of the tasks {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"lorun_fast.apps.tasks.{name}")


def recipe(name: str) -> ModuleType:
    """The training module of a task: ``add_arguments(parser)`` and ``Recipe(args)``, which apps/train.py drives.

    A recipe has base(), the single-block LoRun of phase 1; loss(net, step, device), of the batch that (seed, step)
    names; and score(net, device), the validation PSNR in dB.
    """
    return importlib.import_module(f"{get(name).__name__}.training")
