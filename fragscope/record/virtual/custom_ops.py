"""CUDA-only operators of other packages: what they allocate, in place of running them.

Each stand-in makes the operator's outputs by plain tensor code on the virtual device, and nothing else. Its footprint
was compared with a recording on a card (tests/data/footprints).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from fragscope.record.virtual.card import VirtualCard

_TRITON = "triton.runtime.jit"
_FLASHINFER_FP4 = "flashinfer.quantization.fp4_quantization"
_FLASHINFER_FP4_OLD = "flashinfer.fp4_quantization"  # before 0.6.12


@contextlib.contextmanager
def patched_custom_ops(device: VirtualCard) -> Iterator[None]:
    """Put stand-ins where loaded packages fetch their compiled CUDA modules, until the end.

    The functions that users call stay what they are: only what they would load and launch is replaced. A package that
    is imported later is patched when it is.
    """
    with contextlib.ExitStack() as stack:
        patched: set[str] = set()

        def patch(module: ModuleType) -> None:
            name = module.__name__
            if name == _TRITON and name not in patched:
                patched.add(name)
                stack.enter_context(mock.patch.object(module.JITFunction, "run", _refused_kernel(device)))
                return
            known = name in (_FLASHINFER_FP4, _FLASHINFER_FP4_OLD) and hasattr(module, "get_fp4_quantization_module")
            if known and name not in patched:
                patched.add(name)
                stand_in = _Fp4Module(device)
                replaced = mock.patch.object(module, "get_fp4_quantization_module", lambda *a, **k: stand_in)
                stack.enter_context(replaced)

        for name in (_FLASHINFER_FP4, _FLASHINFER_FP4_OLD, _TRITON):
            if name in sys.modules:
                patch(sys.modules[name])
        finder = _PatchOnImport({_FLASHINFER_FP4, _FLASHINFER_FP4_OLD, _TRITON}, patch)
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
        yield


def _refused_kernel(device: VirtualCard) -> Any:
    """What launches every kernel of Triton; ``kernel[grid](...)`` and autotuned ones end here, too."""

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(kernel.fn, "__name__", "a kernel")
        raise device.unsupported(
            f"{name} is a kernel of Triton, which needs a card; let the scenario put case.kernel in its place, which "
            "tells what it reads and writes"
        )

    return run


class _Fp4Module:
    """flashinfer's compiled FP4 module.

    ``block_scale_interleave`` makes one flat tensor of experts x ceil128(rows) x ceil4(columns) elements of the input's
    type. Source: flashinfer/quantization/fp4_quantization.py (0.6.18 and 0.7.2), recorded with 0.6.18 on an H100.
    """

    def __init__(self, device: VirtualCard) -> None:
        self._device = device

    def block_scale_interleave_sm100(self, unswizzled_sf: torch.Tensor) -> torch.Tensor:
        experts = unswizzled_sf.shape[0] if unswizzled_sf.dim() == 3 else 1
        rows = -(-unswizzled_sf.shape[-2] // 128) * 128
        columns = -(-unswizzled_sf.shape[-1] // 4) * 4
        out = torch.empty(experts * rows * columns, dtype=unswizzled_sf.dtype, device=unswizzled_sf.device)
        self._device.launched("block_scale_interleave", [unswizzled_sf], [out])
        return out

    def block_scale_interleave_sm100_out(self, unswizzled_sf: torch.Tensor, out: torch.Tensor) -> None:
        """Writes into memory the caller owns."""
        self._device.launched("block_scale_interleave", [unswizzled_sf], [out])
        self._device.values.lose(out, "block_scale_interleave")

    def __getattr__(self, name: str) -> Any:
        raise self._device.unsupported(f"flashinfer's {name} has no known footprint on the virtual device")


class _PatchOnImport:
    """A meta path finder that lets the others find a module and patches it once it has run."""

    def __init__(self, names: set[str], patch: Any) -> None:
        self._names = names
        self._patch = patch

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._names:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _PatchingLoader(spec.loader, self._patch)  # type: ignore[assignment]
                return spec
        return None


class _PatchingLoader:
    def __init__(self, loader: Any, patch: Any) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
