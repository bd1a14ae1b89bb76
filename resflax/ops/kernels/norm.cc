// Batch norm and what follows it, and the gradients, as custom calls of XLA: each in one pass over
// the images, with all sums over the positions of an image that it gives rise to.
//
// These passes take the time that memory takes: they go through it in its order, and write around
// the caches what is too large for them.

#include <cstring>

#include "kernels.h"

namespace {

// Positions that are summed on their own before they are added to the rest: rounding errors grow
// with the length of a sum.
constexpr int64_t kRun = 32;

// The images [N, H, W, C] of a call.
struct Shape {
  int64_t images, positions, channels;

  explicit Shape(ffi::AnyBuffer::Dimensions shape)
      : images(shape[0]), positions(shape[1] * shape[2]), channels(shape[3]) {}

  bool Streamed(const float* result) const {
    return Streams(result, images * positions * channels);
  }
};

bool Fits(ffi::AnyBuffer::Dimensions shape) { return shape.size() == 4 && shape[3] % kLanes == 0; }

ffi::Error Unsupported() {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "the channels must fill vectors");
}

// Calls visit(at, image, channel, sums) for each vector of the images, at float `at`; it adds its
// terms to two sums. Gives `factor` times the sums over each image's positions, [N, C] each.
template <typename Visit>
void Sum(const ffi::ThreadPool& pool, const Shape& s, float factor, float* first, float* second,
         const Visit& visit) {
  int64_t channels = s.channels;
  Parallel(pool, s.images, [&](int64_t image) {
    float *total[2] = {first + image * channels, second + image * channels};
    float* run = Scratch(0, 2 * channels);
    for (float* sums : total) std::memset(sums, 0, channels * sizeof(float));
    for (int64_t start = 0; start < s.positions; start += kRun) {
      int64_t end = std::min(s.positions, start + kRun);
      std::memset(run, 0, 2 * channels * sizeof(float));
      for (int64_t i = start; i < end; ++i)
        for (int64_t c = 0; c < channels; c += kLanes) {
          Vector sums[2] = {Load(run + c), Load(run + channels + c)};
          visit((image * s.positions + i) * channels + c, image, c, sums);
          Store(run + c, sums[0]), Store(run + channels + c, sums[1]);
        }
      for (int64_t c = 0; c < channels; c += kLanes) {
        Store(total[0] + c, Load(total[0] + c) + Load(run + c));
        Store(total[1] + c, Load(total[1] + c) + Load(run + channels + c));
      }
    }
    for (float* sums : total)
      for (int64_t c = 0; c < channels; c += kLanes) Store(sums + c, Load(sums + c) * factor);
    Streamed();
  });
}

// Calls visit(at, image, channel) for each vector of the images.
template <typename Visit>
void ForEach(const ffi::ThreadPool& pool, const Shape& s, const Visit& visit) {
  Parallel(pool, s.images, [&](int64_t image) {
    int64_t at = image * s.positions * s.channels;
    for (int64_t i = 0; i < s.positions; ++i)
      for (int64_t c = 0; c < s.channels; c += kLanes, at += kLanes) visit(at, image, c);
    Streamed();
  });
}

// The means over each image's positions of x and of its squares.
ffi::Error Moments(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                   ffi::ResultBuffer<ffi::F32> mean, ffi::ResultBuffer<ffi::F32> square) {
  if (!Fits(x.dimensions())) return Unsupported();
  Shape s(x.dimensions());
  const float* images = x.typed_data();
  Sum(pool, s, 1.0f / s.positions, mean->typed_data(), square->typed_data(),
      [=](int64_t at, int64_t, int64_t, Vector* sums) {
        Vector a = LoadOnce(images + at);
        sums[0] += a;
        sums[1] += a * a;
      });
  return ffi::Error::Success();
}

