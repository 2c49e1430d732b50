// The C interface of the kernels: what _library.py calls through ctypes.
//
// [Note: work table] One launch moves any number of pieces. A piece is a contiguous run of elements with a source, a
// destination, a length and a kind (its dtypes). Pieces are cut into chunks of equal size; the table lists the pieces,
// then for every chunk the piece that it belongs to. The table lies in device memory, is made once by dsf_plan, and
// is read by every launch. Its addresses may be offsets into a buffer that is another one at every launch: dst_base and
// src_base are added to them. A base is a multiple of DSF_LINE, so that the plan's alignment holds.
//
// Pointers travel as uint64_t or void*, sizes as 64-bit numbers. A function that returns int returns 0 or a CUDA error
// code, to be given to dsf_error. No function changes the current device of the calling thread.

#pragma once

#include <stdint.h>

#define DSF_ABI 3  // raised with every change of this file
#define DSF_API __attribute__((visibility("default")))

#if defined(__cplusplus)
extern "C" {
#endif

// What was built, and what is here.
DSF_API int dsf_abi(void);
DSF_API const char* dsf_architectures(void);  // "sm_80 sm_90 ... compute_120", of the device code inside
DSF_API int dsf_toolkit(void);                // 13000 for CUDA 13.0
DSF_API int dsf_driver(int* version);         // the newest CUDA that the driver speaks; 0 without a driver
DSF_API int dsf_devices(int* count);
DSF_API int dsf_ready(int device);        // whether the device can run the kernels; loads them
DSF_API int dsf_capturing(void* stream);  // 1 while a graph is captured on the stream, else 0
DSF_API const char* dsf_error(int code);

// How an element is stored; the low four bits of a kind are the source's, the next four the destination's.
enum dsf_type { DSF_F32 = 0, DSF_BF16 = 1, DSF_F16 = 2, DSF_BYTES = 15 };

// Write the work table of n pieces to out (bytes long), unless out is null. align_source says whether vectors start
// at an aligned source (where nothing is stored) rather than destination. Returns the number of chunks, or -1 if there
// are too many or the table does not fit; *need is the table's size in bytes.
DSF_API int64_t dsf_plan(int64_t n, const uint64_t* dsts, const uint64_t* srcs, const uint64_t* numels,
                         const uint8_t* kinds, uint32_t groups, int align_source, void* out, uint64_t bytes,
                         uint64_t* need);

// A device copy of host memory, followed by zeroed bytes, that is never freed: for graphs that are being captured.
DSF_API int dsf_keep(int device, const void* host, uint64_t bytes, uint64_t zeroed, void** out);

#define DSF_WORKSPACE 65536  // bytes of zeroed device memory that a reduction needs; one for each stream

#define DSF_LINE 128  // bytes; what vectors are aligned to

#define DSF_EACH_CHUNK 0xffffffffu
#define DSF_MIXED 0xfeu

// The table and how to run it: chunks and groups as given to and by dsf_plan. blocks is 0 for as many as fit, at most
// so many, or DSF_EACH_CHUNK for one block a chunk (not where anything is summed). kind is that of all pieces, or
// DSF_MIXED.
typedef struct {
    const void* table;
    uint64_t pieces;
    uint64_t chunks;
    uint32_t groups;
    uint32_t blocks;
    int32_t device;
    uint32_t kind;
    void* stream;
    uint64_t dst_base;
    uint64_t src_base;
} dsf_work;

// dst = (dst's type) src
DSF_API int dsf_copy(const dsf_work* work);

// dst (f32) = src * scale [* *scale_at] [+ dst]; stats (3 doubles): sum of squares, largest magnitude and number of
// non-finite elements of what was written; *found_inf = 1 if there are any. scale_at and found_inf may be null.
DSF_API int dsf_gather_grads(const dsf_work* work, float scale, const float* scale_at, int accumulate, double* stats,
                             float* found_inf, void* workspace);

// The same statistics of src.
DSF_API int dsf_norm(const dsf_work* work, double* stats, void* workspace);

// dst (bf16 or f16) = src (f32), rounded at random with the probabilities that make it right on average; the seed is
// seed [+ *seed_at].
DSF_API int dsf_publish(const dsf_work* work, uint64_t seed, const uint64_t* seed_at);

#if defined(__cplusplus)
}
#endif
