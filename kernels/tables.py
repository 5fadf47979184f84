"""Tiles that somebody asked to be tuned: the file that tune.py writes and configs.py reads.

JSON: what was tuned where (device, architecture, versions, date), and a row per problem with its tile, its seconds and
those of the shipped tile. A file is taken whole or not at all: read() raises TableError, one sentence that names what
was expected.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import types
import typing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import triton

from lorun_fast.kernels._geometry import ACTIVATIONS, Geometry
from lorun_fast.kernels.tiles import BackwardTile, Tile, fault

FORMAT = "lorun_fast kernel tiles"
VERSION = 2
DIRECTIONS = ("forward", "backward")
DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")


class TableError(ValueError):
    """A file of tiles that cannot be used."""


@dataclass(frozen=True)
class Key:
    """A problem as far as a tile depends on it: these decide the instructions, and how many programs there are."""

    direction: str
    geometry: Geometry
    dtype: str  # as str(torch.dtype) spells it
    rank: int  # 0: merged weights
    mixed: bool  # one stage per sample
    activation: str | None


@dataclass(frozen=True)
class Row:
    """key -> tile. seconds: of this tile; shipped_seconds: of the shipped one beside it, None where it failed."""

    key: Key
    tile: Tile | BackwardTile
    seconds: float
    shipped_seconds: float | None


@dataclass
class Table:
    """Tiles tuned on one device with one Triton, which is what they were checked with."""

    device: str
    architecture: int
    capability: str
    triton: str
    torch: str
    date: str
    rows: list[Row] = field(default_factory=list)

    @functools.cached_property
    def tiles(self) -> dict[Key, Tile | BackwardTile]:
        return {row.key: row.tile for row in self.rows}

    def with_rows(self, rows: list[Row]) -> Table:
        """This table's description with its rows and ``rows``, which replace those of the same key."""
        merged = {row.key: row for row in [*self.rows, *rows]}
        return replace(self, rows=list(merged.values()))


def _load(kind, value, where: str):
    """``value``, JSON, as a ``kind``: a dataclass, a tuple, a union or a plain type, exactly."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _load_union(typing.get_args(kind), value, where)
    if origin is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list) or len(value) != len(inner):
            raise TableError(f"{where}: expected a list of {len(inner)}, got {value!r}")
        return tuple(_load(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))
    if hasattr(kind, "__dataclass_fields__"):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            got = sorted(value) if isinstance(value, dict) else repr(value)
            raise TableError(f"{where}: expected the fields {sorted(hints)}, got {got}")
        return kind(**{name: _load(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TableError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _load_union(kinds, value, where: str):
    """The kind that ``value`` can be: None, else a dataclass of these fields, else the one that is left."""
    if value is None and type(None) in kinds:
        return None
    kinds = [k for k in kinds if k is not type(None)]
    if isinstance(value, dict) and len(kinds) > 1:
        kinds.sort(key=lambda k: -len(set(value) & set(typing.get_type_hints(k))))
    return _load(kinds[0], value, where)


def _load_row(value, where: str) -> Row:
    row = _load(Row, value, where)
    key = row.key
    for name, got, known in (
        ("direction", key.direction, DIRECTIONS),
        ("dtype", key.dtype, DTYPES),
        ("activation", key.activation, ACTIVATIONS),
    ):
        if got not in known:
            raise TableError(f"{where}.key.{name}: expected one of {', '.join(map(str, known))}, got {got!r}")
    if isinstance(row.tile, BackwardTile) != (key.direction == "backward"):
        raise TableError(f"{where}.tile: expected the tile of a {key.direction} pass, got {row.tile}")
    wrong = fault(row.tile, key.geometry)
    if wrong:
        raise TableError(f"{where}.tile: {wrong}")
    return row


def read(path: str | os.PathLike) -> Table:
    """The table in a file. Raises TableError for a missing, truncated, malformed or foreign one, naming the file.

    Tiles are only as good as the compiler that they were checked with, so another version of Triton is an error too.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: expected a file that kernels.tune wrote, got {error}") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"{path}: expected JSON, whole, that kernels.tune wrote, got {error}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        got = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise TableError(f"{path}: expected format {FORMAT!r}, got {got!r}")
    if value.get("version") != VERSION:
        raise TableError(f"{path}: expected version {VERSION} of the format, got {value.get('version')!r}")
    value = {name: item for name, item in value.items() if name not in ("format", "version")}
    try:
        rows = value.pop("rows", None)
        if not isinstance(rows, list):
            raise TableError(f"rows: expected a list, got {rows!r}")
        hints = {name: hint for name, hint in typing.get_type_hints(Table).items() if name != "rows"}
        if set(value) != set(hints):
            raise TableError(f"expected the fields {sorted(hints)}, got {sorted(value)}")
        table = Table(**{name: _load(hint, value[name], name) for name, hint in hints.items()})
        table.rows = [_load_row(row, f"rows[{i}]") for i, row in enumerate(rows)]
    except TableError as error:
        raise TableError(f"{path}: {error}") from None
    if table.triton != triton.__version__:
        raise TableError(
            f"{path}: expected tiles tuned with Triton {triton.__version__}, got Triton {table.triton}; tune again"
        )
    return table


def write(table: Table, path: str | os.PathLike) -> None:
    """Writes the file in one step: whoever reads it meanwhile sees the old one or the new one."""
    path = Path(path)
    value = {"format": FORMAT, "version": VERSION} | asdict(table)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(value, indent=1) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
