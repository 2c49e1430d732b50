// The kernels without torch, over memory that is exactly as long as the pieces and of which only the pieces are
// written: what compute-sanitizer runs over (memcheck, initcheck, racecheck, synccheck). Prints what it checked.
//
// nvcc -std=c++17 -arch=sm_90 -I../../csrc -o selfcheck selfcheck.cu && compute-sanitizer --tool memcheck ./selfcheck

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "ds_fragment.cu"

namespace {

constexpr uint8_t kPoison = 0xA5;

void must(int code, const char* what) {
    if (code == 0) return;
    std::printf("FAIL %s: %s\n", what, dsf_error(code));
    std::exit(1);
}

void fail(const char* what, size_t piece, uint64_t element) {
    std::printf("FAIL %s: piece %zu, element %llu\n", what, piece, static_cast<unsigned long long>(element));
    std::exit(1);
}

float to_float(int type, const uint8_t* at) {
    if (type == DSF_F32) {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, at, 2);
    if (type == DSF_F16) return __half2float(__ushort_as_half(half));
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void from_float(int type, float value, uint8_t* at) {
    if (type == DSF_F32) {
        std::memcpy(at, &value, 4);
        return;
    }
    const uint16_t half =
        type == DSF_F16 ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
    std::memcpy(at, &half, 2);
}

struct Side {
    uint8_t* memory = nullptr;  // on the device: `skip` bytes that nobody writes, then the piece, then nothing
    uint64_t skip = 0;
    std::vector<uint8_t> host;
    uint64_t address() const { return reinterpret_cast<uint64_t>(memory) + skip; }
    void make(uint64_t skip_bytes, std::vector<uint8_t> bytes) {
        skip = skip_bytes, host = std::move(bytes);
        must(cudaMalloc(&memory, skip + host.size()), "cudaMalloc");
        must(cudaMemcpy(memory + skip, host.data(), host.size(), cudaMemcpyHostToDevice), "upload");
    }
    std::vector<uint8_t> back() const {
        std::vector<uint8_t> out(host.size());
        must(cudaMemcpy(out.data(), memory + skip, out.size(), cudaMemcpyDeviceToHost), "download");
        return out;
    }
    void free() { must(cudaFree(memory), "cudaFree"); }
};

enum Op { kCopies, kGathers, kAccumulates, kNorms, kPublishes };

void round_of(std::mt19937& random, Op op, uint32_t groups, uint32_t blocks) {
    const int floats[3] = {DSF_F32, DSF_BF16, DSF_F16};
    const size_t n = 1 + random() % 24;
    std::vector<Side> srcs(n), dsts(n);
    std::vector<uint64_t> dst_at(n), src_at(n), numels(n);
    std::vector<uint8_t> kinds(n);
    std::uniform_real_distribution<float> value(-4.0f, 4.0f);
    const bool single = random() % 2;
    const int one_from = floats[random() % 3], one_to = floats[random() % 3];
    for (size_t i = 0; i < n; ++i) {
        int from = floats[random() % 3], to = floats[random() % 3];
        if (single) from = one_from, to = one_to;
        if (op == kCopies && from == to) from = to = DSF_BYTES;
        if (op == kGathers || op == kAccumulates) to = DSF_F32;
        if (op == kNorms) to = from;
        if (op == kPublishes) from = DSF_F32, to = random() % 2 ? DSF_BF16 : DSF_F16;
        numels[i] = random() % 8 == 0 ? random() % 40000 : random() % 90;
        if (random() % 12 == 0) numels[i] = 0;
        kinds[i] = static_cast<uint8_t>(from | to << 4);
        std::vector<uint8_t> bytes(numels[i] * bytes_of(from));
        for (uint64_t e = 0; e < numels[i]; ++e) {
            if (from == DSF_BYTES) {
                bytes[e] = static_cast<uint8_t>(random());
            } else {
                from_float(from, value(random), &bytes[e * bytes_of(from)]);
            }
        }
        srcs[i].make(random() % 16 * bytes_of(from), std::move(bytes));
        std::vector<uint8_t> poison(numels[i] * bytes_of(to), kPoison);
        for (uint64_t e = 0; op == kAccumulates && e < numels[i]; ++e) from_float(to, value(random), &poison[e * 4]);
        dsts[i].make(random() % 16 * bytes_of(to), std::move(poison));
        dst_at[i] = dsts[i].address(), src_at[i] = srcs[i].address();
    }
    // Sometimes the table holds offsets from a base.
    const auto base_of = [&](std::vector<uint64_t>& addresses) -> uint64_t {
        if (n == 0 || random() % 2 == 0) return 0;
        const uint64_t base = *std::min_element(addresses.begin(), addresses.end()) / DSF_LINE * DSF_LINE;
        for (uint64_t& address : addresses) address -= base;
        return base;
    };
    const uint64_t dst_base = base_of(dst_at), src_base = base_of(src_at);
    uint64_t need = 0;
    const bool from_source = op == kNorms;
    int64_t chunks =
        dsf_plan(n, dst_at.data(), src_at.data(), numels.data(), kinds.data(), groups, from_source, nullptr, 0, &need);
    std::vector<uint8_t> table(need);
    chunks = dsf_plan(n, dst_at.data(), src_at.data(), numels.data(), kinds.data(), groups, from_source, table.data(),
                      need, &need);
    if (chunks < 0) fail("plan", 0, 0);
    const uint64_t padded = (need + 15) / 16 * 16;
    table.resize(padded);
    void* kept = nullptr;
    must(dsf_keep(0, table.data(), padded, DSF_WORKSPACE, &kept), "keep");
    void* space = static_cast<char*>(kept) + padded;
    double* stats = nullptr;
    float* found = nullptr;
    must(cudaMalloc(&stats, 24), "cudaMalloc");
    must(cudaMalloc(&found, 4), "cudaMalloc");
    must(cudaMemset(found, 0, 4), "cudaMemset");
    cudaStream_t stream;
    must(cudaStreamCreate(&stream), "stream");
    const bool uniform = std::all_of(kinds.begin(), kinds.end(), [&](uint8_t k) { return k == kinds[0]; });
    const uint32_t kind = uniform ? kinds[0] : DSF_MIXED;
    const dsf_work work{kept, n, static_cast<uint64_t>(chunks), groups, blocks, 0, kind, stream, dst_base, src_base};
    const float scale = 0.37f;
    if (op == kCopies) must(dsf_copy(&work), "copy");
    if (op == kNorms) must(dsf_norm(&work, stats, space), "norm");
    if (op == kPublishes) must(dsf_publish(&work, 12345, nullptr), "publish");
    if (op == kGathers || op == kAccumulates) {
        must(dsf_gather_grads(&work, scale, nullptr, op == kAccumulates, stats, found, space), "gather");
    }
    must(cudaStreamSynchronize(stream), "run");

    double squares = 0;
    for (size_t i = 0; i < n; ++i) {
        const int from = src_of(kinds[i]), to = dst_of(kinds[i]);
        const std::vector<uint8_t> out = dsts[i].back();
        for (uint64_t e = 0; e < numels[i]; ++e) {
            const uint8_t* got = &out[e * bytes_of(to)];
            if (from == DSF_BYTES) {
                if (*got != srcs[i].host[e]) fail("bytes", i, e);
                continue;
            }
            const float x = to_float(from, &srcs[i].host[e * bytes_of(from)]);
            uint8_t expected[4] = {kPoison, kPoison, kPoison, kPoison};
            if (op == kCopies) from_float(to, x, expected);
            if (op == kGathers || op == kAccumulates) {
                const volatile float scaled = x * scale;
                const float y =
                    op == kGathers ? scaled : to_float(DSF_F32, &dsts[i].host[e * 4]) + static_cast<float>(scaled);
                from_float(DSF_F32, y, expected);
                squares += static_cast<double>(y) * y;
            }
            if (op == kNorms) squares += static_cast<double>(x) * x;
            if (op == kPublishes) {
                const float y = to_float(to, got), step = std::ldexp(std::fabs(x), to == DSF_BF16 ? -7 : -10);
                if (std::fabs(y - x) > step + 6e-8f) fail("publish", i, e);
                continue;
            }
            if (std::memcmp(got, expected, bytes_of(to)) != 0) fail("values", i, e);
        }
    }
    if (op == kGathers || op == kAccumulates || op == kNorms) {
        double seen[3];
        must(cudaMemcpy(seen, stats, 24, cudaMemcpyDeviceToHost), "stats");
        if (std::fabs(seen[0] - squares) > 1e-5 * squares || seen[2] != 0) fail("stats", 0, 0);
    }
    for (size_t i = 0; i < n; ++i) srcs[i].free(), dsts[i].free();
    must(cudaFree(kept), "cudaFree"), must(cudaFree(stats), "cudaFree"), must(cudaFree(found), "cudaFree");
    must(cudaStreamDestroy(stream), "stream");
}

}  // namespace

int main(int count, char** values) {
    const int rounds = count > 1 ? std::atoi(values[1]) : 20;
    std::mt19937 random(7);
    int done = 0;
    for (int i = 0; i < rounds; ++i) {
        for (const Op op : {kCopies, kGathers, kAccumulates, kNorms, kPublishes}) {
            const uint32_t groups[3] = {64, 500, 2048}, blocks[3] = {0, 1, DSF_EACH_CHUNK};
            round_of(random, op, groups[random() % 3], blocks[random() % 3]);
            ++done;
        }
    }
    std::printf("selfcheck: %d launches over random pieces, all as expected\n", done);
    return 0;
}
