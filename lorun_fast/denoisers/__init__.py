"""Base denoisers, and the registry by which a saved network finds its own again."""

from __future__ import annotations

from torch import nn

from lorun_fast.denoisers.res_cnn import ResCNN
from lorun_fast.denoisers.res_unet import ResUNet
from lorun_fast.denoisers.spectral_transformer import SpectralTransformer

_REGISTRY: dict[str, type[nn.Module]] = {}


def register_denoiser(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: lets :func:`lorun_fast.save` and :func:`lorun_fast.load` handle your denoiser.

    The class needs ``config()``, which returns its constructor's arguments as a JSON-serialisable dict.
    """
    if not callable(getattr(cls, "config", None)):
        name = getattr(cls, "__name__", repr(cls))
        raise TypeError(f"{name} needs a method config() that returns its constructor's arguments")
    _REGISTRY[cls.__name__] = cls
    return cls


def registered(name: str) -> type[nn.Module] | None:
    return _REGISTRY.get(name)


for _cls in (ResCNN, ResUNet, SpectralTransformer):
    register_denoiser(_cls)

__all__ = ["ResCNN", "ResUNet", "SpectralTransformer", "register_denoiser", "registered"]
