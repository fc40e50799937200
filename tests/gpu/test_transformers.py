"""A small DeepSeek-V3 of Transformers on the GPU: 64 tokens, patched and not."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

from jitgen import ProblemError  # noqa: E402
from jitgen.integrations.latent_attention import AbsorbedAttention  # noqa: E402
from jitgen.integrations.transformers import Patched, patch  # noqa: E402
from tests.transformers_model import (  # noqa: E402
    NO_FP8,
    generate,
    logits_one_by_one,
    make_model,
    without_jitgen,
)

PROMPT = 40


def make_both(
    monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...], *, cuda_graphs: bool = False
) -> tuple[Any, Any, Patched]:
    without_jitgen(monkeypatch)
    options = {"hidden": 512, "rank": 512, "heads": 16, "kept": kept}
    usual, patched = make_model("cuda", **options), make_model("cuda", **options)
    patched.load_state_dict(usual.state_dict())
    return usual, patched, patch(patched, cuda_graphs=cuda_graphs)


# A rounding of BF16 may move an FP8 code, and an expert; see tests/host/test_transformers.py.
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(("kept", "tolerance"), [((), 0.2), (NO_FP8, 0.05)], ids=["fp8", "bf16"])
def test_generation_follows_the_unpatched_model(
    monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...], tolerance: float, cuda_graphs: bool
) -> None:
    usual, patched, count = make_both(monkeypatch, kept, cuda_graphs=cuda_graphs)
    assert count == (Patched(0, 0, 2) if kept else Patched(16, 1, 2))
    decode, lengths = AbsorbedAttention.decode, []

    def count_tokens(self: Any, query: Any, *rest: Any) -> Any:
        lengths.append(query.shape[2])
        return decode(self, query, *rest)

    monkeypatch.setattr(AbsorbedAttention, "decode", count_tokens)
    options = {"return_dict_in_generate": True, "output_logits": True}
    out = generate(patched, torch.randint(1, 199, (3, PROMPT), device="cuda"), 64, **options)
    assert out.sequences.shape == (3, PROMPT + 64)
    # In both layers, all but the first token; Python runs a step of graphs three times.
    assert lengths == 2 * (3 if cuda_graphs else 63) * [1]
    with torch.no_grad():
        expected = usual(out.sequences).logits[:, PROMPT - 1 : -1].float()
    got = torch.stack(out.logits, dim=1).float()
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < tolerance, error


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
def test_padded_sequences_see_their_own_tokens(
    monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    usual, patched, _ = make_both(monkeypatch, NO_FP8, cuda_graphs=cuda_graphs)
    tokens = torch.randint(1, 199, (2, 100), device="cuda")
    mask = torch.ones(2, 90, dtype=torch.int64, device="cuda")
    mask[0, :70] = 0
    expected = logits_one_by_one(usual, tokens, 90, attention_mask=mask)
    got = logits_one_by_one(patched, tokens, 90, attention_mask=mask)
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error.median(dim=-1).values < 0.05).all(), error


def test_a_model_that_waits_raises_and_is_captured_once_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, patched, _ = make_both(monkeypatch, (), cuda_graphs=True)
    tokens = torch.randint(1, 199, (3, PROMPT), device="cuda")
    expected = generate(patched, tokens, 7)
    layer = patched.model.layers[0]
    hook = layer.register_forward_hook(lambda _, __, x: x * (x == x).all().item())
    with pytest.raises(ProblemError, match="waits for the result of aten"):
        generate(patched, tokens, 7)
    hook.remove()
    assert torch.rand(3, device="cuda").isfinite().all()  # no capture has begun
    assert torch.equal(generate(patched, tokens, 7), expected)
