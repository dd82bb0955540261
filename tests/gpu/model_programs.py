"""Whole programs with random weights: language models, vision models, training, loading. They need no network.

Each is a function that does everything, unmodified code for ``cuda``; it runs on a GPU and on the virtual device. Where
control flow hangs on what a model computes, ``fragscope.supplied`` says what the virtual device takes for it.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fragscope

VOCABULARY = 32_000


def _llama(hidden: int, layers: int, attention: str = "sdpa") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=VOCABULARY,
        attn_implementation=attention,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Weights that nobody looks at are not worth the host's time to draw.
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    for parameter in model.parameters():
        parameter.detach().zero_()
    return model


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).cuda()


def _prefill_and_decode(model: Any) -> None:
    """Batch and length grow from request to request; each decodes a few tokens with a dynamic cache."""
    with torch.inference_mode():
        for batch, length in ((1, 64), (2, 200), (4, 512), (8, 700), (3, 1500)):
            out = model(_tokens(batch, length), use_cache=True)
            for _ in range(6):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            del out


def llama_small_sdpa() -> None:
    _prefill_and_decode(_llama(1024, 4))


def llama_small_eager() -> None:
    _prefill_and_decode(_llama(1024, 4, "eager"))


def llama_medium_sdpa() -> None:
    _prefill_and_decode(_llama(4096, 4))


def llama_generate() -> None:
    model = _llama(1024, 4)
    with fragscope.supplied("argmax", 17):  # which is not the end of the text
        for batch, length in ((1, 32), (4, 100)):
            prompt = _tokens(batch, length)
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, min_new_tokens=24, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip


def llama_generate_static() -> None:
    model = _llama(1024, 4)
    prompt = _tokens(4, 100)
    with fragscope.supplied("argmax", 17):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, min_new_tokens=24, do_sample=False,
            pad_token_id=0, cache_implementation="static", disable_compile=True,
        )  # fmt: skip


def gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=4)).cuda().eval()
    with torch.inference_mode():
        for batch, length in ((1, 100), (4, 300), (2, 900)):
            tokens = torch.randint(0, 50_000, (batch, length), device="cuda")
            model(tokens)


def gpt2_train() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=4)).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters())
    for batch, length in ((4, 128), (2, 500), (6, 256)):
        tokens = torch.randint(0, 50_000, (batch, length), device="cuda")
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def bert() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=4)).to("cuda", torch.float16).eval()
    draw = random.Random(0)
    with torch.inference_mode():
        for batch, length in ((8, 128), (32, 64), (4, 512)):
            tokens = torch.randint(0, 30_000, (batch, length)).cuda()
            mask = torch.tensor([[i < draw.randrange(1, length) for i in range(length)] for _ in range(batch)])
            model(tokens, attention_mask=mask.long().cuda())


def _balanced(result: torch.Tensor, experts: int) -> torch.Tensor | None:
    """Every expert gets as many tokens as any other; a random router comes near it."""
    if result.dtype.is_floating_point:
        return None
    return torch.arange(result.numel()).view(result.shape) % experts


def _experts(model: Any) -> None:
    with torch.inference_mode(), fragscope.supplied("topk", lambda result: _balanced(result, 8)):
        for batch, length in ((1, 64), (4, 256), (2, 1024)):
            model(_tokens(batch, length), use_cache=False)


def mixtral() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4,
        num_local_experts=8, vocab_size=VOCABULARY,
    )  # fmt: skip
    _experts(MixtralForCausalLM(config).to("cuda", torch.bfloat16).eval())


def qwen_experts() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=1024, intermediate_size=3072, moe_intermediate_size=768, num_hidden_layers=2, num_experts=8,
        num_experts_per_tok=2, num_attention_heads=16, num_key_value_heads=4, head_dim=64, vocab_size=VOCABULARY,
    )  # fmt: skip
    _experts(Qwen3MoeForCausalLM(config).to("cuda", torch.bfloat16).eval())


def _train_images(model: torch.nn.Module, optimizer: torch.optim.Optimizer, mixed: bool) -> None:
    draw = random.Random(0)
    for _ in range(8):
        side = draw.choice((128, 160, 224))
        images = torch.randn(draw.choice((8, 24, 48)), 3, side, side, device="cuda")
        labels = torch.randint(0, 1000, (len(images),), device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _vit(mixed: bool) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", pretrained=False, dynamic_img_size=True).cuda()
    _train_images(model, torch.optim.AdamW(model.parameters()), mixed)


def llama_train() -> None:
    """With tied weights, clipped gradients and AdamW in one kernel."""
    model = _llama(1024, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.train()
    for batch, length in ((2, 300), (1, 1000), (4, 128)):
        tokens = _tokens(batch, length)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def llama_sample() -> None:
    """Sampling with temperature and top-k."""
    model = _llama(2048, 2)
    prompt = _tokens(3, 77)
    with fragscope.supplied("multinomial", 17):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=True,
            temperature=0.7, top_k=40, pad_token_id=0,
        )  # fmt: skip


def vit_train() -> None:
    _vit(mixed=False)


def vit_train_autocast() -> None:
    _vit(mixed=True)


def vit_base_train() -> None:
    """Another model, batch and optimizer than those whose convolutions were recorded."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", pretrained=False, depth=4).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in (12, 20, 7):
        images, labels = (
            torch.randn(batch, 3, 224, 224, device="cuda"),
            torch.zeros(batch, dtype=torch.int64, device="cuda"),
        )
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def resnet18_train() -> None:
    """Batches and sides of which no convolution was recorded."""
    import torchvision

    model = torchvision.models.resnet18().cuda()
    _train_images(model, torch.optim.AdamW(model.parameters()), mixed=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch, side in ((12, 192), (20, 96)):
        model(torch.randn(batch, 3, side, side, device="cuda")).square().mean().backward()
        optimizer.step()


def resnet_train() -> None:
    import torchvision

    model = torchvision.models.resnet50().cuda()
    _train_images(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), mixed=False)


