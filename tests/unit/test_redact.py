"""Command lines are kept without what looks like a secret, and with everything else."""

from __future__ import annotations

import pytest

from fragscope.record.launch.redact import redact

SECRET = "S3cr3tValue"


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--token", SECRET],
        ["serve", "--token=" + SECRET],
        ["serve", "--api-key", SECRET, "--port", "1"],
        ["serve", "--api-key=" + SECRET],
        ["serve", "--apiKey=" + SECRET],
        ["serve", "--hf_token", SECRET],
        ["env", "HF_TOKEN=" + SECRET, "python", "train.py"],
        ["env", "AWS_SECRET_ACCESS_KEY=" + SECRET, "python"],
        ["env", "WANDB_API_KEY=" + SECRET, "python"],
        ["env", f"DB_PASSWORD={SECRET} with spaces", "python"],
        ["bash", "-c", f"HF_TOKEN={SECRET} python train.py --epochs 3"],
        ["bash", "-c", f"export X=1 HF_TOKEN='{SECRET} more' && python train.py"],
        ["bash", "-c", f"python train.py --api-key {SECRET} --epochs 3"],
        ["curl", "-H", f"Authorization: Bearer {SECRET}", "https://example.org"],
        ["curl", "-H", f"X-Api-Key: {SECRET}"],
        ["train", f"--tracking=https://user:{SECRET}@example.org/x"],
        ["train", f"postgresql://user:{SECRET}@db:5432/x"],
        ["git", "clone", f"https://{SECRET}@github.com/x/y"],
        ["get", f"https://example.org/x?a=1&access_token={SECRET}&b=2"],
        ["run", "--config", f'{{"password": "{SECRET}", "epochs": 3}}'],
        ["run", "hf_" + SECRET * 3],
        ["run", "--opaque", "ghp_" + SECRET * 3],
        ["run", "sk-" + SECRET * 3],
    ],
)
def test_secrets_are_hidden(arguments):
    line = redact(arguments)
    assert SECRET not in line
    assert "***" in line


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --max-tokens 512 --tokenizer gpt2 --epochs 3",
        "vllm serve m --max-num-batched-tokens 8192 --long-prefill-token-threshold 2048",
        "train --pad_token_id=50256 --token-file=secrets.txt --author Jane --key-dim 64",
        "train --url https://example.org/a/b --out a/b:c user@host",
        "env CUDA_VISIBLE_DEVICES=0,1 PYTORCH_ALLOC_CONF=expandable_segments:True,max_split_size_mb:20 python -m x.y",
        "torchrun --nproc-per-node 2 --rdzv-endpoint host:29400 train.py",
    ],
)
def test_everything_else_stays(line):
    assert redact(line.split()) == line


def test_what_is_around_a_secret_stays():
    assert redact(["bash", "-c", "cd x; HF_TOKEN=abc ./t --lr 0.1"]) == "bash -c 'cd x; HF_TOKEN=*** ./t --lr 0.1'"
    assert redact(["x", "--token", "abc", "--lr", "1"]) == "x --token *** --lr 1"
    assert redact(["x", "--token", "--lr", "1"]) == "x --token --lr 1"
    assert redact(["get", "https://u:p@h/x?token=abc&b=2"]) == "get 'https://u:***@h/x?token=***&b=2'"


def test_the_line_is_what_a_shell_reads():
    assert redact(["python", "a b.py", "", "it's"]) == "python 'a b.py' '' 'it'\"'\"'s'"


@pytest.mark.parametrize("piece", ["a", "a:", "http://", "eyJ-", "--a b ", "token=abc ", "bearer ", '"k": "v", '])
def test_long_arguments_take_time_by_their_length(piece):
    """A pattern that tries every length from every place takes minutes for some of these."""
    assert redact([piece * 100_000])
