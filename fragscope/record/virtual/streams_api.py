"""Streams and events of the virtual card, each thread's current stream, and ``Tensor.record_stream``."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch

from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.card_memory import Recorded

_CUDA = 1  # of c10::DeviceType
_FIRST_HANDLE = 0x5500_0000_1000
_APART = 0x1000
_PRIORITIES = 4
"""Priorities there are, downwards from 0: ``max_compile_time_stream_priorities`` in c10/cuda/CUDAStream.h."""
_OF_A_PRIORITY = 32
"""Streams there are of each priority: ``kStreamsPerPool`` in c10/cuda/CUDAStream.cpp."""


class Stream:
    """A CUDA stream of the virtual card."""

    _api: Streams  # set on the subclass that belongs to one virtual device
    device_type = _CUDA

    def __init__(
        self,
        device: Any = None,
        priority: int = 0,
        *,
        stream_id: int | None = None,
        device_index: int | None = None,
        _handle: int | None = None,
        **_: Any,
    ) -> None:
        self._api.device.check_index(device if device_index is None else device_index)
        if _handle is None:
            _handle = self._api.next_handle(priority) if stream_id is None else stream_id
        self.cuda_stream = self.native_handle = _handle
        self.stream_id = _handle
        self.priority = _priority(_handle)
        self.device = torch.device("cuda", 0)
        self.device_index = 0
        self._asked: Recorded | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device=cuda:0 cuda_stream={self.cuda_stream:#x}>"

    def __enter__(self) -> Stream:
        self._api.push(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._api.pop()

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.cuda_stream)

    def synchronize(self) -> None:
        self._api.device.not_captured("cudaStreamSynchronize")
        self._api.memory.finished(self.cuda_stream)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event if event is not None else self._api.Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether its work is done: no at first, unless the host has waited for it, and yes when asked again."""
        if self._asked is None or self._api.memory.is_over(self._asked):
            self._asked = self._api.memory.record_event(self.cuda_stream, counts=False)
            if self._api.memory.is_over(self._asked):
                return True
            self._api.device.estimate("Stream.query")
            return False
        self._api.memory.finished_event(self._asked)
        return True

    def is_capturing(self) -> bool:
        return self._api.device.scopes.is_captured(self.cuda_stream)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 1 - _PRIORITIES


class Event:
    """A CUDA event of the virtual card."""

    _api: Streams

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded: Recorded | None = None
        self._asked = False
        self.device = torch.device("cuda", 0)

    def record(self, stream: Stream | None = None) -> None:
        self._recorded, self._asked = self._api.memory.record_event(self._handle(stream)), False

    def synchronize(self) -> None:
        self._api.device.not_captured("cudaEventSynchronize")
        if self._recorded is not None:
            self._api.memory.finished_event(self._recorded)

    def wait(self, stream: Stream | None = None) -> None:
        if self._recorded is not None:
            self._api.memory.wait(self._handle(stream), self._recorded)
            self._api.device.scopes.joins(self._handle(stream), self._recorded.stream)

    def _handle(self, stream: Stream | None) -> int:
        return stream.cuda_stream if stream is not None else self._api.device.stream

    def query(self) -> bool:
        """Whether its work is done: no at first, unless the host has waited for it, and yes when asked again."""
        if self._recorded is None or self._api.memory.is_over(self._recorded):
            return True
        if not self._asked:
            self._asked = True
            self._api.device.estimate("Event.query")
            return False
        self._api.memory.finished_event(self._recorded)
        return True

    def elapsed_time(self, end: Event) -> float:
        raise self._api.device.unsupported("Event.elapsed_time: a virtual device has no time")

    def ipc_handle(self) -> bytes:
        raise self._api.device.unsupported("Event.ipc_handle: a virtual card is seen by one process")

    @property
    def cuda_event(self) -> int:
        """A handle, by which nothing can be done."""
        return id(self)


