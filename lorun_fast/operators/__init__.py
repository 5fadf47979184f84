"""Sensing operators, and the registry by which a saved network finds its own again."""

from lorun_fast.operators.base import SensingOperator
from lorun_fast.operators.block_cs import BlockCS
from lorun_fast.operators.blur_downsample import BlurDownsample
from lorun_fast.operators.cassi import CASSI
from lorun_fast.operators.check import check_operator

_OWN = (BlockCS, BlurDownsample, CASSI)
OPERATORS: dict[str, type[SensingOperator]] = {cls.__name__: cls for cls in _OWN}


def register_operator(cls: type[SensingOperator]) -> type[SensingOperator]:
    """Class decorator: lets :func:`lorun_fast.save` and :func:`lorun_fast.load` handle your operator.

    They rebuild it by its ``config()`` and ``from_config()``. By default these serve a class whose constructor takes
    the tensors of its ``state_dict()``, by their names, and nothing else.
    """
    if not (isinstance(cls, type) and issubclass(cls, SensingOperator)):
        raise TypeError(f"expected a subclass of SensingOperator, got {getattr(cls, '__name__', repr(cls))}")
    if cls.__name__ in {own.__name__ for own in _OWN} and cls not in _OWN:
        raise ValueError(f"expected another name than {cls.__name__}, which lorun_fast has an operator of")
    OPERATORS[cls.__name__] = cls
    return cls


__all__ = [
    "CASSI",
    "OPERATORS",
    "BlockCS",
    "BlurDownsample",
    "SensingOperator",
    "check_operator",
    "register_operator",
]
