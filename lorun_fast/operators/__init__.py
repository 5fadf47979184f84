"""Sensing operators."""

from lorun_fast.operators.base import SensingOperator
from lorun_fast.operators.block_cs import BlockCS

OPERATORS: dict[str, type[SensingOperator]] = {cls.__name__: cls for cls in (BlockCS,)}

__all__ = ["OPERATORS", "BlockCS", "SensingOperator"]
