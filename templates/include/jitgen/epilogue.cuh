// Operations of epilogue expressions (jitgen/expr.py) on pairs of adjacent columns. Every one rounds once, to nearest
// even, and is never contracted: the interpreter predicts each bit (gelu and silu within their stated bound).
#pragma once
#include "jitgen/ptx.cuh"

namespace jitgen::epilogue {

#define JITGEN_MAP(name, x, y, f)                                 \
    __device__ __forceinline__ float2 name(float2 x, float2 y) { \
        return {f(x.x, y.x), f(x.y, y.y)};                        \
    }
JITGEN_MAP(add, x, y, __fadd_rn)
JITGEN_MAP(sub, x, y, __fsub_rn)
JITGEN_MAP(mul, x, y, __fmul_rn)
#undef JITGEN_MAP

__device__ __forceinline__ float maximum(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ __forceinline__ float2 maximum(float2 x, float2 y) { return {maximum(x.x, y.x), maximum(x.y, y.y)}; }

__device__ __forceinline__ float2 relu(float2 x) { return maximum(x, float2{0.0f, 0.0f}); }

// x / (1 + exp(-x)). A division that rounds takes some hundred instructions where the quotient is near the ends of the
// range, as with x < -60; this one takes two. A quarter of both, because a reciprocal below 2^-126 would be zero.
__device__ __forceinline__ float silu(float x) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(__fmaf_rn(0.25f, expf(-x), 0.25f)));
    return __fmul_rn(__fmul_rn(0.25f, x), reciprocal);
}
__device__ __forceinline__ float2 silu(float2 x) { return {silu(x.x), silu(x.y)}; }

__device__ __forceinline__ float gelu(float x) {
    return __fmul_rn(__fmul_rn(0.5f, x), erfcf(__fmul_rn(x, -0.707106781f)));
}
__device__ __forceinline__ float2 gelu(float2 x) { return {gelu(x.x), gelu(x.y)}; }

template <class T> __device__ __forceinline__ float2 cast(float2 x);
template <> __device__ __forceinline__ float2 cast<float>(float2 x) { return x; }

// bf16 is the upper half of a float32.
__device__ __forceinline__ float2 unpack_bf16(u32 packed) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}
template <> __device__ __forceinline__ float2 cast<bf16>(float2 x) { return unpack_bf16(pack_bf16(x.x, x.y)); }

__device__ __forceinline__ float2 constant(float x) { return {x, x}; }

// One element of an operand, for both columns; elements `index` and `index + 1` of another. Volatile, so that the loads
// stay with the elements they are for: hoisted together, or out of the K loop, they would not fit into registers.
__device__ __forceinline__ float2 load_scalar(const float* operand) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(operand) : "memory");
    return {value, value};
}
__device__ __forceinline__ float2 load_scalar(const bf16* operand) {
    u16 bits;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(operand) : "memory");
    const float value = __uint_as_float(u32(bits) << 16);
    return {value, value};
}
__device__ __forceinline__ float2 load_pair(const bf16* operand, u64 index) {
    u32 packed;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(packed) : "l"(operand + index) : "memory");
    return unpack_bf16(packed);
}
__device__ __forceinline__ float2 load_pair(const float* operand, u64 index) {
    float2 pair;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "l"(operand + index) : "memory");
    return pair;
}

}  // namespace jitgen::epilogue
