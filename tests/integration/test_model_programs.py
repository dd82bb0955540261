"""Small whole programs, unmodified code for ``cuda``, to their end on the virtual card."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from virtual_cards import h100, live  # noqa: E402

import fragscope  # noqa: E402
from fragscope.errors import UnsupportedError  # noqa: E402

pytestmark = pytest.mark.torch
LAYERS, HEADS, WIDTH, VOCABULARY = 2, 4, 64, 512


def llama(attention: str = "sdpa", **more):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=HEADS * WIDTH, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        vocab_size=VOCABULARY, attn_implementation=attention, tie_word_embeddings=False, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def on_blocks(*sizes: int) -> int:
    """Bytes of blocks: multiples of 512."""
    return sum(-(-size // 512) * 512 for size in sizes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_decodes_and_holds_its_weights_and_its_cache(attention):
    with h100():
        model = llama(attention)
        hidden = HEADS * WIDTH
        weights = [VOCABULARY * hidden] * 2 + [hidden] + LAYERS * ([hidden**2] * 4 + [512 * hidden] * 3 + [hidden] * 2)
        frequencies = sum(b.numel() * b.itemsize for b in model.buffers())
        base = torch.cuda.memory_allocated()
        assert base == on_blocks(*(2 * n for n in weights)) + on_blocks(*(b.nbytes for b in model.buffers()))
        assert frequencies
        with torch.inference_mode():
            out = model(torch.randint(0, VOCABULARY, (3, 40)).cuda(), use_cache=True)
            cache = out.past_key_values
            for _ in range(4):
                out = model(out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, use_cache=True)
        logits = out.logits.numel() * 2
        del out
        workspaces = 32 * 2**20  # cuBLAS on one stream
        assert torch.cuda.memory_allocated() - base - workspaces == on_blocks(
            *[3 * HEADS * 44 * WIDTH * 2] * 2 * LAYERS
        )
        assert logits


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_llama_generates_where_the_choice_of_tokens_is_supplied(cache):
    with h100():
        model = llama()
        prompt = torch.randint(3, VOCABULARY, (2, 20)).cuda()
        how = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
        ask = lambda: model.generate(  # noqa: E731
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0, **how
        )
        with pytest.raises(UnsupportedError, match="derive from those of"):
            ask()
        with fragscope.supplied("argmax", 17):
            out = ask()
        assert out[:, 20:].tolist() == [[17] * 6] * 2
        assert torch.equal(out[:, :20].cpu(), prompt.cpu())
        with fragscope.supplied("argmax", model.config.eos_token_id):
            assert ask().shape == (2, 21)


def test_experts_run_on_the_tokens_that_are_routed_to_them():
    """A mixture as models write it: each expert indexes the tokens that chose it."""
    experts, tokens, width = 4, 24, 32
    chosen = torch.tensor([[t % 3, 3] for t in range(tokens)])  # expert 3 is everybody's second

    def mixture(hidden, weights):
        scores = (hidden @ weights[0, :, :experts]).softmax(-1)
        picked = scores.topk(2)[1]
        mask = torch.nn.functional.one_hot(picked, num_classes=experts).permute(2, 1, 0)
        out, sizes = torch.zeros_like(hidden), []
        for expert in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            _slot, token = torch.where(mask[expert[0]])
            part = hidden[token] @ weights[expert[0]]
            sizes.append((int(expert[0]), part.shape[0]))
            out.index_add_(0, token, part)
        return out, sizes

    with h100():
        hidden, weights = torch.rand(tokens, width, device="cuda"), torch.rand(experts, width, width, device="cuda")
        with fragscope.supplied("topk", lambda r: None if r.is_floating_point() else chosen):
            out, sizes = mixture(hidden, weights)
        assert sizes == [(0, 8), (1, 8), (2, 8), (3, 24)]
        assert out.shape == (tokens, width)
        with pytest.raises(UnsupportedError, match=r"aten::topk|aten::rand"):
            mixture(hidden, weights)


def test_safetensors_come_onto_the_card_and_no_byte_of_the_file_counts(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open

    weights = {"w": torch.zeros(300, 100, dtype=torch.bfloat16), "scale": torch.ones(7), "ids": torch.arange(5)}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    with h100() as device:
        loaded = safetensors.load_file(tmp_path / "model.safetensors", device="cuda")
        assert {name: (t.is_cuda, t.shape, t.dtype) for name, t in loaded.items()} == {
            name: (True, t.shape, t.dtype) for name, t in weights.items()
        }
        assert torch.cuda.memory_allocated() == on_blocks(60_000, 28, 40) == torch.cuda.max_memory_allocated()
        assert loaded["ids"].tolist() == [0, 1, 2, 3, 4]
        with safe_open(tmp_path / "model.safetensors", framework="pt", device="cuda") as file:
            part = file.get_slice("w")[:10]
            assert (part.shape, part.is_cuda) == ((10, 100), True)
            loaded["w"].copy_(file.get_tensor("w"))
        assert device.estimated == {}
        module = torch.nn.Linear(100, 300, bias=False, device="meta", dtype=torch.bfloat16)
        module.load_state_dict({"weight": loaded["w"]}, assign=True)
        assert module.weight.is_cuda


def test_a_transformer_encoder_trains():
    with h100() as device:
        layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        for length in (16, 32):
            model(torch.rand(4, length, 64, device="cuda")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tensors = list(model.parameters())
        states = [s for state in optimizer.state.values() for s in state.values() if s.is_cuda]
        assert len(states) == 2 * len(tensors)
        assert live(device) == 3 * len(tensors)


def test_a_loop_over_lengths_and_masks_needs_no_help():
    """Ragged batches as serving code makes them, all of it on the card."""
    with h100():
        lengths = torch.tensor([5, 2, 9], dtype=torch.int32, device="cuda")
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        tokens = torch.rand(int(starts[-1]), 8, device="cuda")
        parts = [tokens[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]
        assert [len(p) for p in parts] == [5, 2, 9]
        padded = torch.zeros(3, int(lengths.max()), 8, device="cuda")
        mask = torch.arange(int(lengths.max()), device="cuda")[None] < lengths[:, None]
        padded[mask] = tokens
        assert padded[mask].shape == tokens.shape
        assert mask.sum(-1).tolist() == [5, 2, 9]
