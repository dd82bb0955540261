"""Keys and values of all layers, kept while a model writes token after token.

Source: transformers 5.23.0, ``DynamicLayer.update`` and ``StaticLayer.update`` in ``cache_utils.py``; #25930 and #30536
there are about what growing by concatenation costs. The first concatenates: at each token every layer's cache moves
into a slightly larger tensor. The second has room for a number of tokens that must be known beforehand. ``dynamic`` and
``static`` are their own classes, run as they are installed; ``concatenated`` and ``preallocated`` ask for the same
memory in the same order, and need nothing but torch. ``chunked`` is a proposal that serves any length.

The presets show two ways in which concatenation fragments. Each tensor of ``llama-2-7b`` is beyond 10 MiB and has a
segment of its own; the prompt's are too small from the first token on. Tensors of ``mistral-7b`` share segments of
20 MiB until they grow past 10 MiB: from then on a segment holds one, and what is left of it is too small for another.
Under ``max_split_size_mb:20`` a segment of 20 MiB that is whole again serves nothing smaller until the card is full.

A step is the prompt first, then one token. Each layer makes its keys and values, hands them to the cache, and is done
with them and with what it got back before the next layer begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

import fragscope

# Layers, heads of keys and values, and their size: transformers 5.23.0 defaults of LlamaConfig and MistralConfig. All
# layers attend to all tokens; Mistral 7B has its window in its first release only, and is shaped like Llama 3 8B.
PRESETS: dict[str, dict[str, int]] = {
    "llama-2-7b": {"layers": 32, "heads": 32, "head_dim": 128, "batch": 4, "prompt": 512, "tokens": 64},
    "mistral-7b": {"layers": 32, "heads": 8, "head_dim": 128, "batch": 8, "prompt": 608, "tokens": 64},
}
CHUNK = 16  # tokens

DYNAMIC_CACHE = fragscope.Installed("transformers", "transformers.cache_utils:DynamicCache")
STATIC_CACHE = fragscope.Installed("transformers", "transformers.cache_utils:StaticCache")
CONFIG = fragscope.Installed("transformers", "transformers.configuration_utils:PreTrainedConfig")

Pair = tuple[torch.Tensor, torch.Tensor]


class Growing(Protocol):
    """What holds the keys and values of all layers, each ``[batch, heads, tokens, head_dim]``."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> object:
        """Add tokens to a layer; what is returned is what its attention reads."""


class Concatenated:
    """A new tensor for old and new tokens together, in each layer at each step."""

    def __init__(self) -> None:
        self.held: dict[int, Pair] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> object:
        """Add tokens; keys first, whose old tensor is gone before the values move."""
        if layer not in self.held:
            self.held[layer] = (keys.clone(), values.clone())
        else:
            old_keys, old_values = self.held.pop(layer)
            old_keys = torch.cat([old_keys, keys], dim=-2)
            self.held[layer] = (old_keys, torch.cat([old_values, values], dim=-2))
        return self.held[layer]


class Preallocated:
    """Room for ``room`` tokens from a layer's first step on."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: dict[int, Pair] = {}
        self.lengths: dict[int, torch.Tensor] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> object:
        """Write tokens behind those that are there; how many those are is known on the card only."""
        if layer not in self.held:
            batch, heads, _, size = keys.shape
            whole = (batch, heads, self.room, size)
            self.held[layer] = (keys.new_zeros(whole), values.new_zeros(whole))
            self.lengths[layer] = torch.tensor(0).to(keys.device)
        places = torch.arange(keys.shape[-2], device=keys.device) + self.lengths[layer]
        self.lengths[layer].add_(keys.shape[-2])
        for held, new in zip(self.held[layer], (keys, values), strict=True):
            held.index_copy_(2, places, new)
        return self.held[layer]


class Chunked:
    """Room for ``CHUNK`` tokens of all layers at a time; nothing that is there ever moves.

    Attention has to read a layer's tokens chunk by chunk, as kernels for paged caches do.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.chunks: list[torch.Tensor] = []
        self.lengths = [0] * layers

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> object:
        """Write tokens into the last chunk, and into new ones as it fills up."""
        batch, heads, tokens, size = keys.shape
        written = 0
        while written < tokens:
            number, begin = divmod(self.lengths[layer], CHUNK)
            if number == len(self.chunks):
                self.chunks.append(keys.new_empty(self.layers, 2, batch, heads, CHUNK, size))
            count = min(CHUNK - begin, tokens - written)
            for place, new in zip(self.chunks[number][layer], (keys, values), strict=True):
                place[:, :, begin : begin + count].copy_(new[:, :, written : written + count])
            self.lengths[layer] += count
            written += count
        return self.chunks


