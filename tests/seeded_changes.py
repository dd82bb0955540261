# ruff: noqa: E501  # a change is easier to check where its lines stand whole
"""An engine's loader, twenty-five changes that make it need more memory, and twenty that do not.

The loader is of the kind found in inference engines and knows nothing of fragscope: parameters on the card, a
checkpoint read expert by expert, weights brought into the order of kernels, scales folded in by parts, a warm-up
through a workspace, a cache for keys and values, a step of training for an adapter. Each change replaces text in one of its files. What it costs follows
by hand from the scenario's shapes; the comments say how.
"""

from __future__ import annotations

from dataclasses import dataclass

FILES = {
    "__init__.py": "",
    "adapter.py": '''\
"""A small adapter, and a step of its training."""

import torch


class Adapter(torch.nn.Module):
    def __init__(self, hidden, rank):
        super().__init__()
        self.down = torch.nn.Parameter(torch.empty(rank, hidden, dtype=torch.bfloat16, device="cuda"))
        self.up = torch.nn.Parameter(torch.empty(hidden, rank, dtype=torch.bfloat16, device="cuda"))

    def forward(self, states):
        reduced = torch.nn.functional.linear(states, self.down)
        return torch.nn.functional.linear(reduced, self.up)


def make_adapter(hidden, rank):
    return Adapter(hidden, rank)


def train(adapter, tokens):
    states = torch.zeros(tokens, adapter.down.shape[1], dtype=adapter.down.dtype, device="cuda")
    loss = adapter(states).square().mean()
    loss.backward()
''',
    "experts.py": '''\
"""Expert weights of one layer."""

import torch

from .layout import fold_scales, shuffle_experts


class ExpertWeights(torch.nn.Module):
    def __init__(self, experts, hidden, intermediate, dtype=torch.bfloat16):
        super().__init__()
        w13 = torch.empty(experts, 2 * intermediate, hidden, dtype=dtype, device="cuda")
        w2 = torch.empty(experts, hidden, intermediate, dtype=dtype, device="cuda")
        scale13 = torch.ones(experts, 2 * intermediate, 1, dtype=torch.float32, device="cuda")
        self.w13 = torch.nn.Parameter(w13, requires_grad=False)
        self.w2 = torch.nn.Parameter(w2, requires_grad=False)
        self.scale13 = torch.nn.Parameter(scale13, requires_grad=False)

    def load_expert(self, expert, gate, up, down):
        rows = gate.shape[0]
        gate = gate.cuda()
        self.w13.data[expert, :rows].copy_(gate)
        del gate
        up = up.cuda()
        self.w13.data[expert, rows:].copy_(up)
        del up
        self.w2.data[expert].copy_(down.cuda())

    def process_weights_after_loading(self):
        fold_scales(self.w13.data, self.scale13.data)
        shuffled = shuffle_experts(self.w13.data)
        self.w13.data = shuffled
        del shuffled
        self.w2.data = shuffle_experts(self.w2.data)
''',
    "layout.py": '''\
"""Weights in the order of the kernels."""

import torch

CHUNK = 2


def row_order(rows, device):
    """Up before gate."""
    index = torch.arange(rows, device=device)
    return (index + rows // 2) % rows


def shuffle_experts(weight):
    """``[experts, rows, columns]``, the rows of each expert in the kernel's order."""
    order = row_order(weight.shape[1], weight.device)
    out = torch.empty_like(weight)
    for expert in range(weight.shape[0]):
        torch.index_select(weight[expert], 0, order, out=out[expert])
    return out


def fold_scales(weight, scale):
    """Multiply by scales in float32, some experts at a time."""
    for start in range(0, weight.shape[0], CHUNK):
        part = weight[start : start + CHUNK].float()
        part.mul_(scale[start : start + CHUNK])
        weight[start : start + CHUNK].copy_(part)
        del part
''',
    "loader.py": '''\
"""A model from a checkpoint."""

from .experts import ExpertWeights
from .workspace import KeyValueCache, Workspace, warm_up


def read_expert(checkpoint, layer, expert):
    """Gate, up and down of one expert, on the host."""
    return checkpoint["gate"], checkpoint["up"], checkpoint["down"]


def load_layer(weights, checkpoint, layer):
    for expert in range(weights.w13.shape[0]):
        gate, up, down = read_expert(checkpoint, layer, expert)
        weights.load_expert(expert, gate, up, down)
    weights.process_weights_after_loading()


def load_model(layers, experts, hidden, intermediate, checkpoint):
    model = [ExpertWeights(experts, hidden, intermediate) for _ in range(layers)]
    for number, weights in enumerate(model):
        load_layer(weights, checkpoint, number)
    return model


def start(model, hidden, tokens):
    workspace = Workspace(tokens, hidden)
    for weights in model:
        warm_up(weights, workspace)
    return KeyValueCache(len(model), tokens, hidden)
''',
    "workspace.py": '''\
"""Scratch for forward passes, and what stays between them."""

import torch

STEP = 1024


class Workspace:
    def __init__(self, tokens, hidden):
        self.hidden = hidden
        self.tokens = tokens
        self.scratch = torch.empty(STEP, hidden, dtype=torch.bfloat16, device="cuda")


@torch.inference_mode()
def warm_up(weights, workspace):
    """One pass over all tokens, a step at a time."""
    for _ in range(0, workspace.tokens, STEP):
        states = workspace.scratch.zero_()
        gate_up = torch.mm(states, weights.w13[0].t())
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate).mul_(up)
        del gate_up, gate, up
        torch.mm(activated, weights.w2[0].t(), out=states)
        del activated


class KeyValueCache:
    def __init__(self, layers, tokens, hidden, dtype=torch.bfloat16):
        self.blocks = [torch.empty(2, tokens, hidden, dtype=dtype, device="cuda") for _ in range(layers)]

    def block(self, layer):
        return self.blocks[layer]
''',
}

