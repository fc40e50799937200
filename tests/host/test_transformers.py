"""jitgen.integrations.transformers on the CPU; tests/gpu has the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

from jitgen import ProblemError  # noqa: E402
from jitgen.integrations import latent_attention, modules  # noqa: E402
from jitgen.integrations.decode_graph import DecodeStep  # noqa: E402
from jitgen.integrations.latent_attention import (  # noqa: E402
    AbsorbedAttention,
    LatentLayer,
    SharedWindows,
)
from jitgen.integrations.transformers import Experts, Linear, Mlp, Norm, Patched, patch  # noqa: E402
from tests.transformers_model import (  # noqa: E402
    NO_FP8,
    generate,
    logits_one_by_one,
    make_model,
    without_jitgen,
)

PROMPT = 9
BF16_NOISE = 0.05  # of logits: what one rounding in the embeddings makes of them
FP8_NOISE = 0.2  # with FP8 a rounding may move a code, and an expert


def make_both(
    monkeypatch: pytest.MonkeyPatch, *, cuda_graphs: bool = False, **options: Any
) -> tuple[Any, Any, Patched]:
    """A model as Transformers has it, the same patched, and what was."""
    without_jitgen(monkeypatch)
    torch.manual_seed(torch.initial_seed())
    usual, patched = make_model("cpu", **options), make_model("cpu", **options)
    patched.load_state_dict(usual.state_dict())
    count = patch(patched, cuda_graphs=cuda_graphs)
    assert patched.state_dict().keys() == usual.state_dict().keys()
    return usual, patched, count


@pytest.fixture
def in_fp8(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    usual, patched, count = make_both(monkeypatch)
    # Five projections of each attention, three of the MLP and of the shared expert.
    assert count == Patched(linears=2 * 5 + 3 + 3, experts=1, attentions=2)
    return usual, patched


@pytest.fixture
def in_bf16(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    usual, patched, count = make_both(monkeypatch, kept=NO_FP8)
    assert count == Patched(linears=0, experts=0, attentions=2)
    return usual, patched


def check_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Of most positions: where two experts are nearly as good, a rounding chooses."""
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < tolerance, error


def test_generation_follows_the_unpatched_model(in_fp8: tuple[Any, Any]) -> None:
    usual, patched = in_fp8
    options = {"return_dict_in_generate": True, "output_logits": True}
    out = generate(patched, torch.randint(1, 199, (2, PROMPT)), 12, **options)
    assert out.sequences.shape == (2, PROMPT + 12)
    with torch.no_grad():
        expected = usual(out.sequences).logits[:, PROMPT - 1 : -1].float()
    check_near(torch.stack(out.logits, dim=1).float(), expected, FP8_NOISE)


def test_decoding_follows_the_unpatched_model(in_bf16: tuple[Any, Any]) -> None:
    usual, patched = in_bf16
    tokens = torch.randint(1, 199, (2, 20))
    expected = logits_one_by_one(usual, tokens, PROMPT)
    check_near(logits_one_by_one(patched, tokens, PROMPT), expected, BF16_NOISE)


def test_padded_sequences_see_their_own_tokens(in_bf16: tuple[Any, Any]) -> None:
    usual, patched = in_bf16
    tokens = torch.randint(1, 199, (2, 20))
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[0, :5] = 0
    expected = logits_one_by_one(usual, tokens, 16, attention_mask=mask)
    got = logits_one_by_one(patched, tokens, 16, attention_mask=mask)
    check_near(got[0], expected[0], BF16_NOISE)
    check_near(got[1], expected[1], BF16_NOISE)


