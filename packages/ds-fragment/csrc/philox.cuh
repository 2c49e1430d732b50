// Random bits that depend on a seed and a place alone, and rounding with them.
//
// Philox4x32-10: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

#pragma once

#include <stdint.h>

#include "ds_fragment.h"

// The bits of the four elements of a block (element / 4) of a piece.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t block, uint32_t piece) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    uint32_t x0 = static_cast<uint32_t>(block), x1 = static_cast<uint32_t>(block >> 32), x2 = piece, x3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * x0, b = static_cast<uint64_t>(0xCD9E8D57u) * x2;
        const uint32_t y0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ k0, y2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ k1;
        x1 = static_cast<uint32_t>(b), x3 = static_cast<uint32_t>(a), x0 = y0, x2 = y2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(x0, x1, x2, x3);
}

// The value, moved to one of its two neighbours in TYPE, the nearer the likelier; as a float that TYPE holds exactly.
// What lies beyond the largest finite number of TYPE, and what is not finite, is left to round to nearest.
template <int TYPE>
__device__ __forceinline__ float dither(float value, uint32_t random) {
    const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
    if constexpr (TYPE == DSF_BF16) {
        const uint32_t moved = (bits + (random & 0xffffu)) & 0xffff0000u;
        return __uint_as_float(magnitude > 0x7f7f0000u ? bits : moved);
    } else {
        const uint32_t moved = (bits + (random & 0x1fffu)) & 0xffffe000u;
        // Below 2^-14 the numbers of fp16 are 2^-24 apart.
        const float scaled = __uint_as_float(magnitude) * 16777216.0f, whole = floorf(scaled);
        const float up = scaled - whole > static_cast<float>(random >> 8) * 0x1p-24f ? 1.0f : 0.0f;
        const uint32_t tiny = __float_as_uint((whole + up) * 0x1p-24f) | (bits & 0x80000000u);
        const uint32_t inside = magnitude < 0x38800000u ? tiny : moved;
        return __uint_as_float(magnitude > 0x477fe000u ? bits : inside);
    }
}
