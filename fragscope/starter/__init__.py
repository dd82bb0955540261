"""The files with which a repository begins: a scenario, budgets, a workflow. Nothing of the repository is imported."""

from fragscope.starter.files import Plan, plan_files
from fragscope.starter.loader import Loader, Parameter, find_loader
from fragscope.starter.repository import Repository, look_at
from fragscope.starter.write import write_all

__all__ = ["Loader", "Parameter", "Plan", "Repository", "find_loader", "look_at", "plan_files", "write_all"]
