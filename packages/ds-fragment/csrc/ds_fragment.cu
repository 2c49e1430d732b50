// The C interface: plans work tables on the host, and launches.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>

#include "ds_fragment.h"
#include "kernels.cuh"
#include "work.cuh"

#ifndef DSF_ARCHITECTURES
#define DSF_ARCHITECTURES "unknown"
#endif

namespace {

static_assert(sizeof(dsf_work) == 64, "_library.py describes it");
static_assert(sizeof(Workspace) <= DSF_WORKSPACE, "what the reductions need");

constexpr int kDevices = 64;
enum Kernel { kGather, kGatherMore, kNorm, kPublish, kCopy };  // and after kCopy the ones for a single kind
constexpr uint32_t kKinds[] = {DSF_F32 | DSF_BF16 << 4,   DSF_F32 | DSF_F16 << 4,  DSF_BF16 | DSF_F32 << 4,
                               DSF_F16 | DSF_F32 << 4,    DSF_BF16 | DSF_F16 << 4, DSF_F16 | DSF_BF16 << 4,
                               DSF_BYTES | DSF_BYTES << 4};
constexpr int kKernels = kCopy + 1 + sizeof(kKinds) / sizeof(kKinds[0]);

const void* kernel_at(int i) {
    const void* all[kKernels] = {
        reinterpret_cast<const void*>(gather_kernel<false>),
        reinterpret_cast<const void*>(gather_kernel<true>),
        reinterpret_cast<const void*>(norm_kernel),
        reinterpret_cast<const void*>(publish_kernel),
        reinterpret_cast<const void*>(copy_kernel<DSF_MIXED>),
        reinterpret_cast<const void*>(copy_kernel<kKinds[0]>),
        reinterpret_cast<const void*>(copy_kernel<kKinds[1]>),
        reinterpret_cast<const void*>(copy_kernel<kKinds[2]>),
        reinterpret_cast<const void*>(copy_kernel<kKinds[3]>),
        reinterpret_cast<const void*>(copy_kernel<kKinds[4]>),
        reinterpret_cast<const void*>(copy_kernel<kKinds[5]>),
        reinterpret_cast<const void*>(copy_kernel<kKinds[6]>),
    };
    return all[i];
}

int copy_kernel_for(uint32_t kind) {
    const auto* found = std::find(std::begin(kKinds), std::end(kKinds), kind);
    return found == std::end(kKinds) ? kCopy : kCopy + 1 + static_cast<int>(found - std::begin(kKinds));
}

int threads_of(int kernel) { return kernel >= kPublish ? Moves::kThreads : Sums::kThreads; }

// The device for a while, and permission to do what a capture of another stream would forbid.
class Guard {
  public:
    explicit Guard(int device) {
        code = cudaThreadExchangeStreamCaptureMode(&mode_);
        relaxed_ = code == cudaSuccess;
        if (code == cudaSuccess) code = cudaGetDevice(&before_);
        if (code == cudaSuccess && before_ != device) {
            code = cudaSetDevice(device);
            moved_ = code == cudaSuccess;
        }
    }
    ~Guard() {
        if (moved_) cudaSetDevice(before_);
        if (relaxed_) cudaThreadExchangeStreamCaptureMode(&mode_);
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    cudaError_t code;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
    int before_ = 0;
    bool moved_ = false, relaxed_ = false;
};

// Blocks that a device runs at once, by kernel; 0 until asked for.
std::atomic<int> resident[kDevices][kKernels];
std::atomic<int> processors[kDevices];

cudaError_t prepare(int device) {
    if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
    if (processors[device].load() != 0) return cudaSuccess;
    int count = 0;
    cudaError_t code = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    for (int i = 0; i < kKernels && code == cudaSuccess; ++i) {
        int blocks = 0;
        code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_at(i), threads_of(i), 0);
        resident[device][i].store(std::max(blocks, 1));
    }
    if (code == cudaSuccess) processors[device].store(count);
    return code;
}

Table table_of(const dsf_work& work) {
    const auto* pieces = static_cast<const Piece*>(work.table);
    const auto* piece_of = reinterpret_cast<const uint32_t*>(pieces + work.pieces);
    return Table{pieces, piece_of, static_cast<uint32_t>(work.chunks), work.groups, work.dst_base, work.src_base};
}

cudaError_t launch(const dsf_work& work, int kernel, void** arguments, bool reduces) {
    Guard guard(work.device);
    if (guard.code != cudaSuccess) return guard.code;
    if (work.dst_base % DSF_LINE != 0 || work.src_base % DSF_LINE != 0) return cudaErrorMisalignedAddress;
    cudaError_t code = prepare(work.device);
    if (code != cudaSuccess) return code;
    uint64_t blocks = work.chunks;
    if (work.blocks == 0 || reduces)
        blocks = std::min<uint64_t>(blocks, resident[work.device][kernel].load() * processors[work.device].load());
    if (work.blocks != 0) blocks = std::min<uint64_t>(blocks, work.blocks);
    if (reduces) blocks = std::max<uint64_t>(std::min<uint64_t>(blocks, kMostBlocks), 1);
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7fffffffu) blocks = 0x7fffffffu;
    code = cudaLaunchKernel(kernel_at(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads_of(kernel)), arguments,
                            0, static_cast<cudaStream_t>(work.stream));
    const cudaError_t seen = cudaGetLastError();
    return code != cudaSuccess ? code : seen;
}

