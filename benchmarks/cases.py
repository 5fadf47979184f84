"""Imports every file that registers cases; the order is the order of the tables."""

from benchmarks import block_cs, blur_downsample, cassi, lora_conv2d, network, packed_conv2d, winograd_conv2d  # noqa: F401
