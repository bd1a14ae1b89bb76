// Products of matrices on a CPU, for 1x1 convolutions and their gradients, as custom calls of XLA.
//
// Operands are copied, a block at a time, into the order in which they are read, and stay in the
// cache while sums of a few rows by two vectors of columns are kept in registers. Where the copies
// come from is fetched while the block before is multiplied: memory is slower than the arithmetic.

#include <cstring>

#include "tile.h"

namespace {

constexpr int64_t kColumns = 2 * kLanes;  // of a panel; the last one may have half as many
constexpr int64_t kBlock = 192 << 10;     // bytes of a block of rows: half of it and the next one
// Strips of a block, however long: as many use a panel once it is there.
constexpr int64_t kLeast = 6;

// Into the second level of the caches.
inline void Prefetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) __builtin_prefetch(from + i, 0, 2);
}

bool Fits(int64_t terms, int64_t columns) { return terms % kLanes == 0 && columns % kLanes == 0; }

ffi::Error Unsupported() {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rows must fill vectors");
}

// b [terms, columns], or the transposed of [columns, terms], as panels [terms][width].
void Pack(const float* b, int64_t terms, int64_t columns, bool transposed, int64_t panel,
          float* to) {
  int64_t width = std::min(kColumns, columns - panel * kColumns);
  const float* from = b + panel * kColumns * (transposed ? terms : 1);
  if (!transposed) {
    for (int64_t t = 0; t < terms; ++t)
      std::memcpy(to + t * width, from + t * columns, width * sizeof(float));
    return;
  }
  for (int64_t c = 0; c < width; c += kLanes)
    for (int64_t t = 0; t < terms; t += kLanes) {
      Vector square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = Load(from + (c + i) * terms + t);
      Transpose(square);
      for (int i = 0; i < kLanes; ++i) Store(to + (t + i) * width + c, square[i]);
    }
}

// A strip's products with a panel of V vectors, of as many rows as there are.
template <int V>
void MultiplyRows(const float* strip, const float* panel, int64_t terms, int64_t rows, float* y,
                  int64_t row, bool streamed) {
  Vector sums[kRows][V] = {};
  Multiply<V>(strip, kRows * kLanes, panel, terms, sums);
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r)
    if (r < rows)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) StoreOnce(y + r * row + v * kLanes, sums[r][v], streamed);
}

// a [rows, terms] times b [terms, columns], or times the transposed of [columns, terms].
ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b,
                   ffi::ResultBuffer<ffi::F32> y, bool transposed) {
  int64_t columns = y->dimensions().back(), terms = a.dimensions().back();
  if (!Fits(terms, columns)) return Unsupported();
  int64_t rows = a.element_count() / terms;
  const float *from = a.typed_data(), *weights = b.typed_data();
  float* result = y->typed_data();
  int64_t panels = (columns + kColumns - 1) / kColumns;
  Floats packed = Allocate(terms * columns);
  Parallel(pool, panels, [&](int64_t panel) {
    Pack(weights, terms, columns, transposed, panel, packed.get() + panel * kColumns * terms);
  });
  bool streamed = Streams(result, rows * columns);
  int64_t strips = (rows + kRows - 1) / kRows, threads = pool.num_threads();
  int64_t most = std::clamp<int64_t>(kBlock / (kRows * terms * sizeof(float)), kLeast, 16);
  // As many blocks for each thread, where there are enough.
  int64_t rounds = (strips + most * threads - 1) / (most * threads);
  int64_t blocks = std::min(strips, rounds * threads);
  auto first = [=](int64_t block) { return std::min(blocks, block) * strips / blocks; };
  Parallel(pool, blocks, [&](int64_t block) {
    int64_t begin = first(block), end = first(block + 1);
    float* copy = Scratch(0, (end - begin) * kRows * terms);
    for (int64_t r = begin * kRows; r < end * kRows; ++r) {
      float* to = copy + (r / kRows - begin) * kRows * terms + r % kRows * kLanes;
      for (int64_t t = 0; t < terms; t += kLanes)
        Store(to + t * kRows, r < rows ? Load(from + r * terms + t) : Vector{});
    }
    // Most likely this thread's next block.
    int64_t next = first(block + threads) * kRows * terms;
    int64_t limit = std::min(first(block + threads + 1) * kRows, rows) * terms;
    int64_t ahead = (kRows * terms / panels + kLanes - 1) / kLanes * kLanes;
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t s = begin; s < end; ++s, next += ahead) {
        Prefetch(from + next, std::clamp<int64_t>(limit - next, 0, ahead));
        bool two = (panel + 1) * kColumns <= columns;
        (two ? MultiplyRows<2> : MultiplyRows<1>)(
            copy + (s - begin) * kRows * terms, packed.get() + panel * kColumns * terms, terms,
            rows - s * kRows, result + s * kRows * columns + panel * kColumns, columns, streamed);
      }
    Streamed();
  });
  return ffi::Error::Success();
}

