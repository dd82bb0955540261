"""Running a command so that nobody can tell it from the command alone: streams, signals, exit code.

The command stays in our process group, so that a terminal treats both as one job: Ctrl-C and hang-ups reach it from the
kernel, Ctrl-Z stops both. What another process sends to us is passed on. ``sigtimedwait`` tells the two apart.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from types import FrameType

from fragscope.errors import printable

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as shells have it
_PASSED_ON = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
_SI_USER = 0  # include/uapi/asm-generic/siginfo.h: what processes send is not above it, what the kernel sends is
_LOOK_AGAIN = 0.5  # seconds; between two waits another thread may take the news that the command ended


class CommandError(Exception):
    """The command cannot be started.

    Attributes:
        exit_code: what a shell would return.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunningCommand:
    """A command and the signals for it; used once.

    Between construction and the end of ``wait`` the signals in ``_PASSED_ON`` do not end this process.
    """

    def __init__(self, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            command: program and arguments; the program is looked up on PATH.
            environment: all its environment variables.

        Raises:
            CommandError: there is no such program, or it cannot be executed.
        """
        self._before = {s: signal.getsignal(s) for s in (*_PASSED_ON, signal.SIGCHLD)}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)
        self._pid = 0
        try:
            # Python ignores these two for itself; a program expects what it would have found without us.
            self._pid = os.posix_spawnp(
                command[0], command, environment,
                setsigmask=self._mask, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )  # fmt: skip
        except OSError as e:
            self._restore()
            missing = isinstance(e, FileNotFoundError)
            raise CommandError(
                f"{printable(command[0])}: {'no such command' if missing else (e.strerror or str(e)).lower()}",
                NOT_FOUND if missing else NOT_EXECUTABLE,
            ) from None
        except ValueError as e:  # an argument with a null byte
            self._restore()
            raise CommandError(f"{printable(command[0])}: {e}", NOT_EXECUTABLE) from None
        # Threads of numpy's do not block signals. While we wait the kernel prefers us; for the moments between there
        # are handlers. (A signal that was ignored is passed on as well: the program may have changed its mind.)
        for number in _PASSED_ON:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def wait(self) -> int:
        """Pass signals on until the command has ended.

        Returns:
            Its exit code; 128 + n where signal n ended it.
        """
        try:
            while True:
                ended, code = os.waitpid(self._pid, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(code) if os.WIFEXITED(code) else 128 + os.WTERMSIG(code)
                arrived = signal.sigtimedwait(self._before, _LOOK_AGAIN)
                if arrived is not None and arrived.si_signo != signal.SIGCHLD and arrived.si_code <= _SI_USER:
                    self._pass_on(arrived.si_signo)
        finally:
            while signal.sigtimedwait(self._before, 0) is not None:
                pass  # was for the command, which is over
            self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._pid, number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