def test_several_tokens_decode_at_once(in_bf16: tuple[Any, Any]) -> None:
    usual, patched = in_bf16
    tokens = torch.randint(1, 199, (1, 30))
    results = []
    for model in (usual, patched):
        with torch.no_grad():
            cache = model(tokens[:, :20], use_cache=True).past_key_values
            model(tokens[:, 20:24], past_key_values=cache)
            results.append(model(tokens[:, 24:], past_key_values=cache).logits.float())
    assert all(isinstance(layer, LatentLayer) for layer in cache.layers)
    check_near(results[1], results[0], BF16_NOISE)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_other_caches_and_beams_generate(in_bf16: tuple[Any, Any], options: dict[str, Any]) -> None:
    prompt = torch.randint(1, 199, (1, PROMPT))
    options = {**options, "return_dict_in_generate": True, "output_logits": True}
    expected, got = (
        generate(model, prompt, 3, disable_compile=True, **options) for model in in_bf16
    )
    check_near(got.logits[0].float(), expected.logits[0].float(), BF16_NOISE)
    assert got.sequences.shape == expected.sequences.shape


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_steps_of_graphs_decode_as_usual(
    in_fp8: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    is_padded: bool,
    options: dict[str, Any],
) -> None:
    _, patched = in_fp8
    _, graphed, _ = make_both(monkeypatch, cuda_graphs=True)
    monkeypatch.setattr(DecodeStep, "run", counted := Counted(DecodeStep.run))
    monkeypatch.setattr(DecodeStep, "_launch", replay)
    for module in (latent_attention, modules):
        monkeypatch.setattr(module, "operators", lambda: torch.ops.jitgen)
    monkeypatch.setattr(latent_attention, "FIRST_CAPACITY", 16)  # outgrown
    tokens = torch.randint(1, 199, (2, PROMPT))
    mask = torch.ones_like(tokens)
    if is_padded:
        mask[0, :4] = 0
    options = {"return_dict_in_generate": True, "output_logits": True, **options}
    expected, got = (
        generate(model, tokens, 14, attention_mask=mask, **options) for model in (patched, graphed)
    )
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
    if "num_beams" not in options:  # which leave the memory that a step writes to
        assert counted.num_calls == 13 - 1  # there was room for 18 latents


def test_steps_of_graphs_are_for_one_token_of_each_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, graphed, _ = make_both(monkeypatch, kept=NO_FP8, cuda_graphs=True)
    tokens, results = torch.randint(1, 199, (1, 40)), []
    monkeypatch.setattr(DecodeStep, "run", counted := Counted(DecodeStep.run))
    for model in (usual, graphed):
        with torch.no_grad():
            cache, logits = DynamicCache(config=model.config), []
            for begin, end in ((0, 20), (20, 21), (21, 22), (22, 25), (25, 26)):
                logits.append(model(tokens[:, begin:end], past_key_values=cache).logits[:, -1])
            cache.crop(-3)
            assert cache.get_seq_length() == 23
            logits.append(model(tokens[:, 30:31], past_key_values=cache).logits[:, -1])
        model(tokens[:, 30:31], past_key_values=cache)  # with gradients
        results.append(torch.stack(logits).float())
    assert counted.num_calls == 4
    check_near(results[1], results[0], BF16_NOISE)
    assert type(graphed).__name__ == type(usual).__name__
    with pytest.raises(ProblemError, match="cuda_graphs of a DeepseekV3Model"):
        patch(make_model("cpu", kept=NO_FP8).model, cuda_graphs=True)


def test_models_that_wait_for_the_gpu_raise_before_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, graphed, _ = make_both(monkeypatch, kept=NO_FP8, cuda_graphs=True)
    assert usual.config._experts_implementation == "eager"
    assert graphed.config._experts_implementation == "grouped_mm"
    tokens = torch.randint(1, 199, (1, 12))
    waits: dict[str, Callable[[torch.Tensor], Any]] = {
        "_local_scalar_dense": lambda x: bool((x > 0).any()),
        "nonzero": lambda x: torch.where(x > 0),
        "index.Tensor": lambda x: x[x > 0],
        "repeat_interleave": lambda x: torch.repeat_interleave(x.int().abs().flatten()),
    }
    at = torch.tensor([0])

    for name, wait in waits.items():
        cache = DynamicCache(config=graphed.config)
        with torch.no_grad():
            graphed(tokens[:, :10], past_key_values=cache)
            layer = graphed.model.layers[1].mlp
            hook = layer.register_forward_hook(lambda _, __, x, f=wait: f(x) and None)
            for _ in range(2):
                with pytest.raises(ProblemError, match=f"waits for the result of aten.{name}"):
                    graphed(tokens[:, 10:11], past_key_values=cache)
            hook.remove()
            hook = layer.register_forward_hook(lambda _, __, x: x[:, at])
            logits = graphed(tokens[:, 10:11], past_key_values=cache).logits
            expected = usual(tokens[:, :11]).logits[:, -1:]
        hook.remove()
        check_near(logits.float(), expected.float(), BF16_NOISE)


