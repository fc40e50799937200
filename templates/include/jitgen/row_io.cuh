// Eight neighbouring elements of a row, on 16-byte boundaries, as float32 and back.
#pragma once
#include "jitgen/attention.cuh"

namespace jitgen {

__device__ __forceinline__ float2 unpack(u32 packed, bf16) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack(u32 packed, fp16) {
    float2 v;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(packed));
    return v;
}

template <class T> __device__ __forceinline__ void load_row_unit(const T* from, float (&v)[8]) {
    const uint4 packed = *reinterpret_cast<const uint4*>(from);
    const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const float2 pair = unpack(pairs[i], T{});
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void load_row_unit(const float* from, float (&v)[8]) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

template <class T> __device__ __forceinline__ void store_row_unit(T* to, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(to) =
        uint4{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
}
__device__ __forceinline__ void store_row_unit(float* to, const float (&v)[8]) {
    reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
}

}  // namespace jitgen
