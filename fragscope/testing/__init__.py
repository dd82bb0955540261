"""What the pytest plugin is made of: markers read, tests recorded, requests measured, reports written.

Nothing here is imported before a test is to be measured; the names below are all that the plugin needs at its start.
"""

MARKER = "gpu_memory_budget"
RECORDER = "fragscope_recorder"
DEVICE = "fragscope_device"

__all__ = ["DEVICE", "MARKER", "RECORDER"]
