"""Random MLA decode calls, run on the GPU and compared with float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

import jitgen
from jitgen import BF16, F16, MlaDecode, MlaPlan, MlaSchedule
from jitgen.problem_mla import HEAD_DIMS, PAGES
from jitgen.tokens_mla import decode_tokens

HEADS = (1, 5, 8, 16, 17, 32, 40, 64, 65, 100, 128)
LENGTHS = (0, 1, 2, 7, 63, 64, 65, 127, 128, 129, 500, 1000)
UNUSED_SLOT = 2147480000


@dataclass(frozen=True)
class MlaDraw:
    """One call: everything but the data."""

    problem: MlaDecode
    lengths: tuple[int, ...]
    schedule: MlaSchedule | None
    seed: int
    steepness: int = 1  # of scores; from 32 on maxima grow by more than the slack

    def __str__(self) -> str:
        p, shown = self.problem, "-".join(map(str, self.lengths[:6]))
        return (
            f"{p.dtype}-h{p.num_heads}-q{p.num_queries}-d{p.head_dim_v}-p{p.page}"
            f"-b{len(self.lengths)}-k{shown}-seed{self.seed}"
        )


def draw_problems(rng: random.Random, count: int) -> list[MlaDecode]:
    """Problems that cover every head count, page, head dim and dtype; a kernel each."""
    problems = []
    for index in range(count):
        head_dims = HEAD_DIMS[0] if rng.random() < 0.7 else rng.choice(HEAD_DIMS)
        num_queries = rng.choice((1, 1, 2, 3, 8))
        problems.append(
            MlaDecode(
                HEADS[index % len(HEADS)],
                num_queries,
                *head_dims,
                PAGES[index % len(PAGES)],
                rng.choice((BF16, F16)),
                num_queries > 1 and rng.random() < 0.7,
            )
        )
    return problems


def draw_lengths(rng: random.Random, index: int) -> tuple[int, ...]:
    """Of one sequence or many; the 32768 of the issue once in a while."""
    if index % 16 == 0:
        return (32768,) if rng.random() < 0.5 else (32768, 0, 63, rng.randint(1, 5000))
    batch = rng.choice((1, 1, 2, 3, 7, 20, 150))
    high = rng.choice((130, 700, 3000 if batch < 150 else 700))
    return tuple(
        rng.choice(LENGTHS) if rng.random() < 0.4 else rng.randint(0, high) for _ in range(batch)
    )


def make_inputs(d: MlaDraw, gap: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs on the GPU; what must not be looked at is NaN, or no page at all.

    gap : keys between pages in memory, as if other layers' pages lay there
    """
    p, batch = d.problem, len(d.lengths)
    generator = torch.Generator("cuda").manual_seed(d.seed)
    dtype = getattr(torch, p.dtype.name)

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, device="cuda", generator=generator)
        return made.div_(10).clamp_(-1, 1).to(dtype)

    num_pages = [-(-length // p.page) for length in d.lengths]
    num_blocks = sum(num_pages) + 3
    memory = normal(num_blocks, p.page + gap, 1, p.head_dim_qk)
    poison: float = float("nan")
    if p.is_fp8:
        memory[:, :, :, :512] /= 1 + torch.arange(512, device="cuda") // 128
        memory, poison = jitgen.quantize_mla_cache(memory), 0xFF
    memory[:, p.page :] = poison
    kv_cache = memory[:, : p.page]
    free = torch.randperm(num_blocks, device="cuda", generator=generator).to(torch.int32)
    table = torch.full((batch, max(num_pages) + 2), UNUSED_SLOT, device="cuda", dtype=torch.int32)
    at = 0
    for sequence, (length, count) in enumerate(zip(d.lengths, num_pages, strict=True)):
        table[sequence, :count] = free[at : at + count]
        at += count
        if length % p.page:
            kv_cache[int(free[at - 1]), length % p.page :] = poison
    kv_cache[free[at:].long()] = poison
    return {
        "q": normal(batch, p.num_queries, p.num_heads, p.head_dim_qk) * (10 * d.steepness),
        "kv_cache": kv_cache,
        "block_table": table,
        "seqlens_k": torch.tensor(d.lengths, device="cuda", dtype=torch.int32),
    }


def decoded(tokens: torch.Tensor) -> torch.Tensor:
    """Rows of a cache as float64."""
    if tokens.dtype != torch.uint8:
        return tokens.double()
    return torch.from_numpy(decode_tokens(tokens.cpu().numpy())).to(tokens.device)


def score_error(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[s_q, h_q]: how far codes that are off by 2^-10 put scores, and so lse, off at most."""
    sums = torch.einsum("shd,kd->shk", q[..., :512].double().abs(), keys[:, :512].abs())
    return sums.amax(-1) * 2**-10 * 576**-0.5


def reference(
    d: MlaDraw, inputs: dict[str, torch.Tensor], sequence: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """o [s_q, h_q, head_dim_v] and lse [h_q, s_q] of one sequence in float64, and by how much lse
    may differ beside its relative error."""
    p, length = d.problem, d.lengths[sequence]
    pages = inputs["block_table"][sequence, : -(-length // p.page)].long()
    keys = decoded(inputs["kv_cache"][pages].flatten(0, 2)[:length])
    scores = torch.einsum("shd,kd->hsk", inputs["q"][sequence].double(), keys)
    scores *= p.head_dim_qk**-0.5
    later = torch.arange(p.num_queries - 1, -1, -1, device="cuda") if p.causal else 0
    limits = length - later * torch.ones(p.num_queries, device="cuda", dtype=torch.int64)
    hidden = torch.arange(length, device="cuda")[None, :] >= limits[:, None]
    scores.masked_fill_(hidden[None], -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    o = torch.einsum("hsk,kd->shd", weights, keys[:, : p.head_dim_v])
    slack = (
        score_error(inputs["q"][sequence], keys).T if p.is_fp8 and length else 1e-6 * d.steepness
    )
    return o, torch.where(lse == -math.inf, math.inf, lse), slack


def check_against_reference(
    d: MlaDraw, inputs: dict[str, torch.Tensor], o: torch.Tensor, lse: torch.Tensor
) -> None:
    """The error bounds of FlashMLA's own tests, on every sequence, or on some if there are many."""
    assert not torch.isnan(o).any(), f"o has NaN: {d}"
    sequences = range(len(d.lengths))
    if len(sequences) > 8:
        sequences = sorted(random.Random(d.seed).sample(sequences, 8))
    for sequence in sequences:
        want, want_lse, slack = reference(d, inputs, sequence)
        got, got_lse = o[sequence].double(), lse[sequence].double()
        error = (got - want).abs()
        bad = (error > 8e-4) & (error > 2.01 / 128 * want.abs())
        assert not bad.any(), (
            f"sequence {sequence}: {int(bad.sum())} of {bad.numel()} outputs are off, the first at"
            f" {bad.nonzero()[0].tolist()}, the most by {float(error.max()):.2e}: {d}"
        )
        norm = (got**2 + want**2).sum()
        cosine = 1 - 2 * (got * want).sum() / norm if norm > 0 else 0.0
        assert cosine < 5e-6, f"sequence {sequence}: cosine difference {float(cosine):.2e}: {d}"
        error = (got_lse - want_lse).abs()
        bad = (got_lse != want_lse) & (error > 8 / 65536 * want_lse.abs()) & (error > slack)
        assert not bad.any(), f"sequence {sequence}: lse is off by {float(error.max()):.2e}: {d}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


def run_and_compare(d: MlaDraw, *, num_runs: int = 3, gap: int = 0) -> None:
    """Run into a poisoned output between canaries, several times, and compare with float64."""
    inputs, p = make_inputs(d, gap), d.problem
    batch, size = len(d.lengths), p.num_rows * p.head_dim_v
    memory = torch.full((batch * size + 128,), -3.0, dtype=inputs["q"].dtype, device="cuda")
    out = memory[64:-64].view(batch, p.num_queries, p.num_heads, p.head_dim_v)
    plan = MlaPlan()
    plan.partial_out.fill_(float("nan"))
    plan.partial_states.fill_(float("nan"))
    first: tuple[torch.Tensor, torch.Tensor] | None = None
    for run in range(num_runs):
        out.fill_(float("nan"))
        o, lse = jitgen.mla_decode(
            *inputs.values(),
            head_dim_v=p.head_dim_v,
            causal=p.causal,
            out=out,
            plan=plan,
            schedule=d.schedule,
        )
        assert o is out
        if first is None:
            first = (o.clone(), lse)
        same = torch.equal(bits(o), bits(first[0])) and torch.equal(bits(lse), bits(first[1]))
        assert same, f"run {run} differs from the first: {d}"
    check_against_reference(d, inputs, *first)
    assert not plan.counters.any(), f"counters are left behind: {d}"
    canaries = torch.cat((memory[:64], memory[-64:]))
    assert torch.all(canaries == -3.0), f"canaries lost: {d}"