class Recorded(TorchDispatchMode):  # type: ignore[misc]
    """What a CUDA graph keeps of a function: its operations, on the tensors they were on."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for function, args, kwargs, made in self.operations:
            if function.is_view:
                continue
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


def replay(step: DecodeStep, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`DecodeStep._launch` as it is on a GPU."""
    if step.num_runs < 2:
        return forward()
    if step.graph is None:
        with Recorded() as step.graph:
            step.logits = forward()
        for tensor in (step.logits, step.windows[1]):  # type: ignore[index]
            tensor.zero_()
    step.graph.replay()
    assert step.logits is not None
    return step.logits


class Counted:
    """A method that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.num_calls = function, 0

    def __get__(self, instance: Any, owner: Any) -> Any:
        def call(*args: Any) -> Any:
            self.num_calls += 1
            return self.function(instance, *args)

        return call


def test_modules_compute_what_theirs_do(in_fp8: tuple[Any, Any]) -> None:
    usual, patched = in_fp8
    x = torch.randn(5, 256).bfloat16()
    index, weights = torch.tensor([[0, 1], [1, 2], [3, 1], [0, 2], [0, 1]]), torch.rand(5, 2)
    seen = set()
    for name, module in patched.named_modules():
        # Between two products theirs rounds to bfloat16 and then to FP8, ours to FP8.
        given, tolerance = {
            Linear: ((x,), 2**-6),
            Norm: ((x,), 2**-7),
            Mlp: ((x,), 2**-4),
            Experts: ((x, index, weights), 2**-4),
        }.get(type(module), (None, 0))
        if given and 256 == getattr(module, "in_features", 256) == len(_first_weight(module)[0]):
            expected = usual.get_submodule(name)(*given).float()
            error = (module(*given).float() - expected).abs().max() / expected.abs().max()
            assert error < tolerance, (name, error)
            seen.add(type(module))
    assert seen == {Linear, Norm, Mlp, Experts}


def _first_weight(module: torch.nn.Module) -> Any:
    """Of at least two dimensions, the last of them the module's input."""
    return torch.atleast_2d(next(module.parameters())).flatten(0, -2)


def test_gate_and_up_are_joined_wherever_they_are(in_fp8: tuple[Any, Any]) -> None:
    mlp = in_fp8[1].model.layers[0].mlp
    x = torch.randn(5, 256).bfloat16()
    with torch.no_grad():
        expected = mlp(x)
        copied = copy.deepcopy(mlp)
        assert torch.equal(copied(x), expected)
        gate, up = copied.gate_proj, copied.up_proj
        gate.weight.data = gate.weight.data.clone()  # as `to` another device
        assert torch.equal(copied(x), expected)
        assert up.weight.data_ptr() == gate.weight.data_ptr() + gate.weight.numel()
        up.weight_scale_inv.mul_(2)
        assert torch.equal(mlp(x), expected)
        assert not torch.equal(copied(x), expected)
        copied.load_state_dict(mlp.state_dict())
        assert torch.equal(copied(x), expected)


def test_projections_of_keys_and_values_are_those_of_the_weight(in_fp8: tuple[Any, Any]) -> None:
    attention = in_fp8[1].model.layers[1].self_attn
    projection = attention.kv_b_proj
    spread = projection.weight_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = (projection.weight.float() * spread).bfloat16().view(2, 64, 256)
    assert torch.equal(torch.cat((attention.w_uk, attention.w_uv), dim=1), expected)


