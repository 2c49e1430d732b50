// Sum of squares, largest magnitude and number of non-finite elements, the same bits on every run.
//
// Each thread adds in an order that the launch fixes, a block adds its threads as a tree, and the block that finishes
// last adds the blocks in their order. Squares are fp32, sums fp64.

#pragma once

#include <stdint.h>

#include "ds_fragment.h"

struct alignas(8) Partial {
    double sum;
    float largest;  // NaN if any element is
    uint32_t pad;
    unsigned long long broken;  // elements that are not finite
};

struct Workspace {
    unsigned int finished;  // blocks; back at 0 when the last one is
    uint32_t pad[7];
    Partial partials[(DSF_WORKSPACE - 32) / sizeof(Partial)];
};

constexpr int kMostBlocks = (DSF_WORKSPACE - 32) / sizeof(Partial);

__device__ __forceinline__ float larger(float a, float b) {  // NaN if either is
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

struct Stats {
    double sum = 0;
    float largest = 0;
    unsigned long long broken = 0;

    template <int V>
    __device__ __forceinline__ void add(const float (&x)[V], float& squares) {
        float top = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            squares = fmaf(x[i], x[i], squares);
            top = larger(top, fabsf(x[i]));
        }
        if (!(top < __int_as_float(0x7f800000))) {  // rare
#pragma unroll
            for (int i = 0; i < V; ++i) broken += !(fabsf(x[i]) < __int_as_float(0x7f800000));
        }
        largest = larger(largest, top);
    }

    __device__ __forceinline__ void add_one(float x) {
        const float only[1] = {x};
        float squares = 0;
        add(only, squares);
        sum += squares;
    }

    __device__ __forceinline__ void merge(double s, float l, unsigned long long b) {
        sum += s;
        largest = larger(largest, l);
        broken += b;
    }

    // Leaves the block's statistics in thread 0.
    template <int THREADS>
    __device__ void reduce() {
        __shared__ Partial warps[THREADS / 32];
        const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int step = 16; step; step /= 2) {
            const double s = __shfl_down_sync(~0u, sum, step);
            const float l = __shfl_down_sync(~0u, largest, step);
            const unsigned long long b = __shfl_down_sync(~0u, broken, step);
            if (lane + step < 32) merge(s, l, b);
        }
        if (lane == 0) warps[warp] = Partial{sum, largest, 0, broken};
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 1; i < THREADS / 32; ++i) merge(warps[i].sum, warps[i].largest, warps[i].broken);
        }
        __syncthreads();
    }

    // Every thread of every block calls it once, at its end.
    template <int THREADS>
    __device__ void finish(Workspace* space, double* stats, float* found_inf) {
        __shared__ bool last;
        reduce<THREADS>();
        if (threadIdx.x == 0) {
            space->partials[blockIdx.x] = Partial{sum, largest, 0, broken};
            __threadfence();
            last = atomicInc(&space->finished, gridDim.x - 1) == gridDim.x - 1;
        }
        __syncthreads();
        if (!last) return;
        __threadfence();
        *this = Stats();
        for (unsigned i = threadIdx.x; i < gridDim.x; i += THREADS) {
            const volatile Partial* part = &space->partials[i];
            merge(part->sum, part->largest, part->broken);
        }
        reduce<THREADS>();
        if (threadIdx.x == 0) {
            stats[0] = sum;
            stats[1] = largest;
            stats[2] = static_cast<double>(broken);
            if (found_inf != nullptr && broken != 0) *found_inf = 1.0f;
        }
    }
};
