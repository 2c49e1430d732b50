// Pieces, chunks, and how a chunk is cut into vectors; the same arithmetic on the host and on the device.

#pragma once

#include <stdint.h>

#include "ds_fragment.h"

#define DSF_BOTH __host__ __device__ __forceinline__

struct alignas(16) Piece {
    uint64_t dst;
    uint64_t src;
    uint64_t numel;  // in bytes where the kind is DSF_BYTES
    uint32_t first_chunk;
    uint32_t kind;
};

DSF_BOTH constexpr int bytes_of(int type) { return type == DSF_F32 ? 4 : type == DSF_BYTES ? 1 : 2; }

// Elements that one thread moves at a time: 16 bytes of the wider side.
DSF_BOTH constexpr int vector_of(int src, int dst) {
    return 16 / (bytes_of(src) > bytes_of(dst) ? bytes_of(src) : bytes_of(dst));
}

DSF_BOTH constexpr int src_of(uint32_t kind) { return static_cast<int>(kind & 15); }
DSF_BOTH constexpr int dst_of(uint32_t kind) { return static_cast<int>(kind >> 4 & 15); }

// Elements before the first vector, which starts where a line of the caches does: the vectors of a warp then fill
// whole sectors of the memory, and no two warps write to the same one.
DSF_BOTH uint64_t head_of(uint64_t address, int element_bytes, uint64_t numel) {
    const uint64_t head = (DSF_LINE - static_cast<uint32_t>(address % DSF_LINE)) % DSF_LINE / element_bytes;
    return head < numel ? head : numel;
}
