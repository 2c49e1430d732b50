// The four kernels: each is a sweep over chunks with a different operation on the vectors.

#pragma once

#include "philox.cuh"
#include "stats.cuh"
#include "vectors.cuh"
#include "work.cuh"

// Threads of a block, vectors that each has in flight, blocks on a multiprocessor (at least; it keeps the registers in
// bounds), and whether what is read and written leaves the caches first: what was fastest on an H200, for kernels that
// only move and for those that add up as well. A block's loads are under way together and so are its stores, and long
// runs of either are what the memory likes.
struct Moves {
    static constexpr int kThreads = 512, kUnroll = 4, kBlocks = 2;
    static constexpr bool kStreams = false, kAhead = false;
};
struct Sums {
    static constexpr int kThreads = 512, kUnroll = 6, kBlocks = 1;
    static constexpr bool kStreams = true, kAhead = true;
};

struct Table {
    const Piece* pieces;
    const uint32_t* piece_of;  // by chunk
    uint32_t chunks;
    uint32_t groups;  // vectors in a chunk
    uint64_t dst_base;
    uint64_t src_base;
};

// [Note: operation] What a sweep does with a vector. SRC and DST are the element types, V the elements of a vector,
// kFrom whether vectors start at an aligned source instead of destination, kReads whether the destination is read too.
// The sweep loads several vectors, so that the loads are under way together; `give` computes and stores one; `one` does
// it all for an element at either end; `begin` and `round` are called before a piece and after some vectors.

template <int S, int D>
struct Copy : Moves {
    static constexpr int SRC = S, DST = D, V = vector_of(S, D);
    static constexpr bool kAhead = bytes_of(S) < bytes_of(D);
    static constexpr bool kFrom = false;
    using In = Packed<S, V>;
    __device__ __forceinline__ void begin(const Piece&, uint32_t) {}
    __device__ __forceinline__ void give(const In& in, const Words<bytes_of(DST) * V / 4>&, uint64_t dst, uint64_t) {
        float x[V];
        unpack<S, V>(in, x);
        store<kStreams>(dst, pack<D, V>(x));
    }
    __device__ __forceinline__ void one(uint64_t src, uint64_t dst, uint64_t) { store_one<D>(dst, load_one<S>(src)); }
    __device__ __forceinline__ void round() {}
    static constexpr bool kReads = false;
};

struct Bytes : Moves {
    static constexpr int SRC = DSF_BYTES, DST = DSF_BYTES, V = 16;
    static constexpr bool kFrom = false, kReads = false;
    using In = Words<4>;
    __device__ __forceinline__ void begin(const Piece&, uint32_t) {}
    __device__ __forceinline__ void give(const In& in, const Words<bytes_of(DST) * V / 4>&, uint64_t dst, uint64_t) {
        store<kStreams>(dst, in);
    }
    __device__ __forceinline__ void one(uint64_t src, uint64_t dst, uint64_t) {
        *reinterpret_cast<uint8_t*>(dst) = *reinterpret_cast<const uint8_t*>(src);
    }
    __device__ __forceinline__ void round() {}
};

template <int S, bool ACCUMULATE>
struct Gather : Sums {
    static constexpr int SRC = S, DST = DSF_F32, V = vector_of(S, DSF_F32);
    static constexpr bool kFrom = false, kReads = ACCUMULATE;
    using In = Packed<S, V>;
    Stats& stats;
    float scale;
    float squares = 0;
    __device__ __forceinline__ Gather(Stats& s, float by) : stats(s), scale(by) {}
    __device__ __forceinline__ void begin(const Piece&, uint32_t) {}
    __device__ __forceinline__ void give(const In& in, const Words<4>& old, uint64_t dst, uint64_t) {
        float x[V];
        unpack<S, V>(in, x);
#pragma unroll
        for (int i = 0; i < V; ++i) {  // two roundings, as a product and a sum in torch have
            x[i] = __fmul_rn(x[i], scale);
            if constexpr (ACCUMULATE) x[i] = __fadd_rn(__uint_as_float(old.w[i]), x[i]);
        }
        store<kStreams>(dst, pack<DSF_F32, V>(x));
        stats.add(x, squares);
    }
    __device__ __forceinline__ void one(uint64_t src, uint64_t dst, uint64_t) {
        float x = __fmul_rn(load_one<S>(src), scale);
        if constexpr (ACCUMULATE) x = __fadd_rn(load_one<DSF_F32>(dst), x);
        store_one<DSF_F32>(dst, x);
        stats.add_one(x);
    }
    __device__ __forceinline__ void round() { stats.sum += squares, squares = 0; }
};

