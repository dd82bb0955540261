"""A CUDA card that exists only as an allocator model."""

from fragscope.record.virtual.device import VirtualDevice

__all__ = ["VirtualDevice"]
