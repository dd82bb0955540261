"""``fragscope record -- COMMAND``: any command, unmodified, with a recording of each of its processes that uses CUDA.

``bootstrap`` is loaded by every Python process of the command and waits for CUDA; ``process`` is the recording of one.
``session_folder`` is how they and the command that records talk. ``command`` runs the program (signals, exit code) and
``session`` everything, up to what is left to do when the program is over.
"""

from fragscope.record.launch.session import Launched, LaunchOptions, RecordedProcess, launch

__all__ = ["LaunchOptions", "Launched", "RecordedProcess", "launch"]