template <int S>
struct Norm : Sums {
    static constexpr int SRC = S, DST = S, V = vector_of(S, S);
    static constexpr bool kFrom = true, kReads = false;
    using In = Packed<S, V>;
    Stats& stats;
    float squares = 0;
    __device__ __forceinline__ explicit Norm(Stats& s) : stats(s) {}
    __device__ __forceinline__ void begin(const Piece&, uint32_t) {}
    __device__ __forceinline__ void give(const In& in, const In&, uint64_t, uint64_t) {
        float x[V];
        unpack<S, V>(in, x);
        stats.add(x, squares);
    }
    __device__ __forceinline__ void one(uint64_t src, uint64_t, uint64_t) { stats.add_one(load_one<S>(src)); }
    __device__ __forceinline__ void round() { stats.sum += squares, squares = 0; }
};

template <int D>
struct Publish : Moves {
    static constexpr int SRC = DSF_F32, DST = D, V = vector_of(DSF_F32, D);
    static constexpr bool kFrom = false, kReads = false;
    using In = Packed<DSF_F32, V>;
    uint64_t seed;
    uint32_t piece = 0;
    __device__ __forceinline__ explicit Publish(uint64_t s) : seed(s) {}
    __device__ __forceinline__ void begin(const Piece&, uint32_t index) { piece = index; }
    __device__ __forceinline__ void give(const In& in, const Words<bytes_of(DST) * V / 4>&, uint64_t dst,
                                         uint64_t element) {
        const uint4 r = philox(seed, element / 4, piece);
        uint32_t random[8] = {r.x, r.y, r.z, r.w, 0, 0, 0, 0};
        const uint32_t skip = static_cast<uint32_t>(element % 4);
        if (skip != 0) {  // the vector lies across two blocks
            const uint4 next = philox(seed, element / 4 + 1, piece);
            random[4] = next.x, random[5] = next.y, random[6] = next.z, random[7] = next.w;
            if (skip & 2) {
#pragma unroll
                for (int i = 0; i < 6; ++i) random[i] = random[i + 2];
            }
            if (skip & 1) {
#pragma unroll
                for (int i = 0; i < 5; ++i) random[i] = random[i + 1];
            }
        }
        float x[V];
        unpack<DSF_F32, V>(in, x);
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = dither<D>(x[i], random[i]);
        store<kStreams>(dst, pack<D, V>(x));
    }
    __device__ __forceinline__ void one(uint64_t src, uint64_t dst, uint64_t element) {
        const uint4 r = philox(seed, element / 4, piece);
        const uint32_t low = element & 1 ? r.y : r.x, high = element & 1 ? r.w : r.z;
        store_one<D>(dst, dither<D>(load_one<DSF_F32>(src), element & 2 ? high : low));
    }
    __device__ __forceinline__ void round() {}
};

