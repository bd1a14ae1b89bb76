// Maximum pooling of NHWC images on a CPU, and its gradient, as custom calls of XLA: each in one
// pass, by the place of every maximum in its window, which the first gives out beside it.

#include "kernels.h"

namespace {

typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));

// A vector of places. GCC 12 takes __builtin_convertvector to wider numbers apart.
inline Places Widened(const uint8_t* p) {
#if defined(__AVX512F__)
  __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Places&>(places);
#elif defined(__AVX2__)
  __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Places&>(places);
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Places);
#endif
}

// Square windows, `stride` pixels apart, of which the first begins `before` pixels before an image.
struct Windows {
  int64_t images, height, width, channels, out_height, out_width;
  int64_t side, stride, before;

  Windows(ffi::AnyBuffer::Dimensions x, ffi::AnyBuffer::Dimensions y, int64_t side, int64_t stride,
          int64_t before)
      : images(x[0]), height(x[1]), width(x[2]), channels(x[3]), out_height(y[1]), out_width(y[2]),
        side(side), stride(stride), before(before) {}

  // A place must fit a byte.
  bool Fits() const { return channels % kLanes == 0 && side * side <= 256; }
};

ffi::Error Unsupported() {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    "the channels must fill vectors, and the windows have at most 256 pixels");
}

// Calls visit(image, row) for all rows of the images.
template <typename Visit>
void ForEachRow(const ffi::ThreadPool& pool, int64_t images, int64_t rows, const Visit& visit) {
  constexpr int64_t kRows = 4;  // of a task
  int64_t shares = (rows + kRows - 1) / kRows;
  Parallel(pool, images * shares, [&](int64_t i) {
    int64_t first = i % shares * kRows;
    for (int64_t row = first; row < std::min(rows, first + kRows); ++row) visit(i / shares, row);
    Streamed();
  });
}

// The maxima, and where in its window each is: the first of equal ones, or the last NaN. Pixels
// outside the images are `value`.
ffi::Error MaxPool(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y,
                   ffi::ResultBuffer<ffi::U8> place, int64_t side, int64_t stride, int64_t before,
                   float value) {
  Windows s(x.dimensions(), y->dimensions(), side, stride, before);
  if (!s.Fits()) return Unsupported();
  const float* images = x.typed_data();
  float* maxima = y->typed_data();
  uint8_t* places = place->typed_data();
  Vector outside = Vector{} + value;
  ForEachRow(pool, s.images, s.out_height, [&](int64_t image, int64_t i) {
    const float* from = images + image * s.height * s.width * s.channels;
    int64_t at = (image * s.out_height + i) * s.out_width * s.channels;
    int64_t top = i * s.stride - s.before;
    for (int64_t j = 0; j < s.out_width; ++j) {
      int64_t left = j * s.stride - s.before;
      for (int64_t c = 0; c < s.channels; c += kLanes, at += kLanes) {
        Vector best{};
        Places found{};
        for (int64_t a = top, k = 0; a < top + s.side; ++a)
          for (int64_t b = left; b < left + s.side; ++b, ++k) {
            bool inside = a >= 0 && a < s.height && b >= 0 && b < s.width;
            Vector pixel = inside ? Load(from + (a * s.width + b) * s.channels + c) : outside;
            if (k == 0) {
              best = pixel;
              continue;
            }
            auto better = (pixel > best) | (pixel != pixel);
            best = better ? pixel : best;
            found = better ? Places{} + static_cast<int32_t>(k) : found;
          }
        Store(maxima + at, best);
        *reinterpret_cast<Bytes*>(places + at) = __builtin_convertvector(found, Bytes);
      }
    }
  });
  return ffi::Error::Success();
}

// Each pixel's sum of the gradients of the windows whose maximum it is.
ffi::Error MaxPoolGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> dy,
                           ffi::Buffer<ffi::U8> place, ffi::ResultBuffer<ffi::F32> dx,
                           int64_t side, int64_t stride, int64_t before) {
  Windows s(dx->dimensions(), dy.dimensions(), side, stride, before);
  if (!s.Fits()) return Unsupported();
  const float* gradients = dy.typed_data();
  const uint8_t* places = place.typed_data();
  float* result = dx->typed_data();
  bool streamed = Streams(result, s.images * s.height * s.width * s.channels);
  // The first window that reaches a pixel, so many after the one at which the first begins.
  auto first = [&](int64_t n) { return std::max<int64_t>(0, (n - s.side + s.stride) / s.stride); };
  ForEachRow(pool, s.images, s.height, [&](int64_t image, int64_t row) {
    int64_t windows = image * s.out_height * s.out_width * s.channels;
    float* to = result + (image * s.height + row) * s.width * s.channels;
    int64_t y = row + s.before, first_i = first(y);
    int64_t last_i = std::min(y / s.stride, s.out_height - 1);
    for (int64_t column = 0; column < s.width; ++column) {
      int64_t x = column + s.before, first_j = first(x);
      int64_t last_j = std::min(x / s.stride, s.out_width - 1);
      for (int64_t c = 0; c < s.channels; c += kLanes, to += kLanes) {
        Vector sum{};
        for (int64_t i = first_i; i <= last_i; ++i)
          for (int64_t j = first_j; j <= last_j; ++j) {
            int64_t at = windows + (i * s.out_width + j) * s.channels + c;
            int32_t k = (y - i * s.stride) * s.side + x - j * s.stride;
            sum += Widened(places + at) == k ? Load(gradients + at) : Vector{};
          }
        StoreOnce(to, sum, streamed);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxMaxPool, MaxPool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("side")
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("before")
                                  .Attr<float>("value"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResflaxMaxPoolGradient, MaxPoolGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("side")
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("before"));
