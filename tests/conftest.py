"""Marks the root of the tests, so that modules beside this file (builders) can be imported by name."""
