"""What serving a model computes on one rank, from its `config.json`: FP8 GEMMs and MLA decode.

Shapes are those of the `transformers` modules. Engines (vLLM, SGLang) fuse projections that read
the same rows (q+k+v, gate+up, q_a+kv_a) and split heads and intermediate sizes over the ranks:
n of what widens, k of what narrows. q_a+kv_a is whole on every rank, as its output is no head's.

Not looked at: biases, and whether the 128x128 scale blocks of a checkpoint end where a rank's part
of a weight does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ProblemError
from .files import read_json
from .problem import Gemm, GroupedGemm, check_problem
from .problem_mla import MlaDecode, check_mla

IN_BF16 = "BF16 in published FP8 checkpoints"


@dataclass(frozen=True)
class Model:
    """A model's GEMMs on one rank (every rank has the same), and what jitgen does not run.

    Attributes
    ----------
    problems : each dense GEMM with the names of its projections and in how many layers they are
    experts : each grouped GEMM likewise, ragged, of the experts that a rank has
    rows_a_token : rows of an expert's GEMM for each token of a call, if experts are dealt evenly
    attention : MLA decode, over a BF16 cache in pages of 64, for one token a sequence and, if the
        model predicts more, for all of them
    left_out : each kind of work that is in none of them, with the reason
    """

    architecture: str
    problems: Mapping[Gemm, str]
    experts: Mapping[Gemm, str]
    rows_a_token: int
    attention: Mapping[MlaDecode, str]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class _Linear:
    """A projection [n, k] of one rank, in so many layers."""

    name: str
    n: int
    k: int
    num_layers: int


@dataclass(frozen=True)
class _Config:
    """The fields of a `config.json`; errors name the file and the field."""

    path: Path
    fields: Mapping[str, Any]
    tp: int
    ep: int

    def error(self, text: str) -> ProblemError:
        return ProblemError(f"{self.path}: {text}")

    def number(self, name: str, least: int = 1, default: int | None = None) -> int:
        """A field that must be an int of at least `least`."""
        value = self.fields.get(name, default)
        if value is None and name not in self.fields:
            raise self.error(f"field {name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(f"{name} must be an int of at least {least}, got {value!r:.80}")
        return value

    def share(self, name: str) -> int:
        """The part of a field that one rank has."""
        return self.split(name, self.number(name))

    def split(self, name: str, value: int) -> int:
        """The part of `value` that one rank has."""
        if value % self.tp:
            raise self.error(f"{name} = {value} must be a multiple of tp = {self.tp}")
        return value // self.tp


def read_model(path: Path, tp: int = 1, ep: int = 1) -> Model:
    """What one rank runs to serve the model of a Hugging Face `config.json`, in FP8 where it is.

    Parameters
    ----------
    path : of an architecture in ARCHITECTURES
    tp : ranks that split each attention and each MLP
    ep : ranks over which the experts are spread. With ep > 1 engines split a shared expert over
        tp (vLLM without data parallelism) or keep it whole on each rank (vLLM with it, SGLang
        with DeepEP): both are in the list.

    Raises
    ------
    ProblemError : the file, its architecture or a field is not understood, tp does not divide a
        size, or a GEMM breaks a rule of `check_problem`; names the file and the field
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ProblemError(f"{path} must hold an object, a model's config")
    config = _Config(path, fields, tp, ep)
    for name, ranks in (("tp", tp), ("ep", ep)):
        if ranks < 1:
            raise config.error(f"{name} = {ranks} must be at least 1")
    match fields.get("architectures"):
        case [str(architecture)] if architecture in ARCHITECTURES:
            linears = ARCHITECTURES[architecture](config)
        case other:
            known = ", ".join(ARCHITECTURES)
            raise config.error(
                f"architectures must be a list with one of {known}, got {other!r:.80}"
            )
    has_experts = architecture in EXPERTS
    if ep > 1 and not has_experts:
        raise config.error(f"ep = {ep}, but {architecture} has no experts: use 1")
    left_out = {"lm_head": IN_BF16}
    experts: dict[Gemm, str] = {}
    if has_experts:
        left_out["mlp.gate (router)"] = IN_BF16
        num_experts, num_sparse = EXPERTS[architecture]
        experts = _experts(config, num_experts, num_sparse(config))
    return Model(
        architecture,
        _problems(config, linears),
        experts,
        config.number("num_experts_per_tok") if experts else 1,
        _mla_decode(config) if architecture in WITH_MLA else {},
        left_out,
    )


