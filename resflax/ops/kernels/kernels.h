// What the kernels have in common: vectors, memory and threads.
//
// Vectors are those of GCC and Clang, of as many floats as a register holds: a compiler takes wider
// ones apart, and through memory. How much is summed at a time follows from the registers.

#ifndef RESFLAX_OPS_KERNELS_KERNELS_H_
#define RESFLAX_OPS_KERNELS_KERNELS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

// Rows of a product that is summed with two vectors of columns: half of the registers.
constexpr int kTerms = std::min(kRegisters / 4, kLanes);

inline Vector Load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void Store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// Loads from what is read from end to end, and fetches what is half a page ahead: by itself the
// processor stops at the end of each page.
inline Vector LoadOnce(const float* p) {
  __builtin_prefetch(p + 512);
  return Load(p);
}

// Bytes of a result that is not found in the caches again when it is wanted.
constexpr size_t kStreamed = 8 << 20;

// Whether to write so many floats around the caches, so that nothing need be read in order to be
// overwritten.
inline bool Streams(const float* result, size_t floats) {
  return floats * sizeof(float) > kStreamed && reinterpret_cast<uintptr_t>(result) % 64 == 0;
}

// Stores a part of what `Streams` says is `streamed`, whose line should be completed next; see
// Streamed.
inline void StoreOnce(float* p, Vector v, bool streamed) {
  if (!streamed) return Store(p, v);
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512&>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(p, reinterpret_cast<__m256&>(v));
#else
  Store(p, v);
#endif
}

// After the last StoreOnce of a task: other threads see what was stored.
inline void Streamed() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// Memory of a thread, kept from call to call.
inline float* Scratch(int which, size_t floats) {
  struct Buffer {
    float* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[3];
  Buffer& buffer = buffers[which];
  if (buffer.size < floats) {
    std::free(buffer.data);
    buffer.size = (floats + 1023) / 1024 * 1024;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, buffer.size * sizeof(float)));
  }
  return buffer.data;
}

// Memory for a call, not initialized, that begins where a line of the cache does.
struct Free {
  void operator()(float* data) const { std::free(data); }
};
using Floats = std::unique_ptr<float[], Free>;
inline Floats Allocate(size_t floats) {
  size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  return Floats(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

// Runs task(i) for i < n. The calling thread works too, so that a busy pool delays nothing.
template <typename Task>
void Parallel(const ffi::ThreadPool& pool, int64_t n, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, n, &task] {
    // A worker that comes too late finds nothing, and does not touch `task`, which may be gone.
    for (int64_t i; (i = state->next.fetch_add(1)) < n;) {
      task(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  ffi::ThreadPool mutable_pool = pool;
  for (int64_t i = 0; i < helpers; ++i) mutable_pool.Schedule([work] { work(); });
  work();
  while (state->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
}

// Adds to the result, of `size` floats, whole vectors, so many parts of the same size.
inline void AddParts(const ffi::ThreadPool& pool, const float* partial, int64_t parts, int64_t size,
                     float* result) {
  constexpr int64_t kShare = 1 << 14;
  if (parts == 0) return;
  Parallel(pool, (size + kShare - 1) / kShare, [&](int64_t share) {
    int64_t end = std::min(size, (share + 1) * kShare);
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = share * kShare; i < end; i += kLanes)
        Store(result + i, Load(result + i) + Load(partial + part * size + i));
  });
}

}  // namespace

#endif  // RESFLAX_OPS_KERNELS_KERNELS_H_
