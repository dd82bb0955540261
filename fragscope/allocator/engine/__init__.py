"""The allocator model as functions over tables, run interpreted or compiled from the same source."""
