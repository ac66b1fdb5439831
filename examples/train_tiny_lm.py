"""Train a small language model on torch's attention and on flashx's: the loss curves are the same.

    python examples/train_tiny_lm.py --arch gpt2
    python examples/train_tiny_lm.py --arch llama

The models are plain torch and know nothing of flashx; ``flashx.patch()`` is the only difference between the runs. They
read bytes: the source of Python's argparse module, which every machine has. A third run on torch's unfused attention
shows how far apart rounding alone drives two curves.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashx

DIM, LAYERS, HEADS, KV_HEADS = 128, 2, 4, 2
HEAD_DIM = DIM // HEADS


class Gpt2Attention(nn.Module):
    """Multi-head attention with one projection for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class LlamaAttention(nn.Module):
    """Grouped-query attention on rotated queries and keys (RoPE)."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.key_value = nn.Linear(DIM, 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        key, value = self.key_value(x).unflatten(-1, (2, KV_HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (B, H, L, D): the two halves of D are pairs, turned by position * frequency."""
    frequency = 10000 ** -(torch.arange(HEAD_DIM // 2, dtype=x.dtype) * 2 / HEAD_DIM)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * frequency
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GeluMlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(DIM, 4 * DIM), nn.GELU(approximate="tanh"), nn.Linear(4 * DIM, DIM))


class SwigluMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(DIM, 2 * 3 * DIM, bias=False)
        self.down = nn.Linear(3 * DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        norm = nn.LayerNorm if arch == "gpt2" else nn.RMSNorm
        self.attention_norm, self.mlp_norm = norm(DIM), norm(DIM)
        self.attention = Gpt2Attention() if arch == "gpt2" else LlamaAttention()
        self.mlp = GeluMlp() if arch == "gpt2" else SwigluMlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Decoder-only: (B, L) bytes -> (B, L, 256) logits of the next byte."""

    def __init__(self, arch: str, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, DIM)
        # Llama has no position table: it rotates queries and keys.
        self.positions = nn.Embedding(context, DIM) if arch == "gpt2" else None
        self.blocks = nn.Sequential(*(Block(arch) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(DIM) if arch == "gpt2" else nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def train(
    arch: str, steps: int, *, batch: int = 8, context: int = 256, dtype: torch.dtype = torch.float32
) -> list[float]:
    """The loss before each step, in nats per byte; the same model and the same batches every time."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = LanguageModel(arch, context).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - context, (batch, 1))
        window = text[starts + torch.arange(context + 1)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def attention(name: str) -> AbstractContextManager[object]:
    """What F.scaled_dot_product_attention is: torch's own choice, torch's unfused one, or flashx."""
    if name == "flashx":
        return flashx.patch()
    return sdpa_kernel(SDPBackend.MATH) if name == "unfused" else nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model on torch's and on flashx's attention.")
    parser.add_argument("--arch", choices=["gpt2", "llama"], default="gpt2", help="the model's family (gpt2)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run (60)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"argument --steps: must be at least 1, got {options.steps}")

    curves, seconds = {}, {}
    for name in ("torch", "unfused", "flashx"):
        start = time.perf_counter()
        with attention(name):
            curves[name] = train(options.arch, options.steps)
        seconds[name] = time.perf_counter() - start

    print(f"{options.arch}, loss in nats per byte (a blind guess: {math.log(256):.2f})\n")
    print("step      torch    unfused     flashx   flashx - torch")
    shown = range(0, options.steps, max(options.steps // 12, 1))
    for step in sorted({*shown, options.steps - 1}):
        row = [curve[step] for curve in curves.values()]
        print(f"{step:4}", *(f"{loss:10.6f}" for loss in row), f"{row[2] - row[0]:16.1e}")
    print("\nlargest difference to torch's loss, of")
    for name in ("flashx", "unfused"):
        print(f"  {name:8} {max(abs(a - b) for a, b in zip(curves[name], curves['torch'], strict=True)):.1e}")
    print("\nseconds:", ", ".join(f"{taken:.1f} {name}" for name, taken in seconds.items()))


if __name__ == "__main__":
    main()