class StreamContext:
    """Makes a stream the current one, as often as it is entered; with None it does nothing."""

    _api: Streams

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self._api.push(self.stream)

    def __exit__(self, *exc: object) -> None:
        if self.stream is not None:
            self._api.pop()


def _priority(handle: int) -> int:
    """The priority of a stream by its handle; 0 for those that the program made elsewhere."""
    number = (handle - _FIRST_HANDLE) // _APART
    return -(number // _OF_A_PRIORITY) if 0 <= number < _PRIORITIES * _OF_A_PRIORITY else 0


class Streams:
    """Streams of one virtual device; what NAMES lists replaces the function of its name."""

    NAMES = (
        "Stream", "Event", "ExternalStream", "get_stream_from_external", "StreamContext", "stream", "current_stream",
        "default_stream", "set_stream", "synchronize",
    )  # fmt: skip

    def __init__(self, device: VirtualCard) -> None:
        self.device = device
        self.memory = device.memory
        self.Stream: type[Stream] = type("Stream", (Stream,), {"_api": self})
        self.Event: type[Event] = type("Event", (Event,), {"_api": self})
        self._default = self.Stream(_handle=0)
        self._local = threading.local()
        self._current: dict[int, Stream] = {}  # those that were current once, by handle
        self._made = [itertools.count() for _ in range(_PRIORITIES)]
        self.StreamContext: type[StreamContext] = type("StreamContext", (StreamContext,), {"_api": self})
        self.stream = self.StreamContext

    def next_handle(self, priority: int) -> int:
        """The stream of a priority whose turn it is: when all were handed out, the first comes again.

        Raises:
            RuntimeError: the priority is above 0; as in torch.
        """
        if priority > 0:
            raise RuntimeError(f"Expected cuda stream priority to be less than or equal to 0, got {priority}")
        pool = min(-priority, _PRIORITIES - 1)
        number = pool * _OF_A_PRIORITY + next(self._made[pool]) % _OF_A_PRIORITY
        handle = _FIRST_HANDLE + number * _APART
        self.memory.ordering.independent(handle)
        return handle

    def synchronize(self, device: Any = None) -> None:
        self.device.check_index(device)
        self.device.not_captured("cudaDeviceSynchronize")
        self.memory.finished()

    def current_stream(self, device: Any = None) -> Stream:
        self.device.check_index(device)
        return self._named(self.device.stream)

    def _named(self, handle: int) -> Stream:
        """The stream of a handle."""
        return self._current.get(handle, self._default) if handle else self._default

    @property
    def _left(self) -> list[int]:
        """The streams that the running thread comes back to, in the order of its nested contexts."""
        if not hasattr(self._local, "left"):
            self._local.left = []
        return self._local.left  # type: ignore[no-any-return]

    def ExternalStream(self, stream_ptr: int, device: Any = None, **_: Any) -> Stream:  # noqa: N802 - torch's name
        return self.Stream(device, _handle=stream_ptr)

    def get_stream_from_external(self, data_ptr: int, device: Any = None) -> Stream:
        return self.Stream(device, _handle=data_ptr)

    def default_stream(self, device: Any = None) -> Stream:
        self.device.check_index(device)
        return self._default

    def set_stream(self, stream: Stream | None) -> None:
        if stream is not None:
            self._current[stream.cuda_stream] = stream
            self.device.stream = stream.cuda_stream

    def push(self, stream: Stream) -> None:
        self._left.append(self.device.stream)
        self.set_stream(stream)

    def pop(self) -> None:
        self.device.stream = self._left.pop()

    @property
    def record_stream(self) -> Callable[[torch.Tensor, Stream], None]:
        """A stand-in for ``Tensor.record_stream``."""
        device = self.device

        def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
            if device.storages.find(tensor) is None and tensor.device.type == "cpu":
                raise NotImplementedError("record_stream is for tensors on a card; this one is on the host")
            device.record_stream(tensor, stream.cuda_stream)

        return record_stream