// The transposed of a [rows, terms] times b [rows, columns].
ffi::Error ProductGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b,
                           ffi::ResultBuffer<ffi::F32> y) {
  constexpr int64_t kWide = 512;   // columns of a task
  constexpr int64_t kCopied = 256;  // terms that are copied together
  constexpr int64_t kChunk = 128;  // rows at a time
  // Of a strip: with two vectors of columns, half of the registers or more.
  constexpr int kTerms = std::min(kRegisters == 32 ? 8 : 6, kLanes);
  // No power of two: the strips of a row would all be copied to the same places of the cache.
  constexpr int64_t kStrip = kChunk * kTerms + kLanes, kPanel = kChunk * kColumns + kLanes;
  int64_t columns = b.dimensions().back(), terms = a.dimensions().back();
  if (!Fits(terms, columns)) return Unsupported();
  int64_t rows = a.element_count() / terms;
  const float *first = a.typed_data(), *second = b.typed_data();
  float* result = y->typed_data();
  int64_t tiles = (columns + kWide - 1) / kWide;
  auto strips_of = [](int64_t terms) { return (terms + kTerms - 1) / kTerms; };
  // The rows are divided so that there is work for several threads; the division, and so the order
  // of the sums, does not depend on how many there are.
  int64_t parts = std::clamp<int64_t>((rows + kChunk - 1) / kChunk, 1, (8 + tiles - 1) / tiles);
  Floats partial = Allocate((parts - 1) * terms * columns);
  Parallel(pool, parts * tiles, [&](int64_t i) {
    int64_t part = i / tiles, c = i % tiles * kWide;
    int64_t tile_columns = std::min(columns - c, kWide);
    float* sums = part ? partial.get() + (part - 1) * terms * columns : result;
    float* strips = Scratch(0, strips_of(kCopied) * kStrip);
    float* panels = Scratch(1, kWide / kColumns * kPanel);
    int64_t begin = part * rows / parts, end = (part + 1) * rows / parts;
    for (int64_t start = begin; start < end; start += kChunk) {
      int64_t n = std::min(kChunk, end - start);
      for (int64_t r = 0; r < n; ++r) {
        const float* from = second + (start + r) * columns + c;
        for (int64_t l = 0; l < tile_columns; l += kLanes) {
          int64_t width = std::min(kColumns, tile_columns - l / kColumns * kColumns);
          Store(panels + l / kColumns * kPanel + r * width + l % kColumns, Load(from + l));
        }
      }
      for (int64_t t = 0; t < terms; t += kCopied) {
        int64_t block_terms = std::min(terms - t, kCopied);
        for (int64_t r = 0; r < n; ++r) {
          const float* from = first + (start + r) * terms + t;
          float* to = strips + r * kTerms;
          int64_t k = 0;
          // What a vector has too much of, the next row or strip overwrites.
          for (; k + kLanes <= block_terms; k += kTerms, to += kStrip) Store(to, Load(from + k));
          for (; k < block_terms; k += kTerms, to += kStrip)
            std::copy(from + k, from + std::min<int64_t>(k + kTerms, block_terms), to);
        }
        // The terms that are copied next, of these rows or of the next ones.
        bool more = t + kCopied < terms;
        int64_t next_t = more ? t + kCopied : 0, next_terms = std::min(terms - next_t, kCopied);
        int64_t row = more ? start : start + n, last = std::min(row + kChunk, end);
        int64_t calls = strips_of(block_terms) * ((tile_columns + kColumns - 1) / kColumns);
        int64_t ahead = (last - row + calls - 1) / calls;
        for (int64_t l = 0; l < tile_columns; l += kColumns)
          for (int64_t k = 0; k < block_terms; k += kTerms) {
            for (int64_t stop = std::min(row + ahead, last); row < stop; ++row)
              Prefetch(first + row * terms + next_t, next_terms);
            int64_t width = std::min(kColumns, tile_columns - l);
            auto accumulate = width == kColumns ? Accumulate<kTerms, 2> : Accumulate<kTerms, 1>;
            accumulate(strips + k / kTerms * kStrip, kTerms, panels + l / kColumns * kPanel, width,
                       kLanes, n, block_terms - k, sums + (t + k) * columns + c + l, columns,
                       start == begin);
          }
      }
    }
  });
  AddParts(pool, partial.get(), parts - 1, terms * columns, result);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("transposed"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxProductGradient, ProductGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
