"""An attention layer of DeepSeek-V3 that decodes token after token: MLA with absorbed projections
over a paged cache that grows, on the GPU or, for a small layer, on the interpreter.

    python examples/mla_decode_layer.py --steps 64 --batch 8 [--fp8]

The cache holds, for each token and all heads, a latent vector and one rotated key. The projection
of latents to keys is moved into the queries, that to values behind the attention; so the kernel's
keys are the cache's rows, and its values their first columns. Random weights.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

import jitgen

PAGE = 64


@dataclass(frozen=True)
class Config:
    """The dimensions of DeepSeek-V3; `latent` and `rope` are those of the kernel."""

    hidden: int = 7168
    heads: int = 128
    q_rank: int = 1536
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5


class Layer:
    """Weights in bfloat16, as float32 tensors: [rows that come out, columns that go in]."""

    def __init__(self, config: Config, device: str) -> None:
        c, generator = config, torch.Generator(device).manual_seed(0)

        def weight(*shape: int) -> torch.Tensor:
            w = torch.randn(*shape, device=device, generator=generator) * shape[-1] ** -0.5
            return w.bfloat16().float()

        self.config = config
        self.q_down = weight(c.q_rank, c.hidden)
        self.q_up = weight(c.heads, c.nope + c.rope, c.q_rank)
        self.kv_down = weight(c.latent + c.rope, c.hidden)
        self.to_key = weight(c.heads, c.nope, c.latent)
        self.to_value = weight(c.heads, c.value, c.latent)
        self.out = weight(c.hidden, c.heads * c.value)

    def project(self, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [b, heads, nope + rope] and the cache's new rows [b, latent + rope] of x."""
        c = self.config
        q = torch.einsum("hdr,br->bhd", self.q_up, x @ self.q_down.T)
        row = x @ self.kv_down.T
        q = torch.cat((q[..., : c.nope], rotate(q[..., c.nope :], position)), -1)
        return q, torch.cat((row[:, : c.latent], rotate(row[:, c.latent :], position)), -1)

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """The kernel's queries bfloat16 [b, 1, heads, latent + rope]."""
        c = self.config
        latent = torch.einsum("bhd,hdl->bhl", q[..., : c.nope], self.to_key)
        return torch.cat((latent, q[..., c.nope :]), -1).bfloat16()[:, None]

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        """The layer's output [b, hidden] of the kernel's [b, 1, heads, latent]."""
        values = torch.einsum("bhl,hvl->bhv", o[:, 0].float(), self.to_value)
        return values.flatten(1) @ self.out.T


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    """Rotary embedding of the last dimension, pairs of neighbours."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Cache:
    """Pages of 64 tokens for each of `batch` sequences, handed out as they grow, in any order."""

    def __init__(self, config: Config, batch: int, steps: int, device: str, is_fp8: bool) -> None:
        pages = -(-steps // PAGE)
        columns = config.latent + config.rope
        rows = torch.full((batch * pages, PAGE, 1, columns), torch.nan, device=device)
        self.is_fp8 = is_fp8
        self.pages = rows.bfloat16()
        if is_fp8:  # 0xff: what is not written yet is NaN, and never looked at
            self.pages = torch.full((*rows.shape[:3], 656), 0xFF, device=device, dtype=torch.uint8)
        generator = torch.Generator(device).manual_seed(1)
        self.free = torch.randperm(batch * pages, device=device, generator=generator).tolist()
        self.table = torch.full((batch, pages), -1, device=device, dtype=torch.int32)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)

    def append(self, rows: torch.Tensor, position: int) -> None:
        """One token of each sequence, at the same position."""
        page, at = divmod(position, PAGE)
        if at == 0:
            new = [self.free.pop() for _ in range(len(rows))]
            self.table[:, page] = torch.tensor(new, device=rows.device, dtype=torch.int32)
        tokens = rows.bfloat16()
        if self.is_fp8:
            tokens = jitgen.quantize_mla_cache(tokens)
        self.pages[self.table[:, page].long(), at, 0] = tokens
        self.lengths += 1


def attend(q: torch.Tensor, cache: Cache, scale: float) -> torch.Tensor:
    """The kernel on a GPU; on other machines the interpreter, on the same memory."""
    given = (q, cache.pages, cache.table, cache.lengths)
    if q.is_cuda:
        return jitgen.mla_decode(*given, softmax_scale=scale)[0]
    arrays = (to_numpy(tensor) for tensor in given)
    o, _ = jitgen.mla_decode(*arrays, softmax_scale=scale)
    return torch.from_numpy(o.astype(np.float32))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def reference(layer: Layer, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The layer's output in float32 without absorption: keys and values of every head, of the
    sequences' rows [b, length, latent + rope]."""
    c = layer.config
    latent = rows[..., : c.latent]
    keys = torch.einsum("hdl,bkl->bhkd", layer.to_key, latent)
    values = torch.einsum("hvl,bkl->bhkv", layer.to_value, latent)
    scores = torch.einsum("bhd,bhkd->bhk", q[..., : c.nope], keys)
    scores += torch.einsum("bhd,bkd->bhk", q[..., c.nope :], rows[..., c.latent :])
    weights = torch.softmax(scores * c.scale, -1)
    return torch.einsum("bhk,bhkv->bhv", weights, values).flatten(1) @ layer.out.T


def run(config: Config, batch: int, steps: int, device: str, *, is_fp8: bool = False) -> float:
    """The largest error of a step's output, relative to the reference's root mean square."""
    layer, cache = Layer(config, device), Cache(config, batch, steps, device, is_fp8)
    generator = torch.Generator(device).manual_seed(2)
    seen: list[torch.Tensor] = []
    worst = 0.0
    for position in range(steps):
        x = torch.randn(batch, config.hidden, device=device, generator=generator)
        q, row = layer.project(x, position)
        cache.append(row, position)
        seen.append(row)
        y = layer.finish(attend(layer.absorb(q), cache, config.scale))
        want = reference(layer, q, torch.stack(seen, 1))
        error = (y - want).square().mean().sqrt() / want.square().mean().sqrt()
        worst = max(worst, float(error))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--fp8", action="store_true", help="an FP8 cache")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    config = Config(heads=given.heads)
    error = run(config, given.batch, given.steps, device, is_fp8=given.fp8)
    print(f"{given.steps} steps on {device}: RMS error of a step at most {error:.2%}")


if __name__ == "__main__":
    main()
