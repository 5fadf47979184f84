"""The ops as functions."""

from lorun_fast.ops.block_cs import block_cs, block_cs_adjoint, block_cs_step
from lorun_fast.ops.blur_downsample import (
    blur_downsample,
    blur_downsample_adjoint,
    blur_downsample_prox,
    blur_downsample_step,
)
from lorun_fast.ops.cassi import cassi, cassi_adjoint, cassi_prox, cassi_step
from lorun_fast.ops.depthwise_conv2d import depthwise_conv2d
from lorun_fast.ops.fused_conv2d import fused_conv2d, thin_weight_gradient
from lorun_fast.ops.lora_conv2d import lora_conv2d
from lorun_fast.ops.lora_linear import lora_linear
from lorun_fast.ops.lora_merge import lora_merge
from lorun_fast.ops.lora_residual_block import lora_residual_block
from lorun_fast.ops.packed_conv2d import packed_block, packed_conv2d, packed_weight
from lorun_fast.ops.packed_factor_gradients import packed_factor_gradients
from lorun_fast.ops.packed_weight_gradient import packed_weight_gradient
from lorun_fast.ops.relayout import relayout
from lorun_fast.ops.spectral_attention import spectral_attention
from lorun_fast.ops.winograd_conv2d import (
    winograd_block,
    winograd_conv2d,
    winograd_weight,
    winograd_weight_gradient,
)

__all__ = [
    "block_cs",
    "block_cs_adjoint",
    "block_cs_step",
    "blur_downsample",
    "blur_downsample_adjoint",
    "blur_downsample_prox",
    "blur_downsample_step",
    "cassi",
    "cassi_adjoint",
    "cassi_prox",
    "cassi_step",
    "depthwise_conv2d",
    "fused_conv2d",
    "lora_conv2d",
    "lora_linear",
    "lora_merge",
    "lora_residual_block",
    "packed_block",
    "packed_conv2d",
    "packed_factor_gradients",
    "packed_weight",
    "packed_weight_gradient",
    "relayout",
    "spectral_attention",
    "thin_weight_gradient",
    "winograd_block",
    "winograd_conv2d",
    "winograd_weight",
    "winograd_weight_gradient",
]
