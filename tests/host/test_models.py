"""A model's problems: the published shapes, how ranks split them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgen.errors import ProblemError
from jitgen.models import IN_BF16, read_model
from jitgen.problem import Gemm, GroupedGemm, supports
from jitgen.problem_mla import MlaDecode

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def fields_of(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return fields


def shapes(name: str, tp: int = 1, ep: int = 1) -> set[tuple[int, int]]:
    return {(p.n, p.k) for p in read_model(CONFIGS / f"{name}.json", tp, ep).problems}


def read_fields(folder: Path, fields: object, tp: int = 1, ep: int = 1) -> Mapping[Gemm, str]:
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return read_model(path, tp, ep).problems


DEEPSEEK_V3 = {
    (2112, 7168): "self_attn.q_a+kv_a_proj (61 of 61 layers)",
    (24576, 1536): "self_attn.q_b_proj (61 of 61 layers)",
    (32768, 512): "self_attn.kv_b_proj (61 of 61 layers)",
    (7168, 16384): "self_attn.o_proj (61 of 61 layers)",
    (36864, 7168): "mlp.gate+up_proj (3 of 61 layers)",
    (7168, 18432): "mlp.down_proj (3 of 61 layers)",
    (4096, 7168): "mlp.shared_experts.gate+up_proj (58 of 61 layers)",
    (7168, 2048): "mlp.shared_experts.down_proj (58 of 61 layers)",
}


def test_read_model_deepseek_v3_has_the_published_shapes() -> None:
    model = read_model(CONFIGS / "deepseek-v3.json")
    assert {(p.n, p.k): name for p, name in model.problems.items()} == DEEPSEEK_V3
    assert model.left_out == {"lm_head": IN_BF16, "mlp.gate (router)": IN_BF16}
    assert model.experts == {
        GroupedGemm(4096, 7168, num_groups=256): "mlp.experts.gate+up_proj (58 of 61 layers)",
        GroupedGemm(7168, 2048, num_groups=256): "mlp.experts.down_proj (58 of 61 layers)",
    }
    assert model.rows_a_token == 8
    assert model.attention == {
        MlaDecode(128, 1): "self_attn (decode), 1 tokens a sequence, 61 layers",
        MlaDecode(128, 2): "self_attn (decode), 2 tokens a sequence, 61 layers",
    }


@pytest.mark.parametrize(
    ("name", "tp", "ep", "groups", "size", "hidden"),
    [
        ("deepseek-v3", 8, 1, 256, 256, 7168),  # a part of each expert
        ("deepseek-v3", 8, 8, 32, 2048, 7168),  # some whole experts
        ("deepseek-v3", 1, 64, 4, 2048, 7168),
        ("kimi-k2", 1, 32, 12, 2048, 7168),
        ("qwen3-30b-a3b", 2, 1, 128, 384, 2048),
    ],
)
def test_read_model_splits_or_spreads_experts(
    name: str, tp: int, ep: int, groups: int, size: int, hidden: int
) -> None:
    model = read_model(CONFIGS / f"{name}.json", tp, ep)
    assert set(model.experts) == {
        GroupedGemm(2 * size, hidden, num_groups=groups),
        GroupedGemm(hidden, size, num_groups=groups),
    }
    assert model.rows_a_token == 8


def test_read_model_splits_heads_of_mla() -> None:
    assert {p.num_heads for p in read_model(CONFIGS / "deepseek-v3.json", 8).attention} == {16}
    (kimi,) = read_model(CONFIGS / "kimi-k2.json", 4, 4).attention
    assert kimi == MlaDecode(16)
    assert not read_model(CONFIGS / "qwen3-30b-a3b.json").attention


def test_read_model_rejects_ranks_that_do_not_divide_the_experts() -> None:
    with pytest.raises(ProblemError, match="n_routed_experts = 256 must be a multiple of ep = 3"):
        read_model(CONFIGS / "deepseek-v3.json", 1, 3)


@pytest.mark.parametrize(
    ("name", "tp", "expected"),
    [
        (
            "deepseek-v3",
            8,
            {(2112, 7168), (3072, 1536), (4096, 512), (7168, 2048)}
            | {(4608, 7168), (7168, 2304), (512, 7168), (7168, 256)},
        ),
        (
            "kimi-k2",
            1,
            {(2112, 7168), (12288, 1536), (16384, 512), (7168, 8192)}
            | {(36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048)},
        ),
        ("qwen3-30b-a3b", 1, {(5120, 2048), (2048, 4096)}),
        ("qwen3-30b-a3b", 4, {(1280, 2048), (2048, 1024)}),
        ("qwen3-30b-a3b", 8, {(768, 2048), (2048, 512)}),  # 4 KV heads: each on two ranks
        ("qwen3-32b", 1, {(10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)}),
        ("qwen3-32b", 16, {(768, 5120), (5120, 512), (3200, 5120), (5120, 1600)}),
        ("llama-3-70b", 1, {(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)}),
        ("llama-3-70b", 8, {(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)}),
    ],
)
def test_read_model_shapes(name: str, tp: int, expected: set[tuple[int, int]]) -> None:
    assert shapes(name, tp) == expected


def test_read_model_with_ep_has_the_shared_expert_split_and_whole() -> None:
    split = shapes("deepseek-v3", tp=16)
    assert shapes("deepseek-v3", tp=16, ep=16) == split | {(4096, 7168), (7168, 2048)}
    assert shapes("deepseek-v3", ep=16) == set(DEEPSEEK_V3)


def test_read_model_names_all_projections_of_a_problem(tmp_path: Path) -> None:
    fields = fields_of("llama-3-70b") | {"intermediate_size": 8192}
    names = read_fields(tmp_path, fields)[Gemm(8192, 8192)]
    assert names == "self_attn.o_proj (80 of 80 layers), mlp.down_proj (80 of 80 layers)"


@pytest.mark.parametrize(
    ("name", "change", "dense_layers"),
    [
        ("deepseek-v3", {"first_k_dense_replace": 0}, 0),
        ("deepseek-v3", {"moe_layer_freq": 2}, 32),  # 0..2, then every odd one of 3..59
        ("deepseek-v3", {"first_k_dense_replace": 61}, 61),
        ("qwen3-30b-a3b", {"mlp_only_layers": [0, 47]}, 2),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 3}, 32),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 3, "mlp_only_layers": [2]}, 33),
    ],
)
def test_read_model_counts_dense_layers(
    tmp_path: Path, name: str, change: dict[str, Any], dense_layers: int
) -> None:
    fields = fields_of(name) | change
    num_layers = fields["num_hidden_layers"]
    names = list(read_fields(tmp_path, fields).values())
    dense = [text for text in names if text.startswith(("mlp.gate", "mlp.down"))]
    counted = f"({dense_layers} of {num_layers} layers)"
    assert dense == (
        [f"mlp.gate+up_proj {counted}", f"mlp.down_proj {counted}"] if dense_layers else []
    )
    has_shared = any(text.startswith("mlp.shared_experts") for text in names)
    assert has_shared == (name == "deepseek-v3" and dense_layers < num_layers)


def test_read_model_without_shared_experts(tmp_path: Path) -> None:
    fields = fields_of("deepseek-v3") | {"n_shared_experts": 0}
    assert len(read_fields(tmp_path, fields)) == 6


def test_read_model_takes_llamas_head_dim_where_given(tmp_path: Path) -> None:
    fields = fields_of("llama-3-70b") | {"head_dim": 64}
    assert Gemm((64 + 2 * 8) * 64, 8192) in read_fields(tmp_path, fields)


@pytest.mark.parametrize("name", NAMES)
@given(tp=st.integers(1, 300))
def test_read_model_splits_evenly_or_names_what_tp_does_not_divide(name: str, tp: int) -> None:
    fields = fields_of(name)
    latent = "q_lora_rank" in fields
    divided = ["num_attention_heads"] + ["intermediate_size"] * ("num_experts" not in fields)
    divided += ["moe_intermediate_size"] * ("moe_intermediate_size" in fields)
    kv_heads = fields["num_key_value_heads"]
    broken = [field for field in divided if fields[field] % tp]
    if not latent and kv_heads % tp and tp % kv_heads:
        broken.append("num_key_value_heads")
    if fields.get("moe_intermediate_size", 0) % (16 * tp):
        broken.append("mlp.experts")  # rows of 16 bytes
    if broken:
        with pytest.raises(ProblemError) as caught:
            shapes(name, tp)
        assert str(CONFIGS / f"{name}.json") in str(caught.value)
        assert any(field in str(caught.value) for field in broken)
        return
    whole = {text: p for p, text in read_model(CONFIGS / f"{name}.json").problems.items()}
    for problem, text in read_model(CONFIGS / f"{name}.json", tp).problems.items():
        assert supports(problem)
        of_all = whole[text]
        if "down_proj" in text or "o_proj" in text:
            assert (problem.n, problem.k * tp) == (of_all.n, of_all.k)
        elif "q_a+kv_a" in text:
            assert problem == of_all
        elif "q+k+v" in text:
            copies = 2 * max(tp - kv_heads, 0) * fields.get("head_dim", 128)
            assert (problem.n * tp, problem.k) == (of_all.n + copies, of_all.k)
        else:
            assert (problem.n * tp, problem.k) == (of_all.n, of_all.k)


@pytest.mark.parametrize("name", NAMES)
def test_read_model_rejects_a_missing_field(tmp_path: Path, name: str) -> None:
    optional = {"model_type", "vocab_size", "moe_layer_freq", "decoder_sparse_step"}
    optional |= {"mlp_only_layers", "num_nextn_predict_layers"}
    fields = fields_of(name)
    if "q_lora_rank" in fields:
        optional.add("num_key_value_heads")  # the latent is no head's
    if "num_experts" in fields:
        optional.add("intermediate_size")  # no dense MLP in any layer
    for field in set(fields) - optional:
        rest = {key: value for key, value in fields.items() if key != field}
        with pytest.raises(ProblemError, match=rf"config\.json: .*{field}"):
            read_fields(tmp_path, rest)
    read_fields(tmp_path, {key: fields[key] for key in set(fields) - optional})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3-32b", {"architectures": ["GptOssForCausalLM"]}, "got ['GptOssForCausalLM']"),
        ("qwen3-32b", {"architectures": "Qwen3ForCausalLM"}, "architectures must be a list with"),
        ("qwen3-32b", {"architectures": []}, "one of DeepseekV3ForCausalLM, Qwen3Moe"),
        ("qwen3-32b", {"hidden_size": "5120"}, "hidden_size must be an int of at least 1"),
        ("qwen3-32b", {"hidden_size": True}, "hidden_size must be an int of at least 1, got True"),
        ("qwen3-32b", {"head_dim": None}, "head_dim must be an int of at least 1, got None"),
        ("qwen3-32b", {"num_key_value_heads": 0}, "num_key_value_heads must be an int of at least"),
        ("qwen3-32b", {"hidden_size": 5124}, "self_attn.q+k+v_proj with tp = 1: k = 5124 must be"),
        ("qwen3-32b", {"intermediate_size": 2500}, "mlp.down_proj with tp = 1: k = 2500 must be"),
        ("llama-3-70b", {"num_attention_heads": 60}, "multiple of num_attention_heads = 60"),
        ("qwen3-30b-a3b", {"mlp_only_layers": 3}, "mlp_only_layers must be a list of layers"),
        ("deepseek-v3", {"q_lora_rank": None}, "q_lora_rank must be an int"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace must be an int of"),
    ],
)
def test_read_model_rejects_fields(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProblemError) as caught:
        read_fields(tmp_path, fields_of(name) | change)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tp", "ep", "message"),
    [
        ("qwen3-32b", 0, 1, "tp = 0 must be at least 1"),
        ("deepseek-v3", 1, 0, "ep = 0 must be at least 1"),
        ("qwen3-32b", 1, 8, "ep = 8, but Qwen3ForCausalLM has no experts: use 1"),
        ("deepseek-v3", 3, 1, "num_attention_heads = 128 must be a multiple of tp = 3"),
    ],
)
def test_read_model_rejects_ranks(name: str, tp: int, ep: int, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        read_model(CONFIGS / f"{name}.json", tp, ep)


def test_read_model_rejects_ranks_that_share_kv_heads_unevenly(tmp_path: Path) -> None:
    fields = fields_of("qwen3-32b") | {"num_attention_heads": 48, "num_key_value_heads": 8}
    with pytest.raises(ProblemError, match="num_key_value_heads = 8 must be a multiple of tp = 12"):
        read_fields(tmp_path, fields | {"intermediate_size": 12288}, tp=12)


@pytest.mark.parametrize("content", [[], "config", 7, None])
def test_read_model_rejects_what_is_no_config(tmp_path: Path, content: object) -> None:
    with pytest.raises(ProblemError, match="must hold an object, a model's config"):
        read_fields(tmp_path, content)
