"""Let the race of w4a8-convert strike on this machine's GPU, and show whose numbers it spoils.

    PYTHONPATH=. python tests/gpu/provoke_w4a8_race.py

Each variant whose code is installed converts one small layer on a stream of torch's pool that is kept busy: at the
beginning, after everything that waits for the card and before each of its own kernels of the extension it is given
something slow, so that what it is asked for next comes late. The extension's other kernels run on the default stream,
as upstream launches them. The result is compared with one that was computed step by step. Prints a line a variant, and
ends with 1 if other results are wrong than those that the virtual device finds fault with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scenarios"))
import scenario_w4a8_convert as scenario

SHAPE = (8, 1024, 512)  # experts, hidden, intermediate
SLOW = 300_000_000  # cycles, some 0.2 s
NAMES = ("w13", "w2", "packed scales of w13", "packed scales of w2", "channel scales of w13", "channel scales of w2")
PACKED, CHANNEL = set(NAMES[2:4]), set(NAMES[4:])
MUST = {"unsynchronised": {"w13", *PACKED}, "synchronised": PACKED, "all-at-once": PACKED, "vllm": PACKED}
"""What is wrong when the race strikes; the installed vLLM is taken to be as the newest form replayed, all-at-once."""
MAY = {"unsynchronised": {"w2", *CHANNEL}, "synchronised": CHANNEL, "all-at-once": CHANNEL, "vllm": CHANNEL}
"""What may be wrong besides. w2 follows a copy that waits for the stream, so that it is hardly late; memory of channel
scales' temporaries is given to what the other stream writes."""


class Late:
    """Kernels are computed on the stream they name; the current stream is always behind."""

    def __init__(self) -> None:
        self._stream = torch.cuda.default_stream()

    def kernel(
        self, what: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), stream: Any = None
    ) -> None:
        self._stream = torch.cuda.default_stream() if stream is None else stream
        if stream is not None:
            torch.cuda._sleep(SLOW // 2)

    def computes(self, run: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            run()

    def malloc(self, size: int) -> Late:
        return self

    def free(self) -> None:
        self.synchronize()  # cudaFree

    def synchronize(self) -> None:
        torch.cuda.synchronize()
        torch.cuda._sleep(SLOW // 10)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream()


def layer_on_card() -> scenario.Layer:
    made = scenario.random_layer(*SHAPE)
    return scenario.Layer(made.w13.cuda(), made.w2.cuda(), made.s13.cuda(), made.s2.cuda())


def spoil() -> None:
    """What the allocator hands out next holds neither zeros nor the results of another variant."""
    torch.cuda.empty_cache()
    small = [torch.full((2**20,), 0xAA, dtype=torch.uint8, device="cuda") for _ in range(16)]
    large = [torch.full((2**24,), 0xAA, dtype=torch.uint8, device="cuda") for _ in range(8)]
    del small, large


def wrong_results(convert: scenario.Convert, right: list[torch.Tensor]) -> dict[str, float]:
    """Results that differ, with the share of their bytes that do."""
    with torch.cuda.stream(torch.cuda.Stream()):
        spoil()
        layer = layer_on_card()
        torch.cuda.synchronize()
        torch.cuda._sleep(SLOW)
        convert(layer, Late())
        torch.cuda.synchronize()
    got = [t.cpu().contiguous().view(torch.uint8).flatten() for t in scenario.results_of(layer)]
    shares = {
        name: float((a != b.cpu().contiguous().view(torch.uint8).flatten()).float().mean())
        for name, a, b in zip(NAMES, got, right, strict=True)
    }
    return {name: share for name, share in shares.items() if share}


def main() -> int:
    step_by_step = layer_on_card()
    scenario.ordered(step_by_step, scenario.Computed())
    torch.cuda.synchronize()
    right = scenario.results_of(step_by_step)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    surprises = 0
    for variant, convert in scenario.CONVERSIONS.items():
        code = scenario.w4a8_convert.variants[variant].installed
        if code is not None and code.code() is None:
            print(f"{variant}: not applicable: {code.package} is not installed")
            continue
        wrong = wrong_results(convert, right)
        told = ", ".join(f"{name} ({share:.0%} of its bytes)" for name, share in wrong.items())
        must = MUST.get(variant, set())
        as_expected = must <= set(wrong) <= must | MAY.get(variant, set())
        surprises += not as_expected
        print(f"{variant}: {f'wrong: {told}' if wrong else 'right'}{'' if as_expected else '  UNEXPECTED'}")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
