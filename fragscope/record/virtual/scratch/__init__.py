"""What operators take on a card besides their results, and in which order: their scratch.

Modules by kind of operator; each has ``PLANS``, by name of the operator: a function of its arguments, its results and
the card, which returns the :class:`~fragscope.record.virtual.scratch.plan.Plan`.
"""

from fragscope.record.virtual.scratch import (
    attention_kernels,
    converted,
    convolutions,
    images,
    indexed,
    lists,
    normalised,
    reductions,
    sampling,
    selected,
    sorting,
)

_KINDS = (
    attention_kernels,
    converted,
    convolutions,
    images,
    indexed,
    lists,
    normalised,
    reductions,
    sampling,
    selected,
    sorting,
)
PLANS = {name: plan for kind in _KINDS for name, plan in kind.PLANS.items()}
"""By name of the operator."""
