"""What the schema of an operator says of it."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from fragscope.record.virtual.arguments import tensors_in
from fragscope.record.virtual.footprints import (
    GEMMS,
    NO_KERNEL,
    ORDERED_ON_DEMAND,
    OUTPUT_ORDER,
    SHAPE_OF_INPUT,
    is_known,
)
from fragscope.record.virtual.operand_types import CHECKS
from fragscope.record.virtual.overlaps import UNCHECKED
from fragscope.record.virtual.scratch import PLANS
from fragscope.record.virtual.scratch.composites import COMPOSITES
from fragscope.record.virtual.value_rules import FILLED

_DATA_DEPENDENT = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})

_RUNNING = frozenset({3, 4})
_WRITTEN_UNMARKED = {
    "aten::native_batch_norm": _RUNNING,
    "aten::cudnn_batch_norm": _RUNNING,
    "aten::batch_norm_gather_stats": _RUNNING,
    "aten::batch_norm_gather_stats_with_counts": _RUNNING,
    "aten::batch_norm_update_stats": frozenset({1, 2}),
}
"""Positions of running means and variances, which these write although their schemas say nothing of it.

Source: aten/src/ATen/native/cuda/Normalization.cu and cudnn/BatchNorm.cpp.
"""
_TRAINING = {"aten::native_batch_norm": 5, "aten::cudnn_batch_norm": 5}
"""Position of the argument without which those are only read."""


class Trait:
    """What an operator's schema says, looked up once.

    Attributes:
        is_view: outputs share an input's storage, or only the tensor's own shape changes; runs on the program's
            tensors.
        is_known: its allocations on a card are known.
        is_mutable: it writes to an argument.
        is_checked: it refuses to write where elements, or an input, overlap.
        check: refuses operands that its kernel does not take; None where the rules for shapes do.
        is_gemm: it runs in cuBLAS.
        may_be_ordered: it takes other steps with deterministic algorithms.
        made_of: makes its result of other operators, where torch does so on a card alone.
        plan: tells its scratch; None where the order of its outputs is all there is to say.
        order: the order its outputs are allocated in, where it is not that of the results.
        writes_only: it returns nothing: all it does is write to its arguments.
        has_kernel: it touches memory.
        fills: it writes one number everywhere, whatever was there.
        is_composite: torch makes it of other operators, on every device.
        needs_values: it returns a number, or its result is as large as values make it.
    """

    __slots__ = (
        "_makes",
        "_reads",
        "_training",
        "_unmarked",
        "_written",
        "check",
        "fills",
        "has_kernel",
        "is_checked",
        "is_composite",
        "is_gemm",
        "is_known",
        "is_mutable",
        "is_view",
        "made_of",
        "may_be_ordered",
        "needs_values",
        "order",
        "plan",
        "writes_only",
    )  # fmt: skip

    def __init__(self, func: Any) -> None:
        schema = func._schema
        aliases = [r.alias_info for r in schema.returns]
        views = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
        self.is_view = views or torch.Tag.inplace_view in func.tags
        self.is_known = self.is_view or is_known(func)
        self._unmarked = _WRITTEN_UNMARKED.get(schema.name, frozenset())
        self._training = _TRAINING.get(schema.name)
        self.is_mutable = schema.is_mutable or bool(self._unmarked)
        self.is_checked = schema.is_mutable and torch.Tag.pointwise in func.tags and schema.name not in UNCHECKED
        # Overloads that name the type of their result have rules of their own, which differ between releases.
        self.check = None if "dtype" in schema.overload_name else CHECKS.get(schema.name)
        self.may_be_ordered = schema.name in ORDERED_ON_DEMAND
        self.is_gemm = schema.name in GEMMS
        self.made_of = None if schema.is_mutable else COMPOSITES.get(schema.name)
        self.plan = PLANS.get(schema.name)
        self.order = OUTPUT_ORDER.get(schema.name)
        self.writes_only = schema.is_mutable and not schema.returns
        self.has_kernel = not self.is_view and schema.name not in NO_KERNEL
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        # What has a kernel of the host's besides has one of the card's.
        self.is_composite = has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CPU")
        self.needs_values = not _DATA_DEPENDENT.isdisjoint(func.tags)
        self.fills = schema.name in FILLED
        self._reads = schema.name not in SHAPE_OF_INPUT
        self._makes = any(a is None for a in aliases)
        self._written = frozenset(
            key
            for position, a in enumerate(schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
            for key in (position, a.name)
        )

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors among its arguments that one call writes to."""
        given, written = itertools.chain(enumerate(args), kwargs.items()), self._keys(args)
        return [t for key, value in given if key in written for t in tensors_in((value,))]

    def _keys(self, args: tuple[Any, ...]) -> frozenset[int | str]:
        """Positions and names of the arguments that one call writes to."""
        if self._unmarked and (self._training is None or args[self._training]):
            return self._written | self._unmarked
        return self._written

    def accesses(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors that one call reads, and those that it writes."""
        reads: list[torch.Tensor] = []
        writes = list(tensors_in((out,))) if self._makes else []
        if not self._reads:
            return reads, writes
        written = self._keys(args)
        for key, value in itertools.chain(enumerate(args), kwargs.items()):
            (writes if key in written else reads).extend(tensors_in((value,)))
        return reads, writes
