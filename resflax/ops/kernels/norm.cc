// The sums over the positions of each image that batch norm and its gradient need, in one pass over
// what they are of, as custom calls of XLA, which makes a pass for each.

#include "kernels.h"

namespace {

// Positions that are summed on their own before they are added to the rest: rounding errors grow
// with the length of a sum.
constexpr int64_t kRun = 32;

struct Squares {
  const float* x;
  void Add(int64_t at, Vector* first, Vector* second) const {
    Vector a = Load(x + at);
    *first += a;
    *second += a * a;
  }
};

// The gradient dz of a sum that a ReLU, where `rectified`, made into y; and dz * x.
template <bool rectified>
struct Gradients {
  const float *dy, *y, *x;
  void Add(int64_t at, Vector* first, Vector* second) const {
    Vector d = Load(dy + at);
    if (rectified) {
      Vector a = Load(y + at);
      d = a > 0.0f ? d : Vector{};
    }
    *first += d;
    *second += d * Load(x + at);
  }
};

// Two sums over the positions of one image, of V vectors of its channels.
template <int V, typename Terms>
void Sum(const Terms& terms, int64_t at, int64_t positions, int64_t channels, float factor,
         float* first, float* second) {
  Vector total[2][V] = {};
  for (int64_t start = 0; start < positions; start += kRun) {
    Vector run[2][V] = {};
    for (int64_t i = start; i < std::min(positions, start + kRun); ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        terms.Add(at + i * channels + v * kLanes, &run[0][v], &run[1][v]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[0][v] += run[0][v], total[1][v] += run[1][v];
  }
  for (int v = 0; v < V; ++v) {
    Store(first + v * kLanes, total[0][v] * factor);
    Store(second + v * kLanes, total[1][v] * factor);
  }
}

template <typename Terms>
void SumAll(const ffi::ThreadPool& pool, const Terms& terms, ffi::AnyBuffer::Dimensions shape,
            float factor, float* first, float* second) {
  int64_t positions = shape[1] * shape[2], channels = shape[3];
  Parallel(pool, shape[0], [&](int64_t image) {
    int64_t at = image * positions * channels, to = image * channels, c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
      Sum<4>(terms, at + c, positions, channels, factor, first + to + c, second + to + c);
    for (; c < channels; c += kLanes)
      Sum<1>(terms, at + c, positions, channels, factor, first + to + c, second + to + c);
  });
}

bool Fits(ffi::AnyBuffer::Dimensions shape) { return shape.size() == 4 && shape[3] % kLanes == 0; }

ffi::Error Unsupported() {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "the channels must fill vectors of 16");
}

ffi::Error Moments(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                   ffi::ResultBuffer<ffi::F32> mean, ffi::ResultBuffer<ffi::F32> square) {
  auto shape = x.dimensions();
  if (!Fits(shape)) return Unsupported();
  SumAll(pool, Squares{x.typed_data()}, shape, 1.0f / (shape[1] * shape[2]), mean->typed_data(),
         square->typed_data());
  return ffi::Error::Success();
}

ffi::Error AffineGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> dy, ffi::Buffer<ffi::F32> y,
                          ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> dshift,
                          ffi::ResultBuffer<ffi::F32> dscale, bool rectified) {
  auto shape = x.dimensions();
  if (!Fits(shape)) return Unsupported();
  const float *d = dy.typed_data(), *r = y.typed_data(), *a = x.typed_data();
  float *first = dshift->typed_data(), *second = dscale->typed_data();
  if (rectified)
    SumAll(pool, Gradients<true>{d, r, a}, shape, 1.0f, first, second);
  else
    SumAll(pool, Gradients<false>{d, r, a}, shape, 1.0f, first, second);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxMoments, Moments,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxAffineGradient, AffineGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("rectified"));