// dx + first + second * x, with [N, C] of each, where dx was.
ffi::Error MomentsGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> dx, ffi::Buffer<ffi::F32> x,
                           ffi::Buffer<ffi::F32> first, ffi::Buffer<ffi::F32> second,
                           ffi::ResultBuffer<ffi::F32> result) {
  if (!Fits(x.dimensions())) return Unsupported();
  Shape s(x.dimensions());
  const float *d = dx.typed_data(), *images = x.typed_data();
  const float *a = first.typed_data(), *b = second.typed_data();
  float* to = result->typed_data();
  ForEach(pool, s, [=](int64_t at, int64_t image, int64_t c) {
    int64_t i = image * s.channels + c;
    Store(to + at, LoadOnce(d + at) + Load(a + i) + Load(b + i) * LoadOnce(images + at));
  });
  return ffi::Error::Success();
}

// scale * x + shift (+ residual), with [1 or N, C] of scale and shift; max(, 0) where `rectified`,
// which keeps NaN.
template <bool added, bool rectified>
void Map(const ffi::ThreadPool& pool, const Shape& s, const float* x, const float* scale,
         const float* shift, int64_t coefficients, const float* residual, float* y) {
  bool streamed = s.Streamed(y);
  ForEach(pool, s, [=](int64_t at, int64_t image, int64_t c) {
    int64_t i = image * coefficients + c;
    Vector sum = LoadOnce(x + at) * Load(scale + i) + Load(shift + i);
    if (added) sum += LoadOnce(residual + at);
    if (rectified) sum = sum < 0.0f ? Vector{} : sum;
    StoreOnce(y + at, sum, streamed);
  });
}

ffi::Error Affine(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                  ffi::Buffer<ffi::F32> shift, ffi::Buffer<ffi::F32> residual,
                  ffi::ResultBuffer<ffi::F32> y, bool added, bool rectified) {
  if (!Fits(x.dimensions())) return Unsupported();
  Shape s(x.dimensions());
  auto map = added ? (rectified ? Map<true, true> : Map<true, false>)
                   : (rectified ? Map<false, true> : Map<false, false>);
  map(pool, s, x.typed_data(), scale.typed_data(), shift.typed_data(),
      scale.dimensions()[0] == 1 ? 0 : s.channels, residual.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

// Of what Affine made into y, the gradients dz of the sum (where `added`) and scale * dz of x, and
// over each image's positions the sums of dz and of dz * x.
template <bool added, bool rectified>
void MapGradient(const ffi::ThreadPool& pool, const Shape& s, const float* dy, const float* y,
                 const float* x, const float* scale, int64_t coefficients, float* dx, float* dz,
                 float* dshift, float* dscale) {
  bool streamed = s.Streamed(dx) && (!added || s.Streamed(dz));
  Sum(pool, s, 1.0f, dshift, dscale,
      [=](int64_t at, int64_t image, int64_t c, Vector* sums) {
        Vector d = LoadOnce(dy + at);
        if (rectified) d = LoadOnce(y + at) > 0.0f ? d : Vector{};
        if (added) StoreOnce(dz + at, d, streamed);
        StoreOnce(dx + at, d * Load(scale + image * coefficients + c), streamed);
        sums[0] += d;
        sums[1] += d * LoadOnce(x + at);
      });
}

ffi::Error AffineGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> dy, ffi::Buffer<ffi::F32> y,
                          ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                          ffi::ResultBuffer<ffi::F32> dx, ffi::ResultBuffer<ffi::F32> dshift,
                          ffi::ResultBuffer<ffi::F32> dscale, ffi::RemainingRets dz,
                          bool rectified) {
  if (!Fits(x.dimensions())) return Unsupported();
  Shape s(x.dimensions());
  bool added = dz.size() == 1;
  auto gradient = added ? (rectified ? MapGradient<true, true> : MapGradient<true, false>)
                        : (rectified ? MapGradient<false, true> : MapGradient<false, false>);
  gradient(pool, s, dy.typed_data(), y.typed_data(), x.typed_data(), scale.typed_data(),
           scale.dimensions()[0] == 1 ? 0 : s.channels, dx->typed_data(),
           added ? dz.get<ffi::Buffer<ffi::F32>>(0).value()->typed_data() : nullptr,
           dshift->typed_data(), dscale->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxMoments, Moments,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxMomentsGradient, MomentsGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxAffine, Affine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("added")
                                  .Attr<bool>("rectified"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxAffineGradient, AffineGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets()
                                  .Attr<bool>("rectified"));
