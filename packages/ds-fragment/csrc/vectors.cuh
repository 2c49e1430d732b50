// Loads, stores and casts of a few elements at a time.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "work.cuh"

template <int N>
struct alignas(4 * N) Words {  // 4, 8 or 16 bytes
    uint32_t w[N];
};

// STREAMS: every byte is read and written once, so it should be the first to leave the caches.
template <bool STREAMS, int N>
__device__ __forceinline__ Words<N> load(uint64_t address) {
    Words<N> out;
    if constexpr (N == 4) {
        const auto* at = reinterpret_cast<const uint4*>(address);
        const uint4 v = STREAMS ? __ldcs(at) : *at;
        out.w[0] = v.x, out.w[1] = v.y, out.w[2] = v.z, out.w[3] = v.w;
    } else {
        const auto* at = reinterpret_cast<const uint2*>(address);
        const uint2 v = STREAMS ? __ldcs(at) : *at;
        out.w[0] = v.x, out.w[1] = v.y;
    }
    return out;
}

template <bool STREAMS, int N>
__device__ __forceinline__ void store(uint64_t address, const Words<N>& v) {
    if constexpr (N == 4) {
        auto* at = reinterpret_cast<uint4*>(address);
        const uint4 value = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
        STREAMS ? __stcs(at, value) : void(*at = value);
    } else {
        auto* at = reinterpret_cast<uint2*>(address);
        const uint2 value = make_uint2(v.w[0], v.w[1]);
        STREAMS ? __stcs(at, value) : void(*at = value);
    }
}

// 4 N bytes that begin `skip` bytes into this lane's vector (0 < skip < 4 N) and end in the next lane's; after the last
// lane comes `beyond` of the first one. Every lane of the warp takes part.
template <int N>
__device__ __forceinline__ Words<N> shifted(const Words<N>& mine, const Words<N>& beyond, uint32_t skip) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t w[2 * N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        w[i] = mine.w[i];
        w[N + i] = __shfl_sync(~0u, lane == 0 ? beyond.w[i] : mine.w[i], (lane + 1) % 32);
    }
    if constexpr (N == 4) {
        if (skip & 8) {
#pragma unroll
            for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
        }
    }
    if (skip & 4) {
#pragma unroll
        for (int i = 0; i <= N; ++i) w[i] = w[i + 1];
    }
    Words<N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.w[i] = __funnelshift_r(w[i], w[i + 1], (skip & 3) * 8);
    return out;
}

template <int TYPE, int V>
using Packed = Words<V * bytes_of(TYPE) / 4>;

template <int TYPE, int V>
__device__ __forceinline__ void unpack(const Packed<TYPE, V>& in, float (&out)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
        if constexpr (TYPE == DSF_F32) {
            out[i] = __uint_as_float(in.w[i]);
        } else if constexpr (TYPE == DSF_BF16) {  // the upper half of a float: exact, NaN payloads too
            out[i] = __uint_as_float(i % 2 ? in.w[i / 2] & 0xffff0000u : in.w[i / 2] << 16);
        } else {
            const uint16_t half = static_cast<uint16_t>(i % 2 ? in.w[i / 2] >> 16 : in.w[i / 2] & 0xffffu);
            out[i] = __half2float(__ushort_as_half(half));
        }
    }
}

// To nearest even, as the hardware does it.
template <int TYPE>
__device__ __forceinline__ uint32_t pair(float low, float high) {
    if constexpr (TYPE == DSF_BF16) {
        const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return static_cast<uint32_t>(__bfloat16_as_ushort(v.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(v.y))
                                                                      << 16;
    } else {
        const __half2 v = __floats2half2_rn(low, high);
        return static_cast<uint32_t>(__half_as_ushort(__low2half(v))) |
               static_cast<uint32_t>(__half_as_ushort(__high2half(v))) << 16;
    }
}

template <int TYPE, int V>
__device__ __forceinline__ Packed<TYPE, V> pack(const float (&in)[V]) {
    Packed<TYPE, V> out;
#pragma unroll
    for (int i = 0; i < V * bytes_of(TYPE) / 4; ++i) {
        if constexpr (TYPE == DSF_F32) {
            out.w[i] = __float_as_uint(in[i]);
        } else {
            out.w[i] = pair<TYPE>(in[2 * i], in[2 * i + 1]);
        }
    }
    return out;
}

template <int TYPE>
__device__ __forceinline__ float load_one(uint64_t address) {
    if constexpr (TYPE == DSF_F32) {
        return *reinterpret_cast<const float*>(address);
    } else if constexpr (TYPE == DSF_BF16) {
        return __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(address)) << 16);
    } else {
        return __half2float(__ushort_as_half(*reinterpret_cast<const uint16_t*>(address)));
    }
}

template <int TYPE>
__device__ __forceinline__ void store_one(uint64_t address, float value) {
    if constexpr (TYPE == DSF_F32) {
        *reinterpret_cast<float*>(address) = value;
    } else {
        *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(pair<TYPE>(value, 0.0f) & 0xffffu);
    }
}
