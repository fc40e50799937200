// Tokens of an FP8 cache: 512 E4M3 codes, a float32 scale for each 128 of them, then 64 BF16 elements. They lie in
// shared memory as in the cache, and are decoded where they are used: in the registers of wgmma's A.
#pragma once
#include "jitgen/attention.cuh"
#include "jitgen/mbarrier.cuh"

namespace jitgen {

constexpr u32 kTokenBytes = 656, kScalesAt = 512, kTailAt = 528;
constexpr u32 kScaleBlocks = 4, kScaleColumns = 128;

// `bytes` of memory to shared memory, both at multiples of 16; the barrier counts them.
__device__ __forceinline__ void bulk_load(u32 smem, const u8* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Two f16, of the codes in the low or the high half of a register: exact.
__device__ __forceinline__ u32 decode_low(u32 codes) {
    u32 values;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(values) : "r"(codes));
    return values;
}
__device__ __forceinline__ u32 decode_high(u32 codes) {
    u32 values;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}"
        : "=r"(values)
        : "r"(codes));
    return values;
}
__device__ __forceinline__ u32 mul_f16x2(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// Of each half.
__device__ __forceinline__ u32 max_u16x2(u32 a, u32 b) {
    u32 most;
    asm("max.u16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
}

__device__ __forceinline__ u16 round_f16(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ uint2 ld_shared_u2(u32 smem) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(smem) : "memory");
    return v;
}
__device__ __forceinline__ void st_shared(u32 smem, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Whether any of the `kThreads` threads that meet at the barrier has it.
template <u32 kThreads> __device__ __forceinline__ bool any_of(u32 barrier, bool has) {
    u32 any;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\nbarrier.cta.red.or.pred p, %2, %3, p;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(any)
        : "r"(u32(has)), "r"(barrier), "n"(kThreads)
        : "memory");
    return any != 0;
}

// 2^e as a float32, e in -126..127.
__device__ __forceinline__ float power_of_2(int e) { return __uint_as_float(u32(e + 127) << 23); }
// floor(log2(x)) of a positive normal float32.
__device__ __forceinline__ int exponent_of(float x) { return int(__float_as_uint(x) >> 23) - 127; }

// What is said of a block of 64 tokens beside its bytes (jitgen/ir_mla_fp8.py): a token's unit is the largest of
// its scales, and its codes count in 1/64 of that.
struct TokenBlock {
    u16 ratios[kScaleBlocks][64];  // f16: 64 * a token's scale of that block of columns / its unit
    u16 token_ratios[64][kScaleBlocks];  // the same, a token's side by side
    float scores[64];              // what scores of codes are multiplied by: unit / 64
    float weights[64];             // what p is multiplied by: unit * 2^(kWeightExponent - exponent), 0 for no token
    u32 valid[2];                  // a bit for each token that there is
    float growth;                  // 2^(exponent before - exponent)
    float outputs;                 // what sums of p and codes are multiplied by: 2^(exponent - kWeightExponent) / 64
};

constexpr float kLeastUnit = 0x1p-60f;  // of a token
constexpr float kRatio = 64.0f;
constexpr int kWeightExponent = 4;  // p <= 2^8 and units <= 2^(exponent + 3): products of both are <= 2^15 in f16
constexpr int kUnitSlack = 3;

}  // namespace jitgen
