"""What an operator's outputs look like, found without letting torch's own Python touch the program's tensors.

Many operators compute the shape of their result in Python when their inputs are metadata. That code may leave cyclic
garbage behind, or import modules whose caught errors keep the frames of all callers; either would keep the program's
tensors alive until a garbage collection that a real card would not need. So operators run on *shadows*: fresh
metadata of the same shape, stride and type. The first run of each operator happens in a thread of its own, whose
frames end there.
"""

from __future__ import annotations

from typing import Any

import torch

from fragscope.record.virtual.threads import PlainThread

_META = torch.device("meta")


class Shadows:
    """Shadows of the metadata-only tensors in one call's arguments."""

    def __init__(self) -> None:
        self._originals: dict[int, torch.Tensor] = {}
        self._shadows: dict[int, torch.Tensor] = {}
        self._storages: set[int] = set()

    def of(self, value: Any) -> Any:
        """The argument with every metadata-only tensor replaced; equal tensors get one shadow."""
        if isinstance(value, torch.Tensor):
            return self._shadow(value) if value.device.type == "meta" else value
        if isinstance(value, list):
            return [self.of(v) for v in value]
        if isinstance(value, tuple):
            return tuple(self.of(v) for v in value)
        return value

    def _shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        shadow = self._shadows.get(id(tensor))
        if shadow is None:
            shadow = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
            self._shadows[id(tensor)] = shadow
            self._originals[id(shadow)] = tensor
            self._storages.add(shadow.untyped_storage()._cdata)
        return shadow

    def aliases_input(self, value: Any) -> bool:
        """Whether an output shares a shadow's storage without being that shadow: a view nobody declared."""
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:
                return False
            return id(value) not in self._originals and value.untyped_storage()._cdata in self._storages
        return isinstance(value, list | tuple) and any(self.aliases_input(v) for v in value)

    def back(self, value: Any) -> Any:
        """Outputs for the program: an argument that came back is the original, everything else is made anew."""
        if isinstance(value, torch.Tensor):
            original = self._originals.get(id(value))
            if original is not None:
                if original.shape != value.shape:
                    original.resize_(value.shape)
                return original
            if value.device.type != "meta" or value._is_zerotensor() or value.layout is not torch.strided:
                return value  # which has no memory of the host's, or none that it could share
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
        if isinstance(value, list | tuple):
            return type(value)(self.back(v) for v in value)
        return value

    def grown(self) -> list[tuple[torch.Tensor, torch.Size]]:
        """Arguments that the operator resized (``out=`` tensors), with their new shapes."""
        return [
            (original, self._shadows[id(original)].shape)
            for original in self._originals.values()
            if original.shape != self._shadows[id(original)].shape
        ]


class Inference:
    """Runs operators on shadows."""

    def __init__(self) -> None:
        self._met: set[Any] = set()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's outputs for the program."""
        shadows = Shadows()
        shadow_args = shadows.of(args)
        shadow_kwargs = {k: shadows.of(v) for k, v in kwargs.items()}
        if func in self._met:
            result = func(*shadow_args, **shadow_kwargs)
        else:
            result = _in_a_thread(func, shadow_args, shadow_kwargs)
            self._met.add(func)
        if shadows.aliases_input(result):
            return func(*args, **kwargs)
        for original, shape in shadows.grown():
            original.resize_(shape)
        return shadows.back(result)


def _in_a_thread(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    outcome: list[Any] = []
    inference = torch.is_inference_mode_enabled()  # torch keeps it by thread, and refuses writes to its tensors without

    def call() -> None:
        try:
            with torch.no_grad(), torch.inference_mode(inference):
                outcome.append((func(*args, **kwargs), None))
        except BaseException as e:
            outcome.append((None, e.with_traceback(None)))

    thread = PlainThread(target=call, name="fragscope-inference")
    thread.start()
    thread.join()
    result, error = outcome.pop()
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback holds this frame, which would hold the error
    return result
