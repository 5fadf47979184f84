"""Fast layers, sensing operators and networks for deep unfolding with low-rank stages (arXiv 2602.18697)."""

from lorun_fast import adapters, denoisers, functional, interop, operators
from lorun_fast._version import __version__
from lorun_fast.config import show_config
from lorun_fast.denoisers import ResCNN, ResUNet, SpectralTransformer
from lorun_fast.io import load, load_pretrained, save
from lorun_fast.layers import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAConvTranspose1d,
    LoRAConvTranspose2d,
    LoRAConvTranspose3d,
    LoRALinear,
    LoRAMultiheadAttention,
)
from lorun_fast.network import LoRun
from lorun_fast.operators import CASSI, BlockCS, BlurDownsample, SensingOperator
from lorun_fast.ops._backends import use_backend
from lorun_fast.stages import StagedDenoiser, adapt

__all__ = [
    "CASSI",
    "BlockCS",
    "BlurDownsample",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAConvTranspose1d",
    "LoRAConvTranspose2d",
    "LoRAConvTranspose3d",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRun",
    "ResCNN",
    "ResUNet",
    "SensingOperator",
    "SpectralTransformer",
    "StagedDenoiser",
    "__version__",
    "adapt",
    "adapters",
    "denoisers",
    "functional",
    "interop",
    "load",
    "load_pretrained",
    "operators",
    "save",
    "show_config",
    "use_backend",
]
