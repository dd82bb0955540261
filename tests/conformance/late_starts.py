"""Recordings in tests/data cut off at the front, as if they had begun late, replayed from what stood then.

usage: python tests/conformance/late_starts.py [--cuts N] [NAME ...]

Each recording is cut after 1/(N+1), 2/(N+1), ... of its entries. A line for each cut whose decisions differ says where
and why; the last line counts. Exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import CONFS, TRACES, late_part, own_settings, pickled

from fragscope.allocator import replay

NOT_TOLD = ("confs/pools-default", "confs/toggle")  # that a snapshot does not tell enough about; see their README
RECORDINGS = sorted(p.name.removesuffix(".pickle.xz") for p in TRACES.glob("*.pickle.xz")) + list(CONFS)


def differences(name: str, cuts: int) -> list[str]:
    """A line for each cut of a recording that the model does not follow."""
    snapshot, out = pickled(name), []
    for cut in range(1, cuts + 1):
        late = late_part(name, snapshot, cut / (cuts + 1))
        verdict = replay(late, own_settings(late), verify=True).verify
        assert verdict is not None
        if verdict.first is not None:
            first = verdict.first
            out.append(
                f"{name} from {cut}/{cuts + 1} on: {verdict.mismatches} of {verdict.compared} differ, first at event "
                f"{first.event}: recorded {first.recorded}, modelled {first.modelled}; {first.likely}"
            )
    return out


def main() -> int:
    """Run the cuts and print what differs."""
    parser = argparse.ArgumentParser(description="Replay the recordings in tests/data as if they had begun late.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="recordings; all but two that no replay follows")
    parser.add_argument("--cuts", type=int, default=19, help="cuts of each (default: 19)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(RECORDINGS))
    if unknown or arguments.cuts < 1:
        parser.error(f"no such recording: {', '.join(unknown)}" if unknown else "--cuts must be at least 1")
    names = arguments.names or [name for name in RECORDINGS if name not in NOT_TOLD]
    wrong = 0
    for name in names:
        lines = differences(name, arguments.cuts)
        wrong += len(lines)
        print(*lines, f"{name}: {arguments.cuts - len(lines)} of {arguments.cuts}", sep="\n", flush=True)
    tried = len(names) * arguments.cuts
    print(f"{tried - wrong} of {tried} cuts of {len(names)} recordings verify")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