// Vectors [low, high) of a chunk, of which vector 0 is at src and dst and is the piece's element `first`.
//
// SHIFTED: the source is not aligned where the destination is. A lane then loads the aligned bytes that its vector
// begins in and gets the rest from the next lane; so vector `high` is loaded too. What follows the last lane is loaded
// ahead (kAhead: more registers, whole lines), or the last lane only loads and its vector is the next warp's first.
template <bool SHIFTED, class Op>
__device__ __forceinline__ void vectors(Op& op, uint64_t src, uint64_t dst, uint64_t first, uint32_t low,
                                        uint32_t high) {
    constexpr bool kAhead = SHIFTED && Op::kAhead;
    constexpr bool kOnce = Op::kStreams && !SHIFTED;  // whether what is loaded is not loaded by a neighbour too
    constexpr uint32_t from = bytes_of(Op::SRC) * Op::V, to = bytes_of(Op::DST) * Op::V;
    constexpr int whole = Op::kReads ? (Op::kUnroll + 1) / 2 : Op::kUnroll;  // as many bytes in flight
    constexpr int unroll = kAhead && from == 16 ? (whole + 1) / 2 : whole;   // and no more than the registers hold
    constexpr uint32_t lanes = SHIFTED && !kAhead ? 31 : 32, warps = Op::kThreads / 32;
    constexpr uint32_t step = kAhead ? lanes : lanes * warps;  // from one vector of a lane to its next
    const uint32_t skip = SHIFTED ? static_cast<uint32_t>(src & (from - 1)) : 0;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t at = (kAhead ? 0 : low) + warp * lanes * (kAhead ? unroll : 1); at < high;
         at += lanes * warps * unroll) {  // the same for all lanes of a warp
        typename Op::In in[unroll + kAhead];
        Words<to / 4> old[Op::kReads ? unroll : 1];
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
            const uint32_t v = at + i * step + lane;
            if ((!kAhead || v >= low) && v < high + SHIFTED) {
                in[i] = load<kOnce, from / 4>(src - skip + static_cast<uint64_t>(v) * from);
            }
            if constexpr (Op::kReads) {
                if ((!kAhead || v >= low) && lane < lanes && v < high)
                    old[i] = load<Op::kStreams, to / 4>(dst + static_cast<uint64_t>(v) * to);
            }
        }
        if constexpr (kAhead) {
            const uint32_t v = at + unroll * step + lane;
            if (lane == 0 && v <= high) {
                in[unroll] = load<false, from / 4>(src - skip + static_cast<uint64_t>(v) * from);
            }
        }
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
            const uint32_t v = at + i * step + lane;
            if constexpr (SHIFTED) in[i] = shifted(in[i], in[kAhead ? i + 1 : i], skip);
            if ((!kAhead || v >= low) && lane < lanes && v < high) {
                const uint64_t element = first + static_cast<uint64_t>(v) * Op::V;
                op.give(in[i], old[Op::kReads ? i : 0], dst + static_cast<uint64_t>(v) * to, element);
            }
        }
        op.round();
    }
}

// One chunk of a piece. The elements before the first aligned vector and after the last go one at a time; where the
// other side is not aligned with them, so do the outermost vectors, since a shifted load reaches beyond its own bytes.
template <class Op>
__device__ __forceinline__ void chunk_of(Op& op, const Piece& piece, uint64_t chunk, uint32_t groups) {
    constexpr uint32_t V = Op::V, from = bytes_of(Op::SRC), to = bytes_of(Op::DST);
    const uint64_t head = Op::kFrom ? head_of(piece.src, from, piece.numel) : head_of(piece.dst, to, piece.numel);
    const uint64_t body = (piece.numel - head) / V;  // whole vectors
    const uint64_t begin = chunk * groups;
    const bool last = begin + groups >= body;
    const bool shifted = !Op::kFrom && body != 0 && (piece.src + head * from) % (V * from) != 0;

    if (chunk == 0) {
        const uint32_t front = static_cast<uint32_t>(head) + (shifted ? V : 0);
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < front; i += Op::kThreads)
            op.one(piece.src + i * from, piece.dst + i * to, i);
    }
    if (last) {
        const uint64_t whole = shifted ? (body > 1 ? body - 1 : 1) : body;
#pragma unroll 1
        for (uint64_t i = head + whole * V + threadIdx.x; i < piece.numel; i += Op::kThreads) {
            op.one(piece.src + i * from, piece.dst + i * to, i);
        }
    }
    const uint64_t first = head + begin * V;
    const uint64_t src = piece.src + first * from, dst = piece.dst + first * to;
    const uint32_t inside = static_cast<uint32_t>(last ? body - (begin < body ? begin : body) : groups);
    if (!shifted) {
        vectors<false>(op, src, dst, first, 0, inside);
    } else if (inside != 0) {
        vectors<true>(op, src, dst, first, chunk == 0 ? 1 : 0, last ? inside - 1 : inside);
    }
}

