"""Imports every file that registers cases; the order is the order of the tables."""

from benchmarks import (  # noqa: F401
    block_cs,
    blur_downsample,
    cassi,
    depthwise_conv2d,
    fused_conv2d,
    lora_conv2d,
    network,
    network_cassi,
    packed_conv2d,
    relayout,
    spectral_attention,
    thin_conv2d,
    winograd_conv2d,
)
