"""As much of torch as programs under test need."""

from torch import accelerator, cuda

__all__ = ["accelerator", "cuda", "empty"]


def empty(size: int, device: str = "cuda") -> int:
    """Allocates ``size`` bytes."""
    index = device.partition(":")[2]
    cuda._from_cpp()
    chosen = int(index) if index else cuda._device
    cuda._peak[chosen] = cuda._peak.get(chosen, 0) + size
    for listener in cuda._listeners:
        listener(chosen, size)
    return size