def encoder() -> None:
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).cuda()
    for batch, length in ((8, 128), (4, 512)):
        model(torch.randn(batch, length, 512, device="cuda")).square().mean().backward()
    model.eval()
    with torch.inference_mode():
        model(torch.randn(16, 256, 512, device="cuda"))


def _shards(folder: Path) -> Iterator[Path]:
    from safetensors.torch import save_file

    for number in range(3):
        path = folder / f"model-{number}.safetensors"
        weights = {f"layers.{number}.{name}": torch.zeros(n, 2048, dtype=torch.bfloat16) for name, n in SIZES.items()}
        save_file({**weights, f"layers.{number}.scale": torch.ones(17)}, path)
        yield path


SIZES = {"q": 2048, "k": 512, "v": 512, "o": 2048, "up": 5504, "gate": 5504}


def safetensors_load() -> None:
    """Whole files onto the card, then tensor by tensor into memory that is there."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        shards = list(_shards(Path(folder)))
        loaded = {}
        for shard in shards:
            loaded.update(load_file(shard, device="cuda"))
        for shard in shards:
            with safe_open(shard, framework="pt", device="cuda") as file:
                for name in file.keys():  # noqa: SIM118 - this is no mapping
                    loaded[name].copy_(file.get_tensor(name))
                file.get_slice(next(iter(file.keys())))[:100]


def from_pretrained() -> None:
    """A checkpoint of a small Llama is written, and loaded onto the card."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=VOCABULARY
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
        with torch.inference_mode():
            model(_tokens(2, 100))


PROGRAMS: dict[str, Callable[[], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        llama_small_sdpa, llama_small_eager, llama_medium_sdpa, llama_generate, llama_generate_static, llama_sample,
        llama_train, gpt2, gpt2_train, bert, mixtral, qwen_experts, vit_train, vit_train_autocast, vit_base_train,
        resnet_train, resnet18_train, encoder, safetensors_load, from_pretrained,
    )
}  # fmt: skip
