"""Programs whose memory is recorded on a real card: decoding, training, several streams, CUDA graphs, MemPool.

All have random weights and need no network. Each is a function that does its work once; what it needs is made before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]
MIB = 2**20


def decode(tokens: int = 48) -> Step:
    """A small Llama decodes tokens for a batch of four, by Hugging Face transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, vocab_size=32000
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    prompt = torch.randint(0, 32000, (4, 64), device="cuda")

    @torch.inference_mode()
    def step() -> Any:
        mask = torch.ones_like(prompt)
        return model.generate(
            prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    return step


def train() -> Step:
    """A small vision transformer is trained for twelve steps with changing batch and resolution, by timm."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    draw = random.Random(0)

    def step() -> None:
        for _ in range(12):
            side = draw.choice((128, 160, 224, 256))
            images = torch.randn(draw.choice((8, 24, 48)), 3, side, side, device="cuda")
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(images).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def streams() -> Step:
    """Work on three streams hands tensors over with record_stream; now and then the cache is emptied."""
    others = [torch.cuda.Stream() for _ in range(2)]
    draw = random.Random(1)

    def step() -> None:
        live: list[torch.Tensor] = []
        for number in range(3000):
            size = draw.choice((1000, 300_000, 3 * MIB, 24 * MIB))
            stream = draw.choice([None, *others])
            with torch.cuda.stream(stream):
                made = torch.zeros(size, dtype=torch.uint8, device="cuda")
            if draw.random() < 0.5:
                user = draw.choice(others)
                with torch.cuda.stream(user):
                    made.add_(1)
                made.record_stream(user)
            live.append(made)
            while len(live) > 40:
                live.pop(draw.randrange(len(live)))
            if number % 700 == 699:
                torch.cuda.empty_cache()

    return step


def graphs() -> Step:
    """Two CUDA graphs that share a pool are captured and replayed between ordinary work, and dropped."""
    layer = torch.nn.Sequential(torch.nn.Linear(2048, 8192), torch.nn.GELU(), torch.nn.Linear(8192, 2048)).cuda()
    static = torch.randn(256, 2048, device="cuda")

    @torch.inference_mode()
    def step() -> None:
        for _ in range(3):
            layer(static)
        torch.cuda.synchronize()
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            kept = layer(static)
        with torch.cuda.graph(second, pool=first.pool()):
            also = layer(static[:128])
        for _ in range(5):
            first.replay()
            between = layer(static)
            second.replay()
            del between
        del kept, also
        first.reset()
        second.reset()
        torch.cuda.empty_cache()

    return step


def pools() -> Step:
    """Some memory comes from a MemPool, which is entered twice and then dropped."""
    draw = random.Random(2)

    def step() -> None:
        pool = torch.cuda.MemPool()
        outside = [torch.empty(draw.choice((5000, 3 * MIB)), dtype=torch.uint8, device="cuda") for _ in range(40)]
        for _ in range(2):
            with torch.cuda.use_mem_pool(pool):
                inside = [
                    torch.empty(draw.choice((5000, 3 * MIB, 30 * MIB)), dtype=torch.uint8, device="cuda")
                    for _ in range(60)
                ]
                del inside[::2]
            outside += [torch.empty(draw.choice((5000, 3 * MIB)), dtype=torch.uint8, device="cuda") for _ in range(40)]
            del inside
        del pool
        del outside[::3]
        torch.cuda.empty_cache()

    return step


PROGRAMS: dict[str, Callable[[], Step]] = {
    "decode": decode,
    "train": train,
    "streams": streams,
    "graphs": graphs,
    "pools": pools,
}
CONFS = {"default": "", "expandable": "expandable_segments:True", "split20": "max_split_size_mb:20"}
