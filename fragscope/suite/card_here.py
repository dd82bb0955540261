"""The card at hand: what it is, what is free of it now, and how processes can be started that use it.

Asked in a process of its own, once a run. A context held by this process would take memory that recordings then lack.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from fragscope.allocator import Card
from fragscope.errors import NotMeasuredError, printable
from fragscope.suite.process import enter, leave, log_path, report_path
from fragscope.suite.server import Job, WorkerServer
from fragscope.trace.containers import write_atomically

_KEY = "card"
_PATIENCE = 120.0  # seconds; a first context on a machine of many cards takes some of them


class Answer(msgspec.Struct, frozen=True):
    """What CUDA says of the card that recordings use; sizes are bytes.

    Attributes:
        free: of ``total``, while a context stands and nothing is allocated. What other processes hold is not free.
    """

    product: str
    total: int
    free: int
    capability: tuple[int, int]
    multiprocessors: int
    l2: int


@dataclass(frozen=True, slots=True)
class CardHere:
    """The card at hand.

    Attributes:
        card: its facts.
        files_first: a process can import the scenario files before it is forked and CUDA begins. A file that touches
            CUDA while it is imported makes CUDA unusable in every fork.
    """

    card: Card
    files_first: bool


def ask_card(files: Iterable[Path]) -> CardHere:
    """The card that recordings on CUDA will use, of several the one that is current in a fresh process.

    Args:
        files: the scenario files of the run.

    Raises:
        NotMeasuredError: CUDA cannot be used now; says why in one line.
    """
    said = _asked(tuple(files))
    if isinstance(said, Answer):
        return CardHere(_card(said), files_first=True)
    said = _asked(())
    if isinstance(said, Answer):
        return CardHere(_card(said), files_first=False)
    raise NotMeasuredError(f"--device cuda: the card cannot be used now: {said}")


def _asked(files: tuple[Path, ...]) -> Answer | str:
    """The answer, or why there is none."""
    with tempfile.TemporaryDirectory(prefix="fragscope-") as name:
        folder = Path(name)
        job = Job(_KEY, answer, (folder,))
        with WorkerServer(files, 1, _PATIENCE).running() as server:
            server.run([job], lambda _: (), lambda _: None)
        try:
            return msgspec.json.decode(report_path(folder, _KEY).read_bytes(), type=Answer)
        except (OSError, msgspec.MsgspecError):
            return f"no answer in {_PATIENCE:g} s" if job.timed_out else _last_words(folder)


def _card(said: Answer) -> Card:
    return Card(
        name=said.product.lower().replace(" ", "-"),
        product=said.product,
        total=said.total,
        free=said.free,
        capability=said.capability,
        multiprocessors=said.multiprocessors,
        l2=said.l2,
        source="this machine",
    )


def answer(folder: Path) -> None:
    """Process entry: ask CUDA and write the answer."""
    enter(log_path(folder, _KEY), _PATIENCE)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    said = Answer(
        product=properties.name,
        total=total,
        free=free,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        l2=properties.L2_cache_size,
    )
    write_atomically(report_path(folder, _KEY), msgspec.json.encode(said))
    leave()


def _last_words(folder: Path) -> str:
    try:
        lines = log_path(folder, _KEY).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line.strip() for line in lines if line.strip()]
    # CUDA's errors end in general advice; what happened is in the line that names the error.
    named = [line for line in said if "Error" in line.partition(":")[0]]
    return printable((named or said or ["the process that asked it ended without a word"])[-1], 300)
