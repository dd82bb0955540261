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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_LEAF = 2**64 - 1
"""Number of the nodes that add to a ``.grad``: the gradient accumulators of leaves."""
_MARK = "fragscope.stream"
_Wait = Callable[[int, int], None]
_Use = Callable[[torch.Tensor, int], None]


class BackwardPass:
    """A backward pass under way in one thread, over a graph of several streams.

    Args:
        streams: of each node of the graph.
        caller: the stream that was current when the pass was asked for.
    """

    def __init__(self, streams: dict[Any, int], caller: int) -> None:
        self.streams = streams
        self._caller = caller
        self._set: tuple[Any, int] | None = None  # a node, and the stream that its hooks or its code made current

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

    @property
    def consumer_stream(self) -> int:
        """The stream that gradients of the node that is run are summed up on: that of the node which takes the sum.

        Where it hands gradients to nodes of several streams, it is not known which of them is meant: then its own.
        """
        node = torch._C._current_autograd_node()
        wanted = {self.streams.get(n, self._caller) for n, _ in getattr(node, "next_functions", ()) if n is not None}
        return wanted.pop() if len(wanted) == 1 else self.node_stream


class _Log(threading.local):
    """From which node of the thread on which stream was current; nothing before the first."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.handles: list[int] = []


class GraphStreams:
    """Streams of the nodes of all graphs.

    Args:
        unsure: told what is not known.
        wait: lets the first stream wait for the second.
        use: marks a tensor as used by a stream.
    """

    def __init__(self, unsure: Callable[[str], None], wait: _Wait, use: _Use) -> None:
        self._unsure, self._wait, self._use = unsure, wait, use
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
    def running(self, roots: Iterable[Any], caller: int, *, nested: bool) -> Iterator[BackwardPass | None]:
        """While a backward pass runs from some roots; None where all of it is on the caller's stream.

        Args:
            roots: what it is asked of: tensors, or edges of the graph.
            caller: the current stream.
            nested: it is a part of another one.
        """
        if not self._logs:
            yield None
            return
        first = [_node_of(root) for root in roots]
        streams, producers = self._graph([n for n in first if n is not None], caller)
        if not nested and all(handle == caller for handle in streams.values()):
            yield None
            return
        hooks = [n.register_prehook(self._before(streams[n], producers[n])) for n in streams]
        try:
            yield BackwardPass(streams, caller)
        finally:
            for hook in hooks:
                hook.remove()
            self.changed(caller)
            for handle in dict.fromkeys(streams.values()):
                if handle != caller:
                    self._wait(caller, handle)

    def _before(self, handle: int, producers: dict[int, set[int]]) -> Callable[[tuple[Any, ...]], None]:
        """What is done before a node runs, with the gradients that it is given."""
        elsewhere = {at: others for at, made in producers.items() if (others := made - {handle})}

        def before(gradients: tuple[Any, ...]) -> None:
            self.changed(handle)
            for at, others in elsewhere.items():
                for other in others:
                    self._wait(handle, other)
                if at < len(gradients) and isinstance(gradients[at], torch.Tensor):
                    self._use(gradients[at], handle)

        return before

    def _graph(self, roots: list[Any], caller: int) -> tuple[dict[Any, int], dict[Any, dict[int, set[int]]]]:
        """The stream of each node below the roots, and by gradient those that it comes from."""
        streams: dict[Any, int] = {}
        edges: list[tuple[Any, Any, int]] = []  # producer, consumer, which of its gradients
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
            for following, at in node.next_functions:
                if following is not None:
                    edges.append((node, following, at))
                    todo.append(following)
        for node, following, _ in edges:
            if following in leaves:
                leaves[following] = min(leaves[following], node._sequence_nr())
        for node, number in leaves.items():
            # It is made when its leaf is first used, and lives as long as a graph that uses it.
            handle = node.metadata.setdefault(_MARK, caller if number == _LEAF else self._stream_of(number))
            streams[node] = handle
        producers: dict[Any, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for node, following, at in edges:
            producers[following][at].add(streams[node])
        for node in roots:
            for at in range(len(node._input_metadata)):
                producers[node][at].add(caller)
        return streams, producers

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


def _node_of(root: Any) -> Any:
    """The node of the graph that a tensor, or an edge, is the output of."""
    return root.grad_fn if isinstance(root, torch.Tensor) else root.node
