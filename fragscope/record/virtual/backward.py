"""On which stream of the card each step of a backward pass runs.

Autograd runs a node of its graph on the stream that was current when the node was made, lets it wait for the streams
that its gradients come from, and marks these gradients as used by it. A build without CUDA knows no streams of the card
and runs all on the caller's. So each thread keeps which stream was current from which node on, counted by the numbers
that torch gives to the nodes of a thread, and a pass over a graph of several streams looks the nodes up.

Source: ``Node::stream`` in torch/csrc/autograd/function.h; ``Engine::evaluate_function`` in engine.cpp beside it, and
``InputBuffer::add`` in input_buffer.cpp. What an H100 did: tests/data/streams.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

_LEAF = 2**64 - 1
"""Number of the nodes that add to a ``.grad``: the gradient accumulators of leaves."""
_MARK = "fragscope.stream"
_Use = Callable[[torch.Tensor, int], None]


class Events(Protocol):
    """What lets streams wait for each other."""

    def record(self, stream: int) -> Any:
        """An event behind the work so far of a stream."""

    def wait(self, stream: int, event: Any) -> None:
        """A stream waits for an event."""


class BackwardPass:
    """A backward pass under way in one thread, over a graph of several streams.

    Args:
        streams: of each node of the graph.
        caller: the stream that was current when the pass was asked for.
        events: of the card.
        use: marks a tensor as used by a stream.
    """

    def __init__(self, streams: dict[Any, int], caller: int, events: Events, use: _Use) -> None:
        self.streams = streams
        self._caller = caller
        self._events, self._use = events, use
        self._set: tuple[Any, int] | None = None  # a node, and the stream that its hooks or its code made current
        self._ready: dict[tuple[Any, int], tuple[int, Any]] = {}  # by input of a node: where its gradient is, and when
        self._sums: deque[int] = deque()  # streams of the sums that come next

    @property
    def stream(self) -> int:
        """The current stream."""
        if self._set is not None and self._set[0] is torch._C._current_autograd_node():
            return self._set[1]
        return self.node_stream

    @stream.setter
    def stream(self, handle: int) -> None:
        self._set = torch._C._current_autograd_node(), handle

    @property
    def node_stream(self) -> int:
        """The stream of the node that is run, whatever its code made current meanwhile."""
        return self.streams.get(torch._C._current_autograd_node(), self._caller)

    def give(self, gradient: torch.Tensor, producer: int, consumer: Any, at: int) -> None:
        """A gradient of a stream goes to an input of a node, where others may be already: then their sum is next.

        It is made on the stream of the node that takes it, whatever comes first. That stream waits for both, and what
        is of another one is marked as used by it.

        Source: ``InputBuffer::add`` in torch/csrc/autograd/input_buffer.cpp, on one device (case A there).
        """
        handle, here = self.streams[consumer], (consumer, at)
        if handle != producer:
            self._use(gradient, handle)
        event = self._events.record(producer)
        earlier = self._ready.get(here)
        if earlier is None:
            self._ready[here] = producer, event
            return
        for stream, ready in (earlier, (producer, event)):
            if stream != handle:
                self._events.wait(handle, ready)
        self._ready[here] = handle, None
        self._sums.append(handle)

    @contextlib.contextmanager
    def summing(self) -> Iterator[None]:
        """While two gradients are added up: on their consumer's stream, or where a formula is that adds its own."""
        if not self._sums:
            yield
            return
        before, self.stream = self._set, self._sums.popleft()
        try:
            yield
        finally:
            self._set = before

    def begin(self, node: Any, inputs: int) -> None:
        """A node is run next, with the gradients that it was given."""
        self._sums.clear()
        handle = self.streams[node]
        for at in range(inputs):
            stream, event = self._ready.get((node, at), (handle, None))
            if stream != handle:
                self._events.wait(handle, event)

    def end(self, node: Any, gradients: tuple[Any, ...]) -> None:
        """A node has made gradients for those behind it."""
        self._sums.clear()
        for gradient, (following, at) in zip(gradients, node.next_functions, strict=False):
            if following in self.streams and isinstance(gradient, torch.Tensor) and _is_run(following):
                self.give(gradient, self.streams[node], following, at)