SCENARIO = """\
import torch
from {package}.adapter import make_adapter, train
from {package}.layout import fold_scales
from {package}.loader import load_model, read_expert, start

import fragscope

PRESETS = {{"small": {{"layers": 3, "experts": 16, "hidden": 1024, "intermediate": 512, "tokens": 4096}}}}


def checkpoint(case):
    half = torch.zeros(case.intermediate, case.hidden, dtype=torch.bfloat16)
    return {{"gate": half, "up": half, "down": half.t().contiguous()}}


@fragscope.scenario("{name}-load", presets=PRESETS, variant="engine")
def load(case):
    host = checkpoint(case)
    with case.measure():
        model = load_model(case.layers, case.experts, case.hidden, case.intermediate, host)


def one_layer(case):
    return load_model(1, case.experts, case.hidden, case.intermediate, checkpoint(case))[0]


@fragscope.scenario("{name}-read", presets=PRESETS, variant="engine")
def read(case):
    host, weights = checkpoint(case), one_layer(case)
    with case.measure():
        for expert in range(case.experts):
            weights.load_expert(expert, *read_expert(host, 0, expert))


@fragscope.scenario("{name}-fold", presets=PRESETS, variant="engine")
def fold(case):
    weights = one_layer(case)
    with case.measure():
        fold_scales(weights.w13.data, weights.scale13.data)


@fragscope.scenario("{name}-start", presets=PRESETS, variant="engine")
def started(case):
    model = load_model(case.layers, case.experts, case.hidden, case.intermediate, checkpoint(case))
    with case.measure():
        cache = start(model, case.hidden, case.tokens)


@fragscope.scenario("{name}-train", presets=PRESETS, variant="engine")
def trained(case):
    with case.measure():
        adapter = make_adapter(case.hidden, 64)
        train(adapter, case.tokens)
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one file, or of several.

    Attributes:
        name: of the change.
        edits: file, text, and what takes its place; each text occurs once.
        case: ``load``, ``read``, ``fold``, ``start`` or ``train``: where it shows; ``""`` for one that shows nowhere.
        line: a part of the line, after the change, that holds what it costs.
        look: where that line is none of the change, how the line of it begins that keeps the memory.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    case: str = ""
    line: str = ""
    look: str = ""


def _change(name: str, *edits: tuple[str, str, str], case: str = "", line: str = "", look: str = "") -> Change:
    return Change(name, edits, case, line, look)


REGRESSIONS = (
    _change(  # all experts of w13 in a list beside the stack of them: 32 MiB
        "list-and-stack",
        ("layout.py", "    out = torch.empty_like(weight)\n", "    out = []\n"),
        (
            "layout.py",
            "        torch.index_select(weight[expert], 0, order, out=out[expert])\n    return out\n",
            "        out.append(torch.index_select(weight[expert], 0, order))\n    return torch.stack(out)\n",
        ),
        case="load",
        line="return torch.stack(out)",
    ),
    _change(  # the old w13 beside the new, while w2 is shuffled: the peak is 16 MiB higher
        "old-weights-kept",
        (
            "experts.py",
            "        shuffled = shuffle_experts(self.w13.data)\n",
            "        old = self.w13.data\n        shuffled = shuffle_experts(self.w13.data)\n",
        ),
        case="load",
        line="w13 = torch.empty(experts, 2 * intermediate, hidden",
    ),
    _change(  # two experts in float32 while the next two are made: 8 MiB
        "missing-del",
        ("layout.py", "        del part\n", ""),
        case="fold",
        line="part = weight[start : start + CHUNK].float()",
    ),
    _change(  # of each expert: 2 MiB
        "needless-clone",
        ("layout.py", "torch.index_select(weight[expert], 0,", "torch.index_select(weight[expert].clone(), 0,"),
        case="load",
        line="torch.index_select(weight[expert].clone(), 0, order, out=out[expert])",
    ),
    _change(  # 2 MiB that stay for as long as the workspace
        "doubled-scratch",
        ("workspace.py", "torch.empty(STEP, hidden,", "torch.empty(2 * STEP, hidden,"),
        ("workspace.py", "states = workspace.scratch.zero_()", "states = workspace.scratch[:STEP].zero_()"),
        case="start",
        line="self.scratch = torch.empty(2 * STEP, hidden,",
    ),
    _change(  # 8 bytes a value instead of 4: 8 MiB more for two experts
        "wider-dtype",
        ("layout.py", ".float()", ".double()"),
        case="fold",
        line="part = weight[start : start + CHUNK].double()",
    ),
    _change(  # all 16 experts as float32: 64 MiB
        "lost-chunk",
        (
            "layout.py",
            "    for start in range(0, weight.shape[0], CHUNK):\n"
            "        part = weight[start : start + CHUNK].float()\n"
            "        part.mul_(scale[start : start + CHUNK])\n"
            "        weight[start : start + CHUNK].copy_(part)\n"
            "        del part\n",
            "    part = weight.float()\n    part.mul_(scale)\n    weight.copy_(part)\n",
        ),
        case="load",
        line="part = weight.float()",
    ),
    _change(  # 2 MiB a layer that stay
        "buffer-per-layer",
        (
            "experts.py",
            "        self.scale13 =",
            '        self.scratch = torch.empty(2 * intermediate, hidden, dtype=dtype, device="cuda")\n        self.scale13 =',
        ),
        case="load",
        line="self.scratch = torch.empty(2 * intermediate, hidden,",
    ),
    _change(  # the last layer's old w13 and w2, 32 and 16 MiB, stay
        "cached-reference",
        ("layout.py", "CHUNK = 2\n", "CHUNK = 2\n_LAST = {}\n"),
        (
            "layout.py",
            "    out = torch.empty_like(weight)\n",
            "    _LAST[weight.shape] = weight\n    out = torch.empty_like(weight)\n",
        ),
        case="load",
        line="w13 = torch.empty(experts, 2 * intermediate, hidden",
    ),
    _change(  # every row order of every layer stays: 8 KiB each
        "default-argument-leak",
        ("layout.py", "def row_order(rows, device):\n", "def row_order(rows, device, made=[]):\n"),
        (
            "layout.py",
            "    return (index + rows // 2) % rows\n",
            "    made.append((index + rows // 2) % rows)\n    return made[-1]\n",
        ),
        case="load",
        line="made.append((index + rows // 2) % rows)",
    ),
    _change(  # a copy of two experts in float32 beside them: 8 MiB
        "out-of-place",
        (
            "layout.py",
            "        part.mul_(scale[start : start + CHUNK])\n",
            "        part = part * scale[start : start + CHUNK]\n",
        ),
        case="fold",
        line="part = part * scale[start : start + CHUNK]",
    ),
    _change(  # a gathered expert on its way into its place: 2 MiB
        "gathered-then-copied",
        (
            "layout.py",
            "torch.index_select(weight[expert], 0, order, out=out[expert])",
            "out[expert] = torch.index_select(weight[expert], 0, order)",
        ),
        case="load",
        line="out[expert] = torch.index_select(weight[expert], 0, order)",
    ),
    _change(  # all experts of a layer on the card before the first is copied: 16 times 3 MiB
        "whole-checkpoint-on-card",
        (
            "loader.py",
            "    for expert in range(weights.w13.shape[0]):\n"
            "        gate, up, down = read_expert(checkpoint, layer, expert)\n",
            "    experts = range(weights.w13.shape[0])\n"
            "    staged = [[t.cuda() for t in read_expert(checkpoint, layer, expert)] for expert in experts]\n"
            "    for expert, (gate, up, down) in enumerate(staged):\n",
        ),
        case="load",
        line="staged = [[t.cuda() for t in read_expert(checkpoint, layer, expert)] for expert in experts]",
    ),
    _change(  # 4 bytes a value instead of 2: 48 MiB more
        "wider-cache",
        (
            "workspace.py",
            "def __init__(self, layers, tokens, hidden, dtype=torch.bfloat16)",
            "def __init__(self, layers, tokens, hidden, dtype=torch.float32)",
        ),
        case="start",
        line="self.blocks = [torch.empty(2, tokens, hidden, dtype=dtype",
    ),
    _change(  # the blocks so far, the next, and all of them joined at once: 48 MiB
        "grown-by-concatenation",
        (
            "workspace.py",
            '        self.blocks = [torch.empty(2, tokens, hidden, dtype=dtype, device="cuda") for _ in range(layers)]\n',
            '        blocks = torch.empty(0, 2, tokens, hidden, dtype=dtype, device="cuda")\n'
            "        for _ in range(layers):\n"
            '            blocks = torch.cat([blocks, torch.empty(1, 2, tokens, hidden, dtype=dtype, device="cuda")])\n'
            "        self.blocks = blocks.unbind()\n",
        ),
        case="start",
        line="blocks = torch.cat([blocks,",
    ),
    _change(  # what a step leaves in the workspace for the next: 1 MiB
        "kept-for-debugging",
        ("workspace.py", "        del activated\n", "        workspace.last = activated\n        del activated\n"),
        case="start",
        line="activated = torch.nn.functional.silu(gate).mul_(up)",
    ),
    _change(  # the view keeps all of it: 48 MiB of rows that nobody uses
        "view-keeps-storage",
        (
            "workspace.py",
            "        self.blocks = [torch.empty(2, tokens, hidden,",
            "        self.blocks = [torch.empty(2, 2 * tokens, hidden,",
        ),
        ("workspace.py", "for _ in range(layers)]", "[:, :tokens] for _ in range(layers)]"),
        case="start",
        line="self.blocks = [torch.empty(2, 2 * tokens, hidden,",
    ),
    _change(  # gate and up of an expert are on the card together: 1 MiB
        "read-ahead",
        (
            "experts.py",
            "        gate = gate.cuda()\n        self.w13.data[expert, :rows].copy_(gate)\n        del gate\n        up = up.cuda()\n",
            "        gate, up = gate.cuda(), up.cuda()\n        self.w13.data[expert, :rows].copy_(gate)\n        del gate\n",
        ),
        case="read",
        line="gate, up = gate.cuda(), up.cuda()",
    ),
    _change(  # rows padded to a multiple of 640 instead of none: 1,280 instead of 1,024, 8 MiB a layer
        "padded-too-far",
        (
            "experts.py",
            '        w13 = torch.empty(experts, 2 * intermediate, hidden, dtype=dtype, device="cuda")\n',
            "        rows = -(-2 * intermediate // 640) * 640\n"
            '        w13 = torch.empty(experts, rows, hidden, dtype=dtype, device="cuda")[:, : 2 * intermediate]\n',
        ),
        case="load",
        line="w13 = torch.empty(experts, rows, hidden",
    ),
    _change(  # the error that was got over keeps its frames, and with them both scratches: 4 MiB
        "stored-exception",
        (
            "workspace.py",
            '        self.scratch = torch.empty(STEP, hidden, dtype=torch.bfloat16, device="cuda")\n',
            '        try:\n            self.scratch = aligned(torch.empty(STEP + 1, hidden, dtype=torch.bfloat16, device="cuda"))\n'
            "        except ValueError as e:\n            self.error = e\n"
            '            self.scratch = torch.empty(STEP, hidden, dtype=torch.bfloat16, device="cuda")\n',
        ),
        (
            "workspace.py",
            "class Workspace:\n",
            "def aligned(scratch):\n    if scratch.shape[0] % 128:\n        raise ValueError(scratch.shape)\n    return scratch\n\n\nclass Workspace:\n",
        ),
        case="start",
        line="self.scratch = aligned(torch.empty(STEP + 1, hidden,",
    ),
    _change(  # one request a call becomes three, two of which live at once: 32 MiB, six calls, the peak in the first
        "asked-for-thrice",
        ("layout.py", "out = torch.empty_like(weight)", "out = torch.empty_like(weight).clone().clone()"),
        case="load",
        line="out = torch.empty_like(weight).clone().clone()",
    ),
    _change(  # six requests a turn instead of one: a copy, the sum so far and the next live at once: 16 MiB
        "sum-of-copies",
        (
            "layout.py",
            "        part = weight[start : start + CHUNK].float()\n",
            "        part = sum(weight[start : start + CHUNK].float() for _ in range(3))\n",
        ),
        case="fold",
        line="part = sum(weight[start : start + CHUNK].float() for _ in range(3))",
    ),
    _change(  # 0.5 MiB of weights in float32, for which all states and gradients are float32, too: 8 MiB each
        "module-to-float",
        ("adapter.py", "    return Adapter(hidden, rank)\n", "    return Adapter(hidden, rank).float()\n"),
        case="train",
        line="return Adapter(hidden, rank).float()",
    ),
    _change(  # the old w13 of layers that are done, 32 MiB each, until the model is returned
        "kept-in-a-dict",
        (
            "loader.py",
            "    for number, weights in enumerate(model):\n",
            "    before = {number: weights.w13.data for number, weights in enumerate(model)}\n"
            "    for number, weights in enumerate(model):\n",
        ),
        case="load",
        line="w13 = torch.empty(experts, 2 * intermediate, hidden",
        look="before = {number: weights.w13.data for",
    ),
    _change(  # the same for good: a cache on a method keeps what it returned, and the object besides
        "cached-method",
        ("experts.py", "import torch\n", "import functools\n\nimport torch\n"),
        (
            "experts.py",
            "    def process_weights_after_loading(self):\n",
            "    @functools.lru_cache(maxsize=None)\n    def raw(self):\n        return self.w13.data\n\n"
            "    def process_weights_after_loading(self):\n        self.raw()\n",
        ),
        case="load",
        line="w13 = torch.empty(experts, 2 * intermediate, hidden",
        look="self.raw()",
    ),
)

REFACTORINGS = (
    _change(
        "renamed-locals",
        (
            "layout.py",
            "    order = row_order(weight.shape[1], weight.device)\n    out = torch.empty_like(weight)\n    for expert in range(weight.shape[0]):\n        torch.index_select(weight[expert], 0, order, out=out[expert])\n    return out\n",
            "    rows = row_order(weight.shape[1], weight.device)\n    result = torch.empty_like(weight)\n    for e in range(weight.shape[0]):\n        torch.index_select(weight[e], 0, rows, out=result[e])\n    return result\n",
        ),
    ),
    _change("moved-down", ("layout.py", "CHUNK = 2\n", "CHUNK = 2\n" + "# A word about layouts.\n" * 40)),
    _change(
        "function-to-another-file",
        (
            "layout.py",
            '''def row_order(rows, device):
    """Up before gate."""
    index = torch.arange(rows, device=device)
    return (index + rows // 2) % rows
''',
            "from .orders import row_order\n",
        ),
        (
            "orders.py",
            "",
            '''import torch


def row_order(rows, device):
    """Up before gate."""
    index = torch.arange(rows, device=device)
    return (index + rows // 2) % rows
''',
        ),
    ),
    _change(
        "extracted-function",
        (
            "layout.py",
            "        torch.index_select(weight[expert], 0, order, out=out[expert])\n    return out\n",
            "        _gather(weight[expert], order, out[expert])\n    return out\n\n\ndef _gather(rows, order, out):\n    torch.index_select(rows, 0, order, out=out)\n",
        ),
    ),
    _change(
        "inlined-function",
        (
            "layout.py",
            "    order = row_order(weight.shape[1], weight.device)\n",
            "    rows = weight.shape[1]\n    order = torch.arange(rows, device=weight.device)\n    order = (order + rows // 2) % rows\n",
        ),
    ),
    _change(
        "device-object",
        (
            "workspace.py",
            'dtype=torch.bfloat16, device="cuda")',
            'dtype=torch.bfloat16, device=torch.device("cuda", 0))',
        ),
    ),
    _change(
        "shape-as-tuple",
        ("experts.py", "torch.empty(experts, hidden, intermediate,", "torch.empty((experts, hidden, intermediate),"),
    ),
    _change("to-instead-of-cuda", ("experts.py", "gate = gate.cuda()", 'gate = gate.to("cuda")')),
    _change(
        "scope-instead-of-del",
        (
            "experts.py",
            "        gate = gate.cuda()\n        self.w13.data[expert, :rows].copy_(gate)\n        del gate\n        up = up.cuda()\n        self.w13.data[expert, rows:].copy_(up)\n        del up\n",
            "        self.w13.data[expert, :rows].copy_(gate.cuda())\n        self.w13.data[expert, rows:].copy_(up.cuda())\n",
        ),
    ),
    _change(
        "zeros-as-empty",
        (
            "experts.py",
            'scale13 = torch.ones(experts, 2 * intermediate, 1, dtype=torch.float32, device="cuda")',
            'scale13 = torch.empty(experts, 2 * intermediate, 1, dtype=torch.float32, device="cuda").fill_(1)',
        ),
    ),
    _change(
        "in-place-by-out",
        (
            "layout.py",
            "        part.mul_(scale[start : start + CHUNK])\n",
            "        torch.mul(part, scale[start : start + CHUNK], out=part)\n",
        ),
    ),
    _change(
        "narrow-instead-of-slice",
        ("layout.py", "weight[start : start + CHUNK].copy_(part)", "weight.narrow(0, start, CHUNK).copy_(part)"),
    ),
    _change(
        "early-return",
        (
            "layout.py",
            "    order = row_order(weight.shape[1], weight.device)\n",
            "    if weight.shape[0] == 0:\n        return weight\n    order = row_order(weight.shape[1], weight.device)\n",
        ),
    ),
    _change(
        "logging",
        ("loader.py", "from .experts import ExpertWeights\n", "import logging\n\nfrom .experts import ExpertWeights\n"),
        (
            "loader.py",
            "    weights.process_weights_after_loading()\n",
            '    logging.getLogger(__name__).debug("layer %d is read", layer)\n    weights.process_weights_after_loading()\n',
        ),
    ),
    _change(
        "assertions",
        (
            "layout.py",
            "    out = torch.empty_like(weight)\n",
            "    assert weight.is_cuda and weight.dim() == 3, weight.shape\n    out = torch.empty_like(weight)\n",
        ),
    ),
    _change(
        "keyword-arguments",
        (
            "experts.py",
            "        fold_scales(self.w13.data, self.scale13.data)\n",
            "        fold_scales(weight=self.w13.data, scale=self.scale13.data)\n",
        ),
    ),
    _change(
        "renamed-class",
        ("experts.py", "class ExpertWeights(torch.nn.Module):", "class FusedExperts(torch.nn.Module):"),
        ("loader.py", "from .experts import ExpertWeights\n", "from .experts import FusedExperts\n"),
        ("loader.py", "[ExpertWeights(experts,", "[FusedExperts(experts,"),
    ),
    _change(
        "type-annotations",
        (
            "layout.py",
            "def fold_scales(weight, scale):",
            "def fold_scales(weight: torch.Tensor, scale: torch.Tensor) -> None:",
        ),
        ("layout.py", "def shuffle_experts(weight):", "def shuffle_experts(weight: torch.Tensor) -> torch.Tensor:"),
    ),
    _change(
        "no-grad-for-inference",
        ("workspace.py", "@torch.inference_mode()\n", "@torch.no_grad()\n"),
    ),
    _change(
        "loop-into-generator",
        (
            "loader.py",
            "    for expert in range(weights.w13.shape[0]):\n        gate, up, down = read_expert(checkpoint, layer, expert)\n        weights.load_expert(expert, gate, up, down)\n",
            "    experts = range(weights.w13.shape[0])\n    read = (read_expert(checkpoint, layer, expert) for expert in experts)\n    for expert, tensors in enumerate(read):\n        weights.load_expert(expert, *tensors)\n",
        ),
    ),
)


def package(name: str, changes: tuple[Change, ...] = ()) -> dict[str, str]:
    """Files of the loader as a package, with changes made.

    Raises:
        ValueError: a change's text does not occur once.
    """
    files = dict(FILES)
    for change in changes:
        for file, old, new in change.edits:
            text = files.get(file, "")
            if text.count(old) != 1 and (old or text):
                raise ValueError(f"{change.name}: {file} has {text.count(old)} times {old!r}")
            files[file] = text.replace(old, new) if old else new
    return {f"{name}/{file}": text for file, text in files.items()}


def scenario(name: str, of: str) -> str:
    """The scenario file for a package of that name."""
    return SCENARIO.format(name=name, package=of)