def test_latent_layer_keeps_what_was_cropped_selected_and_grown() -> None:
    layer, rank = LatentLayer(SharedWindows()), 6
    latents = torch.randn(3, 1, 600, rank + 2)

    def append(tokens: slice) -> Any:
        part = latents[:, :, tokens]
        return layer.update(part[..., :rank], part[..., rank:])

    append(slice(0, 10))
    append(slice(10, 11))
    rows = layer.rows
    layer.crop(-3)
    append(slice(8, 20))
    assert layer.rows is rows  # in place
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    latents = latents[[2, 0, 0]]
    keys, values = append(slice(20, 600))
    assert torch.equal(torch.cat((keys, values), dim=-1), latents)
    mask = torch.ones(3, 600, dtype=torch.int64)
    mask[1, :5] = mask[2, :599] = 0
    table, lengths = layer.windows(mask)
    assert lengths.tolist() == [600, 595, 1]
    for sequence, first in enumerate((0, 5, 599)):
        pages = layer.blocks()[table[sequence, : -(-(600 - first) // 64)].long()]
        seen = pages.reshape(-1, rank + 2)[: 600 - first]
        assert torch.equal(seen, latents[sequence, 0, first:])


def test_projections_share_the_codes_of_one_input(
    in_fp8: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jitgen.integrations import transformers as integration

    mlp, counted, quantize = in_fp8[1].model.layers[0].mlp, [], integration._quantize

    def count(x: torch.Tensor) -> Any:
        counted.append(x.shape)
        return quantize(x)

    monkeypatch.setattr(integration, "_quantize", count)
    with torch.no_grad():
        x = torch.randn(5, 256).bfloat16()
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        assert len(counted) == 1
        assert torch.equal(up, mlp.up_proj(x.clone()))
        assert torch.equal(gate, mlp.gate_proj(x))
        x.neg_()
        assert torch.equal(mlp.gate_proj(x), -gate)
        assert len(counted) == 4
    with torch.inference_mode():
        assert torch.equal(mlp.gate_proj(x.clone()), -gate)


def test_layers_share_the_answer_for_one_mask() -> None:
    shared = SharedWindows()
    layers = [LatentLayer(shared), LatentLayer(shared)]
    for layer in layers:
        layer.update(torch.randn(2, 1, 9, 6), torch.randn(2, 1, 9, 2))
    mask = torch.ones(2, 9, dtype=torch.int64)
    answer = shared.windows(layers[0], mask)
    assert shared.windows(layers[1], mask) is answer
    assert shared.windows(layers[1], None) is not answer
    mask[1, :4] = 0  # in place
    assert shared.windows(layers[0], mask)[1].tolist() == [9, 5]
    layers[0].update(torch.randn(2, 1, 1, 6), torch.randn(2, 1, 1, 2))
    assert shared.windows(layers[0], None)[1].tolist() == [10, 10]
    with torch.inference_mode():
        assert shared.windows(layers[1], mask.clone())[1].tolist() == [9, 5]


def test_experts_of_other_ranks_are_left_out(in_fp8: tuple[Any, Any]) -> None:
    _, patched = in_fp8
    (experts,) = (module for module in patched.modules() if isinstance(module, Experts))
    x = torch.randn(5, 256).bfloat16()
    index = torch.tensor([[0, 4], [4, 4], [3, 1], [4, 2], [0, 1]])  # 4 is no expert of this rank
    weights = torch.rand(5, 2)
    got = experts(x, index, weights)
    weights[index == 4] = 0
    expected = experts(x, index.clamp(max=3), weights)
    assert torch.allclose(got.float(), expected.float(), atol=1e-2, rtol=2**-7)
    assert (got[1] == 0).all()


def test_modules_that_break_a_rule_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    without_jitgen(monkeypatch)
    model = make_model("cpu", rank=128)  # no latent that the kernel takes
    (layer, _) = model.model.layers
    layer.mlp.up_proj.block_size = None
    assert patch(model) == Patched(linears=15, experts=1, attentions=0)
    assert not isinstance(layer.mlp.up_proj, Linear)
    assert not any(isinstance(module, AbsorbedAttention) for module in model.modules())
