// Integer and storage types. Nothing else is included: every microsecond of a JIT compile counts.
#pragma once

namespace jitgen {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Storage types that are only moved or converted, never computed with.
struct fp8_e4m3 { u8 bits; };
struct bf16 { u16 bits; };
struct fp16 { u16 bits; };

// An opaque CUtensorMap, passed by value as a __grid_constant__ kernel parameter.
struct __align__(64) TensorMap { u64 opaque[16]; };

__host__ __device__ constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
__host__ __device__ constexpr u32 round_up(u32 a, u32 b) { return ceil_div(a, b) * b; }

}  // namespace jitgen
