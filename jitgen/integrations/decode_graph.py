"""Decoding one token of each sequence in a CUDA graph: one launch in place of a thousand.

What changes from token to token lies in tensors: which tokens, where they are in the sequences,
what the mask shows, and where the caches end. Of such tokens over one cache the first is watched
for what no graph holds, the second loads and compiles what a graph must find ready, and the third
is captured; so again where the cache has grown out of its memory.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ProblemError
from .latent_attention import PAGE, LatentLayer

_TAKEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}


def decode_in_graphs(model: PreTrainedModel) -> None:
    """Have the model's forward run one token of each sequence in CUDA graphs, from now on."""
    usual = type(model)
    signature = inspect.signature(usual.forward)

    @functools.wraps(usual.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        layers = _layers(given)
        if not layers:
            return usual.forward(self, *args, **kwargs)
        logits = _step_of(layers).run(functools.partial(usual.forward, self), given, layers)
        return CausalLMOutputWithPast(logits=logits, past_key_values=given["past_key_values"])

    model.__class__ = type(usual.__name__, (usual,), {"forward": forward})
    model.__class__.__module__ = usual.__module__


def _layers(given: dict[str, Any]) -> list[LatentLayer]:
    """The cache's layers if this is a call that a graph can stand for; else none."""
    tokens, cache = given.get("input_ids"), given.get("past_key_values")
    others = {name: value for name, value in given.items() if name not in _TAKEN | {"self"}}
    is_usual = others.pop("use_cache", True) is not False
    is_usual &= others.pop("return_dict", True) is not False
    if (
        cache is None
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(cache) is not DynamicCache
        or tokens is None
        or tokens.shape[1] != 1
        or not is_usual
        or any(value not in (None, False) for value in others.values())
        or not isinstance(given.get("logits_to_keep", 0), int)
    ):
        return []
    layers = cache.layers
    if not layers or not all(isinstance(layer, LatentLayer) for layer in layers):
        return []
    length, mask = layers[0].get_seq_length(), given.get("attention_mask")
    is_padded_only = mask is None or tuple(mask.shape) == (len(tokens), length + 1)
    is_16_bit = length > 0 and layers[0].keys.dtype in (torch.bfloat16, torch.float16)
    is_ready = is_16_bit and all(layer.is_ready(length + 1) for layer in layers)
    return layers if is_padded_only and is_ready and len(layers[0].keys) == len(tokens) else []


def _step_of(layers: list[LatentLayer]) -> DecodeStep:
    """That of the memory that the layers have now."""
    shared = layers[0].shared
    addresses = [layer.rows.data_ptr() for layer in layers]  # type: ignore[union-attr]
    if shared.step is None or shared.step.addresses != addresses:
        shared.step = DecodeStep(layers[0], addresses)
    return shared.step


class DecodeStep:
    """One token of each sequence, over caches whose memory is at `addresses`."""

    def __init__(self, layer: LatentLayer, addresses: list[int]) -> None:
        batch, capacity, _ = layer.rows.shape  # type: ignore[union-attr]
        zeros = functools.partial(torch.zeros, device=layer.rows.device, dtype=torch.int64)  # type: ignore[union-attr]
        self.addresses = addresses
        self.tokens, self.positions = zeros(batch, 1), zeros(batch, 1)
        self.end = zeros(1)  # where the token goes
        self.mask = zeros(batch, capacity)  # what is seen of the rows
        self.no_mask = zeros(batch, 1, 1, 1)  # of four dimensions: Transformers makes none then
        self.windows: tuple[torch.Tensor, torch.Tensor] | None = None
        self.num_runs = 0
        self.graph: Any = None  # torch.cuda.CUDAGraph
        self.logits: Any = None  # a tensor, where the graph leaves them

    def run(self, forward: Any, given: dict[str, Any], layers: list[LatentLayer]) -> torch.Tensor:
        """The logits [batch, 1, vocabulary] of a call."""
        length, mask = layers[0].get_seq_length(), given.get("attention_mask")
        positions = given.get("position_ids")
        self.tokens.copy_(given["input_ids"])
        self.positions.fill_(length) if positions is None else self.positions.copy_(positions)
        seen = self.mask[:, : length + 1]
        seen.fill_(1) if mask is None else seen.copy_(mask)
        self.end.fill_(length)
        logits = self._launch(
            functools.partial(self._forward, forward, given["past_key_values"], layers[0])
        )
        self.num_runs += 1
        layers[0].shared.num_appended += 1
        return logits.clone()  # the next one writes where these are

    def _launch(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `forward` returns."""
        device = self.tokens.device
        if self.num_runs == 0:
            with _NoWaiting(device):  # under which nothing that is compiled runs
                return forward()
        if self.num_runs == 1 or not self.tokens.is_cuda:
            return forward()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.logits = _capture(self.graph, forward, device)
        self.graph.replay()
        logits: torch.Tensor = self.logits
        return logits

    def _forward(self, forward: Any, cache: DynamicCache, layer: LatentLayer) -> torch.Tensor:
        shared = layer.shared
        shared.is_stepping = True
        try:
            self.windows = layer.windows(self.mask, self.mask.shape[1] - PAGE)
            logits: torch.Tensor = forward(
                input_ids=self.tokens,
                position_ids=self.positions,
                attention_mask=self.no_mask,
                past_key_values=cache,
                use_cache=True,
            ).logits
            return logits
        finally:
            shared.is_stepping = False


class _NoWaiting(TorchDispatchMode):  # type: ignore[misc]
    """No operation of this thread whose result's shape, or Python's way on, is for values to say:
    of a device, the host would wait for them. A capture that meets one fails, and torch's
    random numbers with it, for good."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _goes_by_values(function, args, kwargs) and any(
            isinstance(leaf, torch.Tensor) and leaf.device == self.device
            for leaf in tree_leaves((args, kwargs))
        ):
            raise ProblemError(f"cuda_graphs of a model that waits for the result of {function}")
        return function(*args, **kwargs)


def _goes_by_values(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if torch.Tag.data_dependent_output in function.tags:
        return True
    if function is torch.ops.aten.index.Tensor:  # of masks; a list of numbers has a length
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    is_dynamic = torch.Tag.dynamic_output_shape in function.tags
    return is_dynamic and kwargs.get("output_size") is None


def _capture(graph: Any, function: Callable[[], torch.Tensor], device: Any) -> torch.Tensor:
    """As `torch.cuda.graph` does, which also collects garbage and empties torch's cache."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(side)
    return result
