"""TOML files that strangers wrote: read with bounds, and every complaint names its line."""

from fragscope.toml.lines import KeyLines
from fragscope.toml.read import TomlFile, nearest, parse_toml, quoted, read_toml

__all__ = ["KeyLines", "TomlFile", "nearest", "parse_toml", "quoted", "read_toml"]
