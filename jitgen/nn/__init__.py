"""Layers that train in FP8, as torch modules; they need torch, which `import jitgen` does not."""

from .linear import Fp8GroupedLinear, Fp8Linear

__all__ = ["Fp8GroupedLinear", "Fp8Linear"]
