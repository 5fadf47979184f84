"""What differs between the tasks.

A task's package is named as its operators' ``task``. Its modules demo, measure, evaluate (``add_arguments(parser)``,
``run(args)``, ``EPILOG``) are the commands of those names, and training is the recipe of ``train``. The package
itself offers

    NAME, DEMO_MODEL, NOISE_LEVEL           of the task; of the shipped network that shows it; whether its networks may
                                            take a noise level beside y
    LAYOUT, OPERATOR_KEYS                   axes of one image's y; keys of a measurement file that describe Phi
    describe(op), facts(op)                 one line for people; plain values for JSON
    operator_arrays(op)                     Phi as arrays under OPERATOR_KEYS
    default_model(file)                     the shipped network for a measurement file
    add_restore_arguments(parser)           options of ``restore`` of its own
    operator_for(file, op, path, model, args)   checks that measurements fit a network whose operator is ``op``; the
                                            operator to restore them with, or None for the network's own. May set
                                            the file's factor and, in args, what an option leaves to the file
    sigma(file, args)                       the noise level to give a network that takes one
    restore(net, y, size, how, *, op, sigma, args)  optional: what ``restore`` runs instead of restoring.restore
    save(path, x, args)                     writes a restored (C, H, W) under this name without suffix
    suffixes(args)                          what the names of the files that save writes end in, behind this name
"""

from __future__ import annotations

import importlib
from types import ModuleType

from lorun_fast.apps.errors import UserError

TITLES = {
    "cs": "block compressive sensing",
    "sr": "super-resolution with a known blur",
    "cassi": "snapshot spectral imaging",
}
NAMES = tuple(TITLES)


def get(name: str) -> ModuleType:
    """The module of a task. Raises UserError for an unknown one."""
    if name not in NAMES:
        raise UserError(f"expected one of the tasks {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"lorun_fast.apps.tasks.{name}")


def recipe(name: str) -> ModuleType:
    """The training module of a task: ``add_arguments(parser)`` and ``Recipe(args)``, which apps/train.py drives.

    A recipe has base(), the single-block LoRun of phase 1; draw(net, step), the Batch that (seed, step) names, on the
    CPU; loss(net, batch), of one on the network's device; and score(net, device), the validation PSNR in dB.
    """
    return importlib.import_module(f"{get(name).__name__}.training")


def command(task: str, name: str) -> ModuleType:
    """The module of one of the task's own commands."""
    return importlib.import_module(f"{get(task).__name__}.{name}")
