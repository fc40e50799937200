// What quantizing a tile takes beside epilogues' operations: the device side of jitgen.quantization.
#pragma once
#include "jitgen/ptx.cuh"

namespace jitgen {

constexpr u32 kDivide = 0, kReciprocal = 1, kReciprocalUe8m0 = 2;  // jitgen.quantization.RULES

// Eight neighbouring elements of a row as they lie in memory. Magnitudes are compared as integers, NaN above all.
template <class T> struct Unit;

template <> struct Unit<float> {
    u32 words[8];
    __device__ __forceinline__ float operator[](u32 i) const { return __uint_as_float(words[i]); }
    __device__ __forceinline__ void make_opaque() {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) words[i] = opaque(words[i]);
    }
    __device__ __forceinline__ void keep_largest(const Unit& other) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) words[i] = max(words[i], other.words[i] & 0x7fffffff);
    }
    // The largest magnitude, as float32's bits.
    __device__ __forceinline__ u32 largest() const {
        u32 bits = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) bits = max(bits, words[i] & 0x7fffffff);
        return bits;
    }
};

__device__ __forceinline__ u32 max_u16x2(u32 x, u32 y) {
    u32 z;
    asm("max.u16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

template <> struct Unit<bf16> {
    u32 words[4];
    __device__ __forceinline__ float operator[](u32 i) const {
        return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
    }
    __device__ __forceinline__ void make_opaque() {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) words[i] = opaque(words[i]);
    }
    __device__ __forceinline__ void keep_largest(const Unit& other) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) words[i] = max_u16x2(words[i], other.words[i] & 0x7fff7fff);
    }
    __device__ __forceinline__ u32 largest() const {
        u32 pair = 0;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) pair = max_u16x2(pair, words[i] & 0x7fff7fff);
        return max(pair << 16, pair & 0xffff0000);
    }
};

__device__ __forceinline__ u16 load_bits(const bf16* from) { return from->bits; }
__device__ __forceinline__ u32 load_bits(const float* from) { return __float_as_uint(*from); }

// Eight elements that are 16-byte units. Read once: the codes should stay in L2, these need not.
template <class T> __device__ __forceinline__ void load_whole(Unit<T>& unit, const T* from) {
#pragma unroll
    for (u32 i = 0; i < sizeof(unit) / 16; ++i)
        reinterpret_cast<uint4*>(&unit)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
}

// The first `count` of eight elements, wherever they lie.
template <class T> __device__ __forceinline__ void load_some(Unit<T>& unit, const T* from, u32 count) {
    constexpr u32 kBits = 8 * sizeof(T), kInWord = 32 / kBits;
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        if (i < count) unit.words[i / kInWord] |= u32(load_bits(from + i)) << i % kInWord * kBits;
}

// The first `count` of eight codes.
__device__ __forceinline__ void store_some(fp8_e4m3* to, uint2 codes, u32 count) {
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        if (i < count) to[i].bits = u8((i < 4 ? codes.x : codes.y) >> i % 4 * 8);
}

// The scale of a block whose largest magnitude has the bits `amax`.
template <u32 kRule> __device__ __forceinline__ float make_scale(u32 amax) {
    if (amax > 0x7f800000) return __uint_as_float(0x7fffffff);
    if constexpr (kRule == kDivide) return __fdiv_rn(__uint_as_float(max(amax, 0x24600000u)), 448.0f);  // 448 * 2^-63
    const float scale =
        __fmul_rn(__uint_as_float(max(amax, 0x38d1b717u)), __uint_as_float(0x3b124925));  // 1e-4; 1 / 448
    if (kRule == kReciprocal || amax == 0x7f800000) return scale;
    return __uint_as_float((__float_as_uint(scale) + 0x7fffff) & 0x7f800000);
}

// What values are divided by, and its reciprocal: see quotient.
struct Divisor {
    float scale, inverse;

    Divisor() = default;
    // An infinite scale makes zeros of finite values, and NaN of infinite ones: so does 0 as reciprocal beside 1.
    __device__ __forceinline__ explicit Divisor(float scale)
        : scale(fabsf(scale) < __uint_as_float(0x7f800000) ? scale : 1.0f), inverse(__fdiv_rn(1.0f, scale)) {}
    __device__ __forceinline__ Divisor(float scale, float inverse) : scale(scale), inverse(inverse) {}
};

// x / scale, rounded once, or x * (1 / scale). A quotient is mended twice by what is left of it, after which it is the
// nearest (Markstein: the reciprocal is rounded correctly, and the first one mended is off by less than a unit); so far
// as E4M3 can tell it from zero nothing leaves float32's range. Once is enough for x and amax of 8 significant bits: a
// test goes through all of them. What is left of a zero is -0 if rounded down, and keeps the sign of either zero.
template <u32 kRule, class T> __device__ __forceinline__ float quotient(float x, Divisor by) {
    float q = __fmul_rn(x, by.inverse);
    if constexpr (kRule != kDivide) return q;
#pragma unroll
    for (u32 i = 0; i < (sizeof(T) == 2 ? 1 : 2); ++i) q = __fmaf_rn(__fmaf_rd(-q, by.scale, x), by.inverse, q);
    return q;
}

// The codes of eight values.
template <u32 kRule, class T, class Value> __device__ __forceinline__ uint2 quantize(Value value, Divisor by) {
    u32 words[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const auto pair = [&](u32 j) {
            return u32(pack_e4m3(quotient<kRule, T>(value(j), by), quotient<kRule, T>(value(j + 1), by)));
        };
        words[i] = pair(4 * i) | pair(4 * i + 2) << 16;
    }
    return {words[0], words[1]};
}

// Transposes 4 x 4 bytes, a row a word.
__device__ __forceinline__ void transpose_bytes(u32& a, u32& b, u32& c, u32& d) {
    const u32 low_ab = __byte_perm(a, b, 0x5140), high_ab = __byte_perm(a, b, 0x7362);
    const u32 low_cd = __byte_perm(c, d, 0x5140), high_cd = __byte_perm(c, d, 0x7362);
    a = __byte_perm(low_ab, low_cd, 0x5410), b = __byte_perm(low_ab, low_cd, 0x7632);
    c = __byte_perm(high_ab, high_cd, 0x5410), d = __byte_perm(high_ab, high_cd, 0x7632);
}

// Of a warp's 16 threads that hold units of the same eight rows, each gets the largest magnitude of one of the rows:
// thread 2i and 2i + 1 that of row i. Half of what is left changes hands in each step.
__device__ __forceinline__ u32 largest_of_row(u32 (&amax)[8], u32 lane) {
#pragma unroll
    for (u32 count = 4; count > 0; count /= 2) {
        const bool upper = lane & 2 * count;
#pragma unroll
        for (u32 i = 0; i < count; ++i) {
            const u32 given = upper ? amax[i] : amax[i + count], kept = upper ? amax[i + count] : amax[i];
            amax[i] = max(kept, __shfl_xor_sync(0xffffffff, given, 2 * count));
        }
    }
    return max(amax[0], __shfl_xor_sync(0xffffffff, amax[0], 1));
}

}  // namespace jitgen