def _experts(config: _Config, num_experts: str, num_layers: int) -> dict[Gemm, str]:
    """The grouped GEMMs of a rank's experts: whole ones if they are spread, else a part of each."""
    if not num_layers:
        return {}
    total, ep = config.number(num_experts), config.ep
    if total % ep:
        raise config.error(f"{num_experts} = {total} must be a multiple of ep = {ep}")
    size = config.number("moe_intermediate_size")
    if ep == 1:
        size = config.split("moe_intermediate_size", size)
    return _problems(config, _mlp(config, "mlp.experts", size, num_layers), total // ep)


def _mla_decode(config: _Config) -> dict[MlaDecode, str]:
    rank, rope = config.number("kv_lora_rank"), config.number("qk_rope_head_dim", least=0)
    heads, num_layers = config.share("num_attention_heads"), config.number("num_hidden_layers")
    found = {}
    predicted = config.number("num_nextn_predict_layers", least=0, default=0)
    for num_queries in sorted({1, 1 + predicted}):
        problem = MlaDecode(heads, num_queries, rank + rope, rank)
        try:
            check_mla(problem)
        except ProblemError as error:
            raise config.error(f"attention with tp = {config.tp}: {error}") from None
        found[problem] = f"self_attn (decode), {num_queries} tokens a sequence, {num_layers} layers"
    return found


def _problems(config: _Config, linears: list[_Linear], num_groups: int = 0) -> dict[Gemm, str]:
    """Each legal problem once, with the names of all its projections."""
    num_layers = config.number("num_hidden_layers")
    names: dict[Gemm, list[str]] = {}
    for linear in linears:
        problem = (
            GroupedGemm(linear.n, linear.k, num_groups=num_groups)
            if num_groups
            else Gemm(linear.n, linear.k)
        )
        try:
            check_problem(problem)
        except ProblemError as error:
            raise config.error(f"{linear.name} with tp = {config.tp}: {error}") from None
        name = f"{linear.name} ({linear.num_layers} of {num_layers} layers)"
        names.setdefault(problem, []).append(name)
    return {problem: ", ".join(parts) for problem, parts in names.items()}


# --- architectures --------------------------------------------------------------------------------


def _deepseek_v3(config: _Config) -> list[_Linear]:
    """DeepSeek-V3, DeepSeek-R1, Kimi-K2: latent attention; experts after the first layers."""
    num_layers, num_sparse = config.number("num_hidden_layers"), _sparse_of_deepseek(config)
    linears = _latent_attention(config, num_layers)
    linears += _dense_mlp(config, num_layers - num_sparse)
    return linears + _shared_experts(config, num_sparse)


def _qwen3_moe(config: _Config) -> list[_Linear]:
    """Qwen3-MoE: grouped-query attention; experts in every layer but those that are listed."""
    num_layers = config.number("num_hidden_layers")
    num_dense = num_layers - _sparse_of_qwen3(config)
    linears = _grouped_query_attention(config, config.number("head_dim"), num_layers)
    return linears + _dense_mlp(config, num_dense)


def _sparse_of_deepseek(config: _Config) -> int:
    """Layers with experts."""
    first = config.number("first_k_dense_replace", least=0)
    step = config.number("moe_layer_freq", default=1)
    layers = range(config.number("num_hidden_layers"))
    return sum(i >= first and i % step == 0 for i in layers)


def _sparse_of_qwen3(config: _Config) -> int:
    step = config.number("decoder_sparse_step", default=1)
    dense = config.fields.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise config.error(f"mlp_only_layers must be a list of layers, got {dense!r:.80}")
    layers = range(config.number("num_hidden_layers"))
    return sum(i not in dense and (i + 1) % step == 0 for i in layers)


def _qwen3(config: _Config) -> list[_Linear]:
    num_layers = config.number("num_hidden_layers")
    linears = _grouped_query_attention(config, config.number("head_dim"), num_layers)
    return linears + _dense_mlp(config, num_layers)


def _llama(config: _Config) -> list[_Linear]:
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    if "head_dim" not in config.fields and hidden % heads:
        raise config.error(
            f"hidden_size = {hidden} must be a multiple of num_attention_heads = {heads},"
            " or head_dim be given"
        )
    num_layers = config.number("num_hidden_layers")
    head_dim = config.number("head_dim", default=hidden // heads)
    linears = _grouped_query_attention(config, head_dim, num_layers)
    return linears + _dense_mlp(config, num_layers)


ARCHITECTURES: Mapping[str, Callable[[_Config], list[_Linear]]] = {
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "Qwen3ForCausalLM": _qwen3,
    "LlamaForCausalLM": _llama,
}
# Those with experts: the field that counts them, and in how many layers they are.
EXPERTS: Mapping[str, tuple[str, Callable[[_Config], int]]] = {
    "DeepseekV3ForCausalLM": ("n_routed_experts", _sparse_of_deepseek),
    "Qwen3MoeForCausalLM": ("num_experts", _sparse_of_qwen3),
}
WITH_MLA = ("DeepseekV3ForCausalLM",)


# --- layers ---------------------------------------------------------------------------------------


def _grouped_query_attention(config: _Config, head_dim: int, num_layers: int) -> list[_Linear]:
    """With fewer KV heads than ranks, each KV head is on as many ranks as it takes."""
    hidden, heads = config.number("hidden_size"), config.share("num_attention_heads")
    kv_heads, tp = config.number("num_key_value_heads"), config.tp
    if kv_heads % tp and tp % kv_heads:
        raise config.error(
            f"num_key_value_heads = {kv_heads} must be a multiple of tp = {tp}, or divide it"
        )
    n = (heads + 2 * max(kv_heads // tp, 1)) * head_dim
    return [
        _Linear("self_attn.q+k+v_proj", n, hidden, num_layers),
        _Linear("self_attn.o_proj", hidden, heads * head_dim, num_layers),
    ]


def _latent_attention(config: _Config, num_layers: int) -> list[_Linear]:
    """Multi-head latent attention; kv_b is one GEMM in prefill only (decode absorbs it)."""
    hidden, heads = config.number("hidden_size"), config.share("num_attention_heads")
    q_rank, kv_rank = config.number("q_lora_rank"), config.number("kv_lora_rank")
    nope, rope = config.number("qk_nope_head_dim"), config.number("qk_rope_head_dim")
    v_dim = config.number("v_head_dim")
    return [
        _Linear("self_attn.q_a+kv_a_proj", q_rank + kv_rank + rope, hidden, num_layers),
        _Linear("self_attn.q_b_proj", heads * (nope + rope), q_rank, num_layers),
        _Linear("self_attn.kv_b_proj", heads * (nope + v_dim), kv_rank, num_layers),
        _Linear("self_attn.o_proj", hidden, heads * v_dim, num_layers),
    ]


def _dense_mlp(config: _Config, num_layers: int) -> list[_Linear]:
    if not num_layers:
        return []
    return _mlp(config, "mlp", config.share("intermediate_size"), num_layers)


def _shared_experts(config: _Config, num_layers: int) -> list[_Linear]:
    """The experts that every token goes through: one MLP, as wide as all of them."""
    num_shared = config.number("n_shared_experts", least=0)
    if not num_shared or not num_layers:
        return []
    name = "mlp.shared_experts"
    size = num_shared * config.number("moe_intermediate_size")
    share = config.split("n_shared_experts * moe_intermediate_size", size)
    linears = _mlp(config, name, share, num_layers)
    if config.ep > 1 and config.tp > 1:
        linears += _mlp(config, f"{name} (whole)", size, num_layers)
    return linears


def _mlp(config: _Config, name: str, size: int, num_layers: int) -> list[_Linear]:
    """A gated MLP of which this rank has `size` intermediate columns."""
    hidden = config.number("hidden_size")
    return [
        _Linear(f"{name}.gate+up_proj", 2 * size, hidden, num_layers),
        _Linear(f"{name}.down_proj", hidden, size, num_layers),
    ]