class _Log(threading.local):
    """From which node of the thread on which stream was current; nothing before the first."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.handles: list[int] = []


class GraphStreams:
    """Streams of the nodes of all graphs.

    Args:
        unsure: told what is not known.
        events: of the card.
        use: marks a tensor as used by a stream.
    """

    def __init__(self, unsure: Callable[[str], None], events: Events, use: _Use) -> None:
        self._unsure, self._events, self._use = unsure, events, use
        self._log = _Log()
        self._logs: list[tuple[list[int], list[int]]] = []

    def changed(self, handle: int) -> None:
        """Another stream is current in the running thread."""
        log = self._log
        if not log.starts:
            if handle == 0:
                return
            self._logs.append((log.starts, log.handles))
        number = torch._C._autograd._get_sequence_nr()
        if log.starts and log.starts[-1] == number:
            log.handles[-1] = handle
        elif not log.handles or log.handles[-1] != handle:
            log.starts.append(number)
            log.handles.append(handle)

    @contextlib.contextmanager
    def running(
        self, roots: Sequence[Any], gradients: Sequence[Any], caller: int, *, nested: bool
    ) -> Iterator[BackwardPass | None]:
        """While a backward pass runs from some roots; None where all of it is on the caller's stream.

        Args:
            roots: what it is asked of: tensors, or edges of the graph.
            gradients: of each root.
            caller: the current stream.
            nested: it is a part of another one.
        """
        if not self._logs:
            yield None
            return
        first = [_edge_of(root) for root in roots]
        streams = self._graph([node for node, _ in first if node is not None], caller)
        if not nested and all(handle == caller for handle in streams.values()):
            yield None
            return
        running = BackwardPass(streams, caller, self._events, self._use)
        for (node, at), gradient in zip(first, gradients, strict=True):
            if node is not None and isinstance(gradient, torch.Tensor):
                running.give(gradient, caller, node, at)
        hooks = [node.register_prehook(self._before(running, node)) for node in streams]
        # A hook behind it would keep the gradient of a leaf alive, which is then copied and not taken.
        hooks += [node.register_hook(_behind(running, node)) for node in streams if node.next_functions]
        try:
            yield running
        finally:
            for hook in hooks:
                hook.remove()
            self.changed(caller)
            for handle in dict.fromkeys(streams.values()):
                if handle != caller:
                    self._events.wait(caller, self._events.record(handle))

    def _before(self, running: BackwardPass, node: Any) -> Callable[[tuple[Any, ...]], None]:
        """What is done before a node runs, with the gradients that it is given."""

        def before(gradients: tuple[Any, ...]) -> None:
            self.changed(running.streams[node])
            running.begin(node, len(gradients))

        return before

    def _graph(self, roots: list[Any], caller: int) -> dict[Any, int]:
        """The stream of each node below the roots."""
        streams: dict[Any, int] = {}
        leaves: dict[Any, int] = {}  # gradient accumulators, and the number of the first node that uses each
        todo = list(dict.fromkeys(roots))
        while todo:
            node = todo.pop()
            if node in streams or node in leaves:
                continue
            number = node._sequence_nr()
            if number == _LEAF:
                leaves[node] = _LEAF
                continue
            streams[node] = self._stream_of(number)
            todo.extend(following for following, _ in node.next_functions if following is not None)
        for node in streams:
            for following, _ in node.next_functions:
                if following in leaves:
                    leaves[following] = min(leaves[following], node._sequence_nr())
        for node, number in leaves.items():
            # It is made when its leaf is first used, and lives as long as a graph that uses it.
            handle = node.metadata.setdefault(_MARK, caller if number == _LEAF else self._stream_of(number))
            streams[node] = handle
        return streams

    def _stream_of(self, number: int) -> int:
        """The stream of a node by its number, which the running thread and others may each have given."""
        own = _current_at(self._log.starts, self._log.handles, number)
        if any(_current_at(*log, number) != own for log in self._logs):
            self._unsure("backward pass over streams of several threads")
        return own


def _current_at(starts: list[int], handles: list[int], number: int) -> int:
    """The stream that was current when a thread made its node of that number."""
    before = bisect_right(starts, number)
    return handles[before - 1] if before else 0


def _edge_of(root: Any) -> tuple[Any, int]:
    """The node of the graph that a tensor, or an edge, is the output of, and which of its outputs."""
    return (root.grad_fn, root.output_nr) if isinstance(root, torch.Tensor) else (root.node, root.output_nr)


def _behind(running: BackwardPass, node: Any) -> Callable[[tuple[Any, ...], tuple[Any, ...]], None]:
    """What is done when a node has run."""
    return lambda made, given: running.end(node, made)


def _is_run(node: Any) -> bool:
    """Whether the running pass needs a node; ``torch.autograd.grad`` leaves out what no gradient asked for needs."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # which does not answer for leaves whose gradients are asked for
        return True
