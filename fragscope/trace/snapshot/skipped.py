"""Entries that a snapshot does not have: those its recording was told to skip, and those nobody knows here.

``torch.cuda.memory._record_memory_history(skip_actions=[...])``, torch 2.11 and newer, drops entries by their action
and leaves no trace of having done so; what is missing shows where the others do not go together without it.

=====================  ==============================================================================================
skipped                how the snapshot is read
=====================  ==============================================================================================
``free_requested``     a free was requested when it was completed; which were deferred cannot be told
``free_completed``     a free was completed when it was requested; which were deferred cannot be told
both                   refused where an address is handed out twice; else nothing was freed
``alloc``              refused: nobody knows what is freed
``segment_alloc`` etc  as if recording had begun late, when these segments stood; said if nothing was live then
``oom``                requests that failed are not seen, what they released was released by the program
``snapshot``           nothing is lost
=====================  ==============================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, printable
from fragscope.trace.snapshot.shape import ACTIONS
from fragscope.trace.trace import Loss

_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Skipped:
    """What a recording lacks or has too much of.

    Attributes:
        requests: frees whose request is not recorded.
        completions: frees whose completion is not recorded.
        all_frees: whether no free is recorded at all.
        segments: whether no entry takes memory from the driver.
        unknown: how often each action occurs that is not known here.
    """

    requests: int = 0
    completions: int = 0
    all_frees: bool = False
    segments: bool = False
    unknown: Counter[str] = field(default_factory=Counter)

    @property
    def frees_at_once(self) -> bool:
        """Whether one entry stands for the request and the completion of a free."""
        return bool(self.requests or self.completions)

    def losses(self, held: int | None) -> list[Loss]:
        """The same for people.

        Args:
            held: blocks that were live when recording began, None if it did not begin late.
        """
        lost = []
        if self.segments and held is not None and held <= 1:  # one may be of a request cut off at the beginning
            detail = (
                "no entry takes memory from the driver: either all of it stood when recording began, although nothing "
                "was live, or segment_alloc was not recorded (skip_actions), and reserved bytes are wrong"
            )
            lost.append(Loss("segments_taken", detail))
        if self.requests:
            lost.append(Loss("free_requested", _of_frees("requested", "completed"), self.requests))
        if self.completions:
            lost.append(Loss("free_completed", _of_frees("completed", "requested"), self.completions))
        if self.unknown:
            names = [printable(name, 40) for name in sorted(self.unknown)]
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
            detail = f"entries of actions that this version does not know are left out: {shown}"
            lost.append(Loss("unknown_actions", detail, self.unknown.total()))
        return lost


def _of_frees(skipped: str, kept: str) -> str:
    return (
        f"free_{skipped} was not recorded (skip_actions): frees count as {skipped} when they were {kept}; "
        "which of them waited for other streams cannot be told"
    )


def skipped_in(path: Path, entries: Sequence[Any], pending: int) -> Skipped:
    """What the entries lack.

    Args:
        path: the file, for errors.
        entries: of one device; those that are no dicts are left to whoever reads them.
        pending: blocks at the end that were freed and wait for other streams.

    Raises:
        InputFileError: nothing can be made of them without what was skipped.
    """
    count = Counter(action for e in entries if isinstance(e, dict) and isinstance(action := e.get("action"), str))
    requested, completed = count["free_requested"], count["free_completed"]
    takes_memory = count["segment_alloc"] + count["segment_map"] > 0
    if takes_memory and (requested or completed) and not count["alloc"]:
        raise InputFileError(
            path, "was recorded without 'alloc' entries (skip_actions); what its frees are about cannot be known"
        )
    return Skipped(
        requests=0 if requested else completed,
        # If only those that wait at the end lack their completion, none was skipped.
        completions=requested if not completed and requested > pending else 0,
        all_frees=not requested and not completed,
        segments=not takes_memory,
        unknown=Counter({action: n for action, n in count.items() if action not in ACTIONS}),
    )