def grow(case: fragscope.Case, cache: Growing) -> None:
    """Prefill, then one token at a time."""
    with case.measure():
        for count in (case.prompt, *[1] * case.tokens):
            for layer in range(case.layers):
                attend(case, cache, count, layer)


def attend(case: fragscope.Case, cache: Growing, count: int, layer: int) -> None:
    """What a layer does with its cache; its own tensors end with it."""
    shape = (case.batch, case.heads, count, case.head_dim)
    keys = torch.empty(shape, dtype=torch.bfloat16, device=case.device)
    values = torch.empty(shape, dtype=torch.bfloat16, device=case.device)
    cache.update(keys, values, layer)


def dynamic_cache() -> Any:
    """The installed class, for any model."""
    return DYNAMIC_CACHE.load()()


def static_cache(layers: int, room: int) -> Any:
    """The installed class, for a model whose layers all attend to all tokens."""
    return STATIC_CACHE.load()(CONFIG.load()(num_hidden_layers=layers), max_cache_len=room)


@fragscope.scenario(
    "kv-cache-growth",
    presets=PRESETS,
    variant="concatenated",
    source="transformers 5.23.0",
    replays=fragscope.Replays(
        "transformers", "5.23.0", "transformers.cache_utils:DynamicLayer.update", "320c00c0a9ef7b355201633f"
    ),
)
def kv_cache_growth(case: fragscope.Case) -> None:
    """Concatenated at each token."""
    grow(case, Concatenated())


@kv_cache_growth.variant(
    "preallocated",
    role="fixed",
    replays=fragscope.Replays(
        "transformers", "5.23.0", "transformers.cache_utils:StaticLayer.update", "bf794369bb8e9b34a3b10625"
    ),
)
def _(case: fragscope.Case) -> None:
    """Room for all tokens from the beginning; their number must be known."""
    grow(case, Preallocated(case.prompt + case.tokens))


@kv_cache_growth.installed("dynamic", DYNAMIC_CACHE)
def _(case: fragscope.Case) -> None:
    """DynamicCache of transformers, as it is installed."""
    grow(case, dynamic_cache())


@kv_cache_growth.installed("static", STATIC_CACHE)
def _(case: fragscope.Case) -> None:
    """StaticCache of transformers, as it is installed."""
    grow(case, static_cache(case.layers, case.prompt + case.tokens))


@kv_cache_growth.variant("chunked", role="proposed")
def _(case: fragscope.Case) -> None:
    """Room for the next tokens of all layers at once; any number of tokens, and nothing moves."""
    grow(case, Chunked(case.layers))


_STEPS = (21, *[1] * 13)  # a prompt that ends within a chunk, and tokens past the end of the next
_LAYERS = 2


def _new_tokens(device: str) -> list[list[Pair]]:
    """Random keys and values of every layer at every step, as bits: no two rounds of a format can hide a difference."""
    generator = torch.Generator().manual_seed(30536)

    def bits(count: int) -> torch.Tensor:
        made = torch.randint(-(2**15), 2**15, (2, 3, count, 4), dtype=torch.int16, generator=generator)
        return made.view(torch.bfloat16).to(device)

    return [[(bits(count), bits(count)) for _ in range(_LAYERS)] for count in _STEPS]


def _chunked_contents(cache: Chunked, layer: int) -> Sequence[torch.Tensor]:
    joined = torch.cat([chunk[layer] for chunk in cache.chunks], dim=-2)[..., : cache.lengths[layer], :]
    return list(joined)


_CACHES: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Sequence[torch.Tensor]]]] = {
    "concatenated": (Concatenated, lambda cache, layer: cache.held[layer]),
    "preallocated": (lambda: Preallocated(sum(_STEPS)), lambda cache, layer: cache.held[layer]),
    "dynamic": (
        dynamic_cache,
        lambda cache, layer: (cache.layers[layer].keys, cache.layers[layer].values),
    ),
    "static": (
        lambda: static_cache(_LAYERS, sum(_STEPS)),
        lambda cache, layer: (cache.layers[layer].keys, cache.layers[layer].values),
    ),
    "chunked": (lambda: Chunked(_LAYERS), _chunked_contents),
}


@kv_cache_growth.numeric
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """What a variant holds in the end: keys and values of each layer."""
    make, contents = _CACHES[variant]
    cache = make()
    for step in _new_tokens(device):
        for layer, (keys, values) in enumerate(step):
            cache.update(keys, values, layer)
    return [held for layer in range(_LAYERS) for held in contents(cache, layer)]


@kv_cache_growth.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Token by token, as they were given."""
    steps = _new_tokens("cpu")
    places = [(layer, which) for layer in range(_LAYERS) for which in range(2)]
    tokens = [[t for step in steps for t in step[layer][which].unbind(2)] for layer, which in places]
    return [torch.stack(each, dim=2).to(device) for each in tokens]