// Every chunk that falls to this block; the next one's place in the table is fetched while a chunk is under way.
template <class Each>
__device__ __forceinline__ void sweep(const Table& table, Each&& each) {
    uint32_t chunk = blockIdx.x;
    if (chunk >= table.chunks) return;
    uint32_t index = __ldg(table.piece_of + chunk);
    while (true) {
        const uint32_t ahead = table.chunks - chunk;
        const uint32_t next = ahead > gridDim.x ? __ldg(table.piece_of + chunk + gridDim.x) : 0;
        Piece piece = table.pieces[index];
        piece.dst += table.dst_base, piece.src += table.src_base;
        each(piece, index, static_cast<uint64_t>(chunk - piece.first_chunk));
        if (ahead <= gridDim.x) return;
        chunk += gridDim.x, index = next;
    }
}

// KIND: of all pieces, so that the kernel holds no more than it needs; or DSF_MIXED.
template <int KIND>
__global__ void __launch_bounds__(Moves::kThreads, Moves::kBlocks) copy_kernel(Table table) {
    sweep(table, [&](const Piece& piece, uint32_t, uint64_t chunk) {
        const auto with = [&](auto op) { chunk_of(op, piece, chunk, table.groups); };
        switch (KIND == DSF_MIXED ? piece.kind : KIND) {
            case DSF_F32 | DSF_BF16 << 4:
                return with(Copy<DSF_F32, DSF_BF16>());
            case DSF_F32 | DSF_F16 << 4:
                return with(Copy<DSF_F32, DSF_F16>());
            case DSF_BF16 | DSF_F32 << 4:
                return with(Copy<DSF_BF16, DSF_F32>());
            case DSF_F16 | DSF_F32 << 4:
                return with(Copy<DSF_F16, DSF_F32>());
            case DSF_BF16 | DSF_F16 << 4:
                return with(Copy<DSF_BF16, DSF_F16>());
            case DSF_F16 | DSF_BF16 << 4:
                return with(Copy<DSF_F16, DSF_BF16>());
            default:
                return with(Bytes());
        }
    });
}

template <bool ACCUMULATE>
__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    gather_kernel(Table table, float scale, const float* scale_at, double* out, float* found_inf, Workspace* space) {
    Stats stats;
    if (scale_at != nullptr) scale *= *scale_at;
    sweep(table, [&](const Piece& piece, uint32_t, uint64_t chunk) {
        const auto with = [&](auto op) { chunk_of(op, piece, chunk, table.groups); };
        switch (src_of(piece.kind)) {
            case DSF_F32:
                return with(Gather<DSF_F32, ACCUMULATE>(stats, scale));
            case DSF_BF16:
                return with(Gather<DSF_BF16, ACCUMULATE>(stats, scale));
            default:
                return with(Gather<DSF_F16, ACCUMULATE>(stats, scale));
        }
    });
    stats.finish<Sums::kThreads>(space, out, found_inf);
}

__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    norm_kernel(Table table, double* out, Workspace* space) {
    Stats stats;
    sweep(table, [&](const Piece& piece, uint32_t, uint64_t chunk) {
        const auto with = [&](auto op) { chunk_of(op, piece, chunk, table.groups); };
        switch (src_of(piece.kind)) {
            case DSF_F32:
                return with(Norm<DSF_F32>(stats));
            case DSF_BF16:
                return with(Norm<DSF_BF16>(stats));
            default:
                return with(Norm<DSF_F16>(stats));
        }
    });
    stats.finish<Sums::kThreads>(space, out, nullptr);
}

__global__ void __launch_bounds__(Moves::kThreads, Moves::kBlocks)
    publish_kernel(Table table, uint64_t seed, const uint64_t* seed_at) {
    if (seed_at != nullptr) seed += *seed_at;
    sweep(table, [&](const Piece& piece, uint32_t index, uint64_t chunk) {
        const auto with = [&](auto op) {
            op.begin(piece, index);
            chunk_of(op, piece, chunk, table.groups);
        };
        if (dst_of(piece.kind) == DSF_BF16) return with(Publish<DSF_BF16>(seed));
        return with(Publish<DSF_F16>(seed));
    });
}
