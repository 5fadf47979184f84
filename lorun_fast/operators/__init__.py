"""Sensing operators."""

from lorun_fast.operators.base import SensingOperator
from lorun_fast.operators.block_cs import BlockCS
from lorun_fast.operators.blur_downsample import BlurDownsample
from lorun_fast.operators.cassi import CASSI

OPERATORS: dict[str, type[SensingOperator]] = {cls.__name__: cls for cls in (BlockCS, BlurDownsample, CASSI)}

__all__ = ["CASSI", "OPERATORS", "BlockCS", "BlurDownsample", "SensingOperator"]