cudaError_t keep(const void* host, uint64_t bytes, uint64_t zeroed, void** out) {
    char* memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaError_t code = cudaMalloc(reinterpret_cast<void**>(&memory), bytes + zeroed);
    if (code != cudaSuccess) return code;
    code = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (code == cudaSuccess) {
        if (bytes != 0) code = cudaMemcpyAsync(memory, host, bytes, cudaMemcpyHostToDevice, stream);
        if (code == cudaSuccess && zeroed != 0) code = cudaMemsetAsync(memory + bytes, 0, zeroed, stream);
        if (code == cudaSuccess) code = cudaStreamSynchronize(stream);
        const cudaError_t destroyed = cudaStreamDestroy(stream);
        if (code == cudaSuccess) code = destroyed;
    }
    if (code == cudaSuccess) {
        *out = memory;
    } else {
        cudaFree(memory);
    }
    return code;
}

}  // namespace

extern "C" {

int dsf_abi(void) { return DSF_ABI; }

const char* dsf_architectures(void) { return DSF_ARCHITECTURES; }

int dsf_toolkit(void) { return CUDART_VERSION; }

int dsf_driver(int* version) { return cudaDriverGetVersion(version); }

int dsf_devices(int* count) {
    const cudaError_t code = cudaGetDeviceCount(count);
    cudaGetLastError();  // so that the next launch does not report it
    return code;
}

int dsf_ready(int device) {
    Guard guard(device);
    const cudaError_t code = guard.code != cudaSuccess ? guard.code : prepare(device);
    cudaGetLastError();
    return code;
}

int dsf_capturing(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t code = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    cudaGetLastError();
    return code == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

const char* dsf_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int64_t dsf_plan(int64_t n, const uint64_t* dsts, const uint64_t* srcs, const uint64_t* numels, const uint8_t* kinds,
                 uint32_t groups, int align_source, void* out, uint64_t bytes, uint64_t* need) {
    if (n < 0 || groups == 0 || n > 0xffffffffll) return -1;
    uint64_t total = 0;
    // The first round counts, the second writes.
    for (int write = 0; write < 2; ++write) {
        auto* pieces = static_cast<Piece*>(out);
        auto* piece_of = reinterpret_cast<uint32_t*>(pieces + n);
        uint64_t chunk = 0;
        for (int64_t i = 0; i < n; ++i) {
            const int from = src_of(kinds[i]), to = dst_of(kinds[i]),
                      vector = vector_of(from, align_source ? from : to);
            const uint64_t head =
                align_source ? head_of(srcs[i], bytes_of(from), numels[i]) : head_of(dsts[i], bytes_of(to), numels[i]);
            const uint64_t body = (numels[i] - head) / vector;
            const uint64_t chunks = numels[i] == 0 ? 0 : std::max<uint64_t>(body / groups + (body % groups != 0), 1);
            if (write != 0) {
                pieces[i] = Piece{dsts[i], srcs[i], numels[i], static_cast<uint32_t>(chunk), kinds[i]};
                std::fill_n(piece_of + chunk, chunks, static_cast<uint32_t>(i));
            }
            chunk += chunks;
            if (chunk > 0xfffffffeull) return -1;
        }
        total = chunk;
        *need = static_cast<uint64_t>(n) * sizeof(Piece) + total * sizeof(uint32_t);
        if (out == nullptr) break;
        if (*need > bytes) return -1;
    }
    return static_cast<int64_t>(total);
}

int dsf_keep(int device, const void* host, uint64_t bytes, uint64_t zeroed, void** out) {
    Guard guard(device);
    const cudaError_t code = guard.code != cudaSuccess ? guard.code : keep(host, bytes, zeroed, out);
    cudaGetLastError();
    return code;
}

int dsf_copy(const dsf_work* work) {
    Table table = table_of(*work);
    void* arguments[] = {&table};
    return launch(*work, copy_kernel_for(work->kind), arguments, false);
}

int dsf_gather_grads(const dsf_work* work, float scale, const float* scale_at, int accumulate, double* stats,
                     float* found_inf, void* workspace) {
    Table table = table_of(*work);
    auto* space = static_cast<Workspace*>(workspace);
    void* arguments[] = {&table, &scale, &scale_at, &stats, &found_inf, &space};
    return launch(*work, accumulate != 0 ? kGatherMore : kGather, arguments, true);
}

int dsf_norm(const dsf_work* work, double* stats, void* workspace) {
    Table table = table_of(*work);
    auto* space = static_cast<Workspace*>(workspace);
    void* arguments[] = {&table, &stats, &space};
    return launch(*work, kNorm, arguments, true);
}

int dsf_publish(const dsf_work* work, uint64_t seed, const uint64_t* seed_at) {
    Table table = table_of(*work);
    void* arguments[] = {&table, &seed, &seed_at};
    return launch(*work, kPublish, arguments, false);
}

}  // extern "C"
