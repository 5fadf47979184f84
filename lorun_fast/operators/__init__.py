"""Sensing operators."""

from lorun_fast.operators.base import SensingOperator
from lorun_fast.operators.block_cs import BlockCS
from lorun_fast.operators.blur_downsample import BlurDownsample

OPERATORS: dict[str, type[SensingOperator]] = {cls.__name__: cls for cls in (BlockCS, BlurDownsample)}

__all__ = ["OPERATORS", "BlockCS", "BlurDownsample", "SensingOperator"]
