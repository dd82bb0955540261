"""What this machine can do: each question is a check over facts that were gathered before, so that all run anywhere."""

from fragscope.doctor.check import Check, Diagnosis, Status
from fragscope.doctor.diagnose import CHECKS, diagnose
from fragscope.doctor.gather import this_machine
from fragscope.doctor.machine import Machine

__all__ = ["CHECKS", "Check", "Diagnosis", "Machine", "Status", "diagnose", "this_machine"]
