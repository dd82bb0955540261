import os
import sys
import threading

_initialized = False
_by_cpp = False
_owner = None
_tls = threading.local()
_lock = threading.Lock()
_device = 0
_peak: dict[int, int] = {}
_listeners: list = []
_observers: list = []


def _is_in_bad_fork() -> bool:
    return _owner is not None and _owner != os.getpid()


def is_initialized() -> bool:
    return _initialized and not _is_in_bad_fork()


def _lazy_init() -> None:
    global _initialized, _owner
    if is_initialized() or hasattr(_tls, "is_initializing"):
        return
    with _lock:
        if is_initialized():
            return
        if _is_in_bad_fork():
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")
        _owner = os.getpid()
        _tls.is_initializing = True
        try:
            current_device()  # torch's queued calls come back here
        finally:
            del _tls.is_initializing
        _initialized = True


def _from_cpp() -> None:
    global _by_cpp
    if _is_in_bad_fork() or not _by_cpp:
        sys.modules["torch.cuda"]._lazy_init()
        _by_cpp = True


def init() -> None:
    _lazy_init()


def is_available() -> bool:
    return True


def device_count() -> int:
    return 4


def current_device() -> int:
    _lazy_init()
    return _device


def set_device(device: int) -> None:
    global _device
    _from_cpp()
    _device = device


def _exchange_device(device: int) -> int:
    global _device
    _from_cpp()
    before, _device = _device, device
    return before


def memory_stats(device: int) -> dict[str, int]:
    for observer in _observers:
        observer()
    return {"allocated_bytes.all.peak": _peak.get(device, 0)} if is_initialized() else {}


class device:  # noqa: N801
    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None:
        self.before = sys.modules["torch.cuda"]._exchange_device(self.index)

    def __exit__(self, *error: object) -> None:
        sys.modules["torch.cuda"]._exchange_device(self.before)


from torch.cuda.memory import mem_get_info  # noqa: E402, F401
