// Direct convolutions of NHWC images on a CPU, for narrow groups, as custom calls of XLA.
//
// The channels of a group, or a vector of channels of several narrow groups, are a slab. A band of
// rows of some slabs is copied between zeros into memory that stays in the cache; sums are kept in
// vector registers: a few pixels by one or two vectors of output channels, over all taps of the
// kernel. Where groups are narrower than a vector, a vector of pixels is shuffled so that each of
// its lanes meets the input channels of its own group: no product with a zero is ever computed.
// Of photographs, whose few channels fill no vector, each channel under the kernel is a tap.

#include <cstring>
#include <utility>

#include "convolution.h"

namespace {

// What a call is about. A slab has `in` input and `out` output channels; `narrow` is the width of
// its groups where there are several in it, else 0; it is `thin` where its input fills no vector.
struct Shape {
  int64_t images, height, width, channels;   // of the input
  int64_t out_height, out_width, out_channels;
  int64_t k_h, k_w, stride, top, left, groups;
  int64_t slabs, in, out, narrow;
  bool thin;
};

constexpr int64_t kThin = 4;  // channels of photographs, at most

bool Describe(ffi::AnyBuffer::Dimensions x, ffi::AnyBuffer::Dimensions y,
              ffi::AnyBuffer::Dimensions kernel, int64_t groups, int64_t stride, int64_t top,
              int64_t left, Shape* s) {
  if (x.size() != 4 || y.size() != 4 || kernel.size() != 4) return false;
  *s = Shape{x[0], x[1], x[2], x[3], y[1], y[2], y[3], kernel[0], kernel[1],
             stride, top, left, groups};
  if (stride > 2) return false;
  int64_t in = s->channels / groups, out = s->out_channels / groups;
  auto known = [](int64_t n) { return n >= kLanes && n <= 256 && (n & (n - 1)) == 0; };
  if (known(in) && known(out)) {
    s->slabs = groups, s->in = in, s->out = out, s->narrow = 0;
    return true;
  }
  if (in == out && kLanes % in == 0 && s->channels % kLanes == 0) {
    s->slabs = s->channels / kLanes, s->in = s->out = kLanes, s->narrow = in;
    return true;
  }
  if (groups == 1 && in <= kThin && in != 2 && out % kLanes == 0) {
    s->slabs = 1, s->in = in, s->out = out, s->narrow = 0, s->thin = true;
    return true;
  }
  return false;
}

// A set of slabs that are copied together, so that whole lines of the cache are read one after the
// other, and the rows of a band of them: as many as stay in the cache with the weights.
struct Bands {
  int64_t slabs, sets;   // in a set, and sets
  int64_t rows, number;  // of a result, in a band at most, and bands

  // bytes: of a row of one slab; weights: bytes of one slab's.
  Bands(int64_t all_slabs, int64_t channels, int64_t bytes, int64_t weights, int64_t all_rows) {
    slabs = std::clamp<int64_t>(kTogether / channels, 1, all_slabs);
    while (all_slabs % slabs != 0) --slabs;
    sets = all_slabs / slabs;
    int64_t kept = std::max<int64_t>(kBand, slabs * weights);
    int64_t most = std::clamp<int64_t>(kept / (slabs * bytes), 1, all_rows);
    number = (all_rows + most - 1) / most;
    rows = (all_rows + number - 1) / number;
  }

 private:
  static constexpr int64_t kTogether = 128, kBand = 192 << 10;
};

// Copies slabs of an image, so many channels of each, into the middle of zeros.
// padded: [slabs][rows][columns][channels], the slabs `slab` floats apart.
void Pad(const float* image, int64_t height, int64_t width, int64_t pixel, int64_t slabs,
         int64_t channels, int64_t top, int64_t left, int64_t rows, int64_t columns, int64_t slab,
         float* padded) {
  int64_t right = left + std::min(width, columns - left);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = padded + i * columns * channels;
    int64_t from = i - top;
    bool inside = from >= 0 && from < height;
    for (int64_t s = 0; s < slabs; ++s) {
      float* to = row + s * slab;
      std::fill_n(to, (inside ? left : columns) * channels, 0.0f);
      if (inside) std::fill_n(to + right * channels, (columns - right) * channels, 0.0f);
    }
    if (!inside) continue;
    const float* source = image + from * width * pixel;
    if (pixel == channels) {
      std::copy_n(source, (right - left) * channels, row + left * channels);
      continue;
    }
    for (int64_t j = left; j < right; ++j, source += pixel)
      for (int64_t s = 0; s < slabs; ++s)
        for (int64_t c = 0; c < channels; c += kLanes)
          Store(row + s * slab + j * channels + c, Load(source + s * channels + c));
  }
}

// Floats between slabs: by one line more than they have, so that not all of them are copied to the
// same places of the cache.
int64_t Distance(int64_t rows, int64_t columns, int64_t channels) {
  return rows * columns * channels + 16;
}

// Lane l gets the channel `c` of its group of `width` channels.
template <int width, int c, int... lane>
inline Vector Spread(Vector x, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(x, x, (lane / width * width + c)...);
}
template <int width, int c>
inline Vector Spread(Vector x) {
  return Spread<width, c>(x, std::make_integer_sequence<int, kLanes>());
}

template <int width, int c = 0>
inline void MultiplyNarrow(Vector x, const Vector* w, Vector& sum) {
  sum += Spread<width, c>(x) * w[c];
  if constexpr (c + 1 < width) MultiplyNarrow<width, c + 1>(x, w, sum);
}

template <int width, int c = 0>
inline void AccumulateNarrow(Vector x, Vector dy, Vector* sums) {
  sums[c] += Spread<width, c>(x) * dy;
  if constexpr (c + 1 < width) AccumulateNarrow<width, c + 1>(x, dy, sums);
}

// Where each tap of a kernel reads, relative to the first pixel.
using Taps = std::vector<int64_t>;

// P pixels of a row, so many floats of the input apart, by V vectors of output channels.
// weights: [tap][in][V * kLanes]; y: `pixel` floats apart.
template <int P, int V, int in, int distance>
void Wide(const float* x, const Taps& taps, const float* weights, float* y, int64_t pixel) {
  Vector sums[P][V] = {};
  for (int64_t offset : taps) {
    const float* from = x + offset;
#pragma GCC unroll 2
    for (int c = 0; c < in; ++c, weights += V * kLanes) {
      Vector w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) w[v] = Load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[p][v] += from[p * distance + c] * w[v];
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) Store(y + p * pixel + v * kLanes, sums[p][v]);
}

// P pixels by one vector of groups of `width` channels. weights: [tap][width][kLanes].
template <int P, int width, int step>
void Narrow(const float* x, const Taps& taps, const float* weights, float* y, int64_t pixel) {
  Vector sums[P] = {};
  for (int64_t offset : taps) {
    Vector w[width];
#pragma GCC unroll 16
    for (int c = 0; c < width; ++c) w[c] = Load(weights + c * kLanes);
    weights += width * kLanes;
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
      MultiplyNarrow<width>(Load(x + offset + p * step * kLanes), w, sums[p]);
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) Store(y + p * pixel, sums[p]);
}

using Kernel = void (*)(const float*, const Taps&, const float*, float*, int64_t);

template <int P, int V, int in, int distance>
Kernel WideOf() {
  // For the sums, the weights and a pixel.
  constexpr bool registers = P * V + V + 1 <= kRegisters;
  if constexpr (registers && (in >= kLanes || in == 1)) return Wide<P, V, in, distance>;
  return nullptr;
}

template <int P, int V, int step>
Kernel WideOf(int64_t in) {
  switch (in) {
    case 4: return WideOf<P, V, 4, step * 4>();
    case 8: return WideOf<P, V, 8, step * 8>();
    case 16: return WideOf<P, V, 16, step * 16>();
    case 32: return WideOf<P, V, 32, step * 32>();
    case 64: return WideOf<P, V, 64, step * 64>();
    case 128: return WideOf<P, V, 128, step * 128>();
    case 256: return WideOf<P, V, 256, step * 256>();
    default: return nullptr;
  }
}

// Of thin slabs, so many floats apart.
template <int P, int V>
Kernel ThinOf(int64_t distance) {
  switch (distance) {
    case 1: return WideOf<P, V, 1, 1>();
    case 2: return WideOf<P, V, 1, 2>();
    case 3: return WideOf<P, V, 1, 3>();
    case 4: return WideOf<P, V, 1, 4>();
    case 6: return WideOf<P, V, 1, 6>();
    case 8: return WideOf<P, V, 1, 8>();
    default: return nullptr;
  }
}

template <int P, int width, int step>
Kernel NarrowOf() {
  // For the sums, the weights, and pixels as they are and shuffled.
  constexpr bool registers = P + width + 2 <= kRegisters;
  if constexpr (registers && width < kLanes) return Narrow<P, width, step>;
  return nullptr;
}

template <int P, int step>
Kernel NarrowOf(int64_t width) {
  switch (width) {
    case 1: return NarrowOf<P, 1, step>();
    case 2: return NarrowOf<P, 2, step>();
    case 4: return NarrowOf<P, 4, step>();
    case 8: return NarrowOf<P, 8, step>();
    default: return nullptr;
  }
}

// nullptr where there are too few registers.
template <int P, int step>
Kernel KernelOf(int64_t in, int64_t narrow, bool thin, bool two) {
  if (narrow) return NarrowOf<P, step>(narrow);
  if (thin) return two ? ThinOf<P, 2>(in * step) : ThinOf<P, 1>(in * step);
  return two ? WideOf<P, 2, step>(in) : WideOf<P, 1, step>(in);
}

using Pixels = std::integer_sequence<int, 14, 8, 7, 5, 4, 2, 1>;

// The kernel for rows of n pixels: with the fewest sums that are computed twice, then the most
// pixels at a time.
template <int... P>
Kernel Choose(int64_t n, int64_t in, int64_t narrow, bool thin, bool two, int64_t step,
              int64_t* pixels, std::integer_sequence<int, P...>) {
  const std::pair<int64_t, Kernel> kernels[] = {
      {P, step == 1 ? KernelOf<P, 1>(in, narrow, thin, two)
                    : KernelOf<P, 2>(in, narrow, thin, two)}...};
  Kernel best = nullptr;
  int64_t least = 0;
  for (auto [p, kernel] : kernels) {
    if (kernel == nullptr || p > n) continue;
    int64_t work = (n + p - 1) / p * p;
    // A few pixels leave the multipliers waiting for the sums.
    if (p <= kRegisters / 5) work = work * 3 / 2;
    if (best == nullptr || work < least) best = kernel, least = work, *pixels = p;
  }
  return best;
}

// rows x columns output pixels of a slab, out of its padded images.
// weights: [out / (V * kLanes)][tap][in or narrow][V * kLanes]; y: pixels and rows so many floats
// apart.
void Compute(const float* padded, int64_t padded_width, int64_t in, int64_t out, int64_t narrow,
             bool thin, int64_t step, const Taps& taps, const float* weights, int64_t rows,
             int64_t columns, float* y, int64_t row, int64_t pixel) {
  int64_t pixels = 1;
  bool two = !narrow && out % (2 * kLanes) == 0;
  Kernel kernel = Choose(columns, in, narrow, thin, two, step, &pixels, Pixels());
  int64_t block = two ? 2 * kLanes : kLanes;
  int64_t terms = narrow ? narrow : thin ? 1 : in;
  int64_t weights_of_block = taps.size() * terms * block;
  // The weights of a block stay in the cache for all rows.
  for (int64_t o = 0; o < out; o += block)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += pixels) {
        // The last pixels again with some before them, rather than a kernel for every remainder.
        int64_t first = std::min(j, columns - pixels);
        kernel(padded + (i * step * padded_width + first * step) * in, taps,
               weights + o / block * weights_of_block, y + i * row + first * pixel + o, pixel);
      }
}

ffi::Error Forward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                   ffi::ResultBuffer<ffi::F32> y, int64_t groups, int64_t stride, int64_t top,
                   int64_t left) {
  Shape s;
  if (!Describe(x.dimensions(), y->dimensions(), kernel.dimensions(), groups, stride, top, left,
                &s))
    return Unsupported();
  const float* images = x.typed_data();
  const float* w = kernel.typed_data();
  float* result = y->typed_data();
  int64_t columns = (s.out_width - 1) * stride + s.k_w;
  int64_t terms = s.narrow ? s.narrow : s.in, taps_n = s.k_h * s.k_w;
  int64_t block = !s.narrow && s.out % (2 * kLanes) == 0 ? 2 * kLanes : kLanes;
  Taps taps;
  for (int64_t a = 0; a < s.k_h; ++a)
    for (int64_t b = 0; b < s.k_w; ++b)
      for (int64_t c = 0; c < (s.thin ? s.in : 1); ++c)
        taps.push_back((a * columns + b) * s.in + c);
  // Packed once, for all images: [slab][block][tap][term][block].
  std::vector<float> packed(s.slabs * s.out * taps_n * terms);
  float* to = packed.data();
  for (int64_t slab = 0; slab < s.slabs; ++slab)
    for (int64_t o = 0; o < s.out; o += block)
      for (int64_t row = 0; row < taps_n * terms; ++row, to += block)
        std::memcpy(to, w + row * s.out_channels + slab * s.out + o, block * sizeof(float));
  int64_t weights = s.out * taps_n * terms;
  Bands bands(s.slabs, s.in, stride * columns * s.in * sizeof(float), weights * sizeof(float),
              s.out_height);
  Parallel(pool, s.images * bands.number * bands.sets, [&](int64_t i) {
    int64_t first_slab = i % bands.sets * bands.slabs, band = i / bands.sets % bands.number;
    int64_t image = i / bands.sets / bands.number;
    int64_t first = band * bands.rows, rows = std::min(bands.rows, s.out_height - first);
    int64_t padded_rows = (rows - 1) * stride + s.k_h;
    int64_t distance = Distance(padded_rows, columns, s.in);
    float* padded = Scratch(0, bands.slabs * distance);
    Pad(images + image * s.height * s.width * s.channels + first_slab * s.in, s.height, s.width,
        s.channels, bands.slabs, s.in, top - first * stride, left, padded_rows, columns, distance,
        padded);
    float* target = result + (image * s.out_height + first) * s.out_width * s.out_channels;
    for (int64_t n = 0, slab = first_slab; n < bands.slabs; ++n, ++slab)
      Compute(padded + n * distance, columns, s.in, s.out, s.narrow, s.thin, stride, taps,
              packed.data() + slab * weights, rows, s.out_width, target + slab * s.out,
              s.out_width * s.out_channels, s.out_channels);
  });
  return ffi::Error::Success();
}

// The pixels of the input that are a stride apart, from (a, b) on: a dense convolution of `dy` with
// every stride-th tap, since o * stride + k = a + i * stride + top.
struct Phase {
  int64_t a, b, rows, columns;
  Taps taps;
  std::vector<int64_t> places;  // of the taps in the kernel
};

std::vector<Phase> Phases(const Shape& s, int64_t padded_width) {
  std::vector<Phase> phases;
  for (int64_t a = 0; a < std::min(s.stride, s.height); ++a)
    for (int64_t b = 0; b < std::min(s.stride, s.width); ++b) {
      Phase phase{a, b, (s.height - a + s.stride - 1) / s.stride,
                  (s.width - b + s.stride - 1) / s.stride};
      for (int64_t k = (a + s.top) % s.stride; k < s.k_h; k += s.stride)
        for (int64_t l = (b + s.left) % s.stride; l < s.k_w; l += s.stride) {
          int64_t row = s.k_h - 1 + (a + s.top - k) / s.stride;
          int64_t column = s.k_w - 1 + (b + s.left - l) / s.stride;
          phase.taps.push_back((row * padded_width + column) * s.out);
          phase.places.push_back(k * s.k_w + l);
        }
      phases.push_back(std::move(phase));
    }
  return phases;
}

ffi::Error ImageGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> dy,
                         ffi::Buffer<ffi::F32> kernel, ffi::ResultBuffer<ffi::F32> dx,
                         int64_t groups, int64_t stride, int64_t top, int64_t left) {
  Shape s;
  if (!Describe(dx->dimensions(), dy.dimensions(), kernel.dimensions(), groups, stride, top, left,
                &s) || s.thin)
    return Unsupported();
  const float* gradients = dy.typed_data();
  const float* w = kernel.typed_data();
  float* result = dx->typed_data();
  // Output o of a phase reads gradients from k_h - 1 before o on, and so many rows of them.
  int64_t reach = s.k_h + (stride - 1 + top) / stride;
  int64_t columns = s.k_w - 1 + std::max(s.out_width, (s.width - 1 + left) / stride + 1);
  int64_t terms = s.narrow ? s.narrow : s.out;
  int64_t block = !s.narrow && s.in % (2 * kLanes) == 0 ? 2 * kLanes : kLanes;
  int64_t in_of_group = s.channels / s.groups, out_of_group = s.out_channels / s.groups;
  std::vector<Phase> phases = Phases(s, columns);
  // Packed like Forward's, phase by phase, with input and output channels exchanged.
  std::vector<std::vector<float>> packed;
  for (const Phase& phase : phases) {
    std::vector<float> weights(s.slabs * s.in * phase.places.size() * terms);
    float* to = weights.data();
    for (int64_t slab = 0; slab < s.slabs; ++slab)
      for (int64_t o = 0; o < s.in; o += block)
        for (int64_t place : phase.places)
          for (int64_t term = 0; term < terms; ++term)
            for (int64_t lane = 0; lane < block; ++lane) {
              int64_t channel = slab * s.in + o + lane;  // of the input
              int64_t group = channel / in_of_group;
              *to++ = w[(place * in_of_group + channel % in_of_group) * s.out_channels +
                        group * out_of_group + term];
            }
    packed.push_back(std::move(weights));
  }
  int64_t phase_rows = phases[0].rows, weights = s.in * s.k_h * s.k_w * terms;
  Bands bands(s.slabs, s.out, columns * s.out * sizeof(float), weights * sizeof(float), phase_rows);
  Parallel(pool, s.images * bands.number * bands.sets, [&](int64_t i) {
    int64_t first_slab = i % bands.sets * bands.slabs, band = i / bands.sets % bands.number;
    int64_t image = i / bands.sets / bands.number;
    int64_t first = band * bands.rows;
    int64_t padded_rows = std::min(bands.rows, phase_rows - first) - 1 + reach;
    int64_t distance = Distance(padded_rows, columns, s.out);
    float* padded = Scratch(0, bands.slabs * distance);
    Pad(gradients + image * s.out_height * s.out_width * s.out_channels + first_slab * s.out,
        s.out_height, s.out_width, s.out_channels, bands.slabs, s.out, s.k_h - 1 - first,
        s.k_w - 1, padded_rows, columns, distance, padded);
    float* target = result + image * s.height * s.width * s.channels;
    for (int64_t n = 0, slab = first_slab; n < bands.slabs; ++n, ++slab)
      for (size_t p = 0; p < phases.size(); ++p) {
        const Phase& phase = phases[p];
        int64_t row = first * stride + phase.a;  // of the result
        Compute(padded + n * distance, columns, s.out, s.in, s.narrow, false, 1, phase.taps,
                packed[p].data() + slab * s.in * phase.places.size() * terms,
                std::min(bands.rows, phase.rows - first), phase.columns,
                target + (row * s.width + phase.b) * s.channels + slab * s.in,
                stride * s.width * s.channels, stride * s.channels);
      }
  });
  return ffi::Error::Success();
}

// Adds to a tap's gradient, the first `terms` of C input channels by V vectors of output channels,
// over some rows.
template <int C, int V>
void Accumulate(const float* x, int64_t x_row, int64_t x_pixel, const float* dy, int64_t dy_pixel,
                int64_t rows, int64_t columns, int64_t terms, float* sums_out, int64_t sums_row) {
  Vector sums[C][V] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = x + i * x_row;
    for (int64_t j = 0; j < columns; ++j, from += x_pixel, dy += dy_pixel) {
      Vector d[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) d[v] = Load(dy + v * kLanes);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[c][v] += from[c] * d[v];
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
    if (c < terms)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* to = sums_out + c * sums_row + v * kLanes;
        Store(to, Load(to) + sums[c][v]);
      }
}

template <int width>
void AccumulateGroups(const float* x, int64_t x_row, int64_t x_pixel, const float* dy,
                      int64_t rows, int64_t columns, float* sums_out, int64_t sums_row) {
  Vector sums[width] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = x + i * x_row;
    for (int64_t j = 0; j < columns; ++j, from += x_pixel, dy += kLanes)
      AccumulateNarrow<width>(Load(from), Load(dy), sums);
  }
#pragma GCC unroll 16
  for (int c = 0; c < width; ++c) {
    float* to = sums_out + c * sums_row;
    Store(to, Load(to) + sums[c]);
  }
}

// Adds to the gradients of `terms` terms of a tap, by all output channels, over some rows.
void AccumulateWide(const Shape& s, const float* x, int64_t x_row, int64_t x_pixel, int64_t terms,
                    const float* dy, int64_t rows, float* sums, int64_t sums_row) {
  bool two = s.out % (2 * kLanes) == 0;
  int64_t width = two ? 2 * kLanes : kLanes, at_once = two ? kTerms : kLanes;
  auto accumulate = two ? Accumulate<kTerms, 2> : Accumulate<kLanes, 1>;
  for (int64_t o = 0; o < s.out; o += width)
    for (int64_t c = 0; c < terms; c += at_once)
      accumulate(x + c, x_row, x_pixel, dy + o, s.out, rows, s.out_width, terms - c,
                 sums + c * sums_row + o, sums_row);
}

// Adds the gradient of all taps over some rows of one image. sums: [tap][in or narrow][row].
void AccumulateTaps(const Shape& s, const float* x, int64_t padded_width, const float* dy,
                    int64_t rows, float* sums, int64_t sums_row) {
  int64_t x_row = s.stride * padded_width * s.in, x_pixel = s.stride * s.in;
  // The taps of a kernel's row are beside each other in thin images: they are one tap's terms.
  int64_t taps_in_row = s.thin ? 1 : s.k_w, terms = s.narrow ? s.narrow : s.in;
  if (s.thin) terms *= s.k_w;
  for (int64_t tap = 0; tap < s.k_h * taps_in_row; ++tap) {
    const float* from = x + (tap / taps_in_row * padded_width + tap % taps_in_row) * s.in;
    float* to = sums + tap * terms * sums_row;
    auto groups = [&](auto accumulate) {
      accumulate(from, x_row, x_pixel, dy, rows, s.out_width, to, sums_row);
    };
    switch (s.narrow) {
      case 0: AccumulateWide(s, from, x_row, x_pixel, terms, dy, rows, to, sums_row); break;
      case 1: groups(AccumulateGroups<1>); break;
      case 2: groups(AccumulateGroups<2>); break;
      case 4: groups(AccumulateGroups<4>); break;
      case 8: groups(AccumulateGroups<8>); break;
    }
  }
}

ffi::Error KernelGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> dy,
                          ffi::ResultBuffer<ffi::F32> dkernel, int64_t groups, int64_t stride,
                          int64_t top, int64_t left) {
  Shape s;
  if (!Describe(x.dimensions(), dy.dimensions(), dkernel->dimensions(), groups, stride, top, left,
                &s))
    return Unsupported();
  const float* images = x.typed_data();
  const float* gradients = dy.typed_data();
  float* result = dkernel->typed_data();
  int64_t columns = (s.out_width - 1) * stride + s.k_w;
  int64_t terms = s.narrow ? s.narrow : s.in, size = s.k_h * s.k_w * terms * s.out_channels;
  // The images are divided so that there is work for several threads; the division, and so the
  // order of the sums, does not depend on how many there are.
  Bands bands(s.slabs, std::max(s.in, s.out),
              (stride * columns * s.in + s.out_width * s.out) * sizeof(float), 0, s.out_height);
  int64_t parts = std::min(s.images, (8 + bands.sets - 1) / bands.sets);
  std::vector<float> partial(parts * size, 0.0f);
  Parallel(pool, parts * bands.sets, [&](int64_t i) {
    int64_t part = i / bands.sets, first_slab = i % bands.sets * bands.slabs;
    int64_t most = (bands.rows - 1) * stride + s.k_h;
    int64_t x_distance = Distance(most, columns, s.in);
    int64_t dy_distance = Distance(bands.rows, s.out_width, s.out);
    float* padded = Scratch(0, bands.slabs * x_distance);
    float* rows_of_dy = Scratch(1, bands.slabs * dy_distance);
    float* sums = partial.data() + part * size;
    for (int64_t n = part * s.images / parts; n < (part + 1) * s.images / parts; ++n)
      for (int64_t first = 0; first < s.out_height; first += bands.rows) {
        int64_t rows = std::min(bands.rows, s.out_height - first);
        Pad(images + n * s.height * s.width * s.channels + first_slab * s.in, s.height, s.width,
            s.channels, bands.slabs, s.in, top - first * stride, left, (rows - 1) * stride + s.k_h,
            columns, x_distance, padded);
        Pad(gradients + (n * s.out_height + first) * s.out_width * s.out_channels +
                first_slab * s.out,
            rows, s.out_width, s.out_channels, bands.slabs, s.out, 0, 0, rows, s.out_width,
            dy_distance, rows_of_dy);
        for (int64_t slab = 0; slab < bands.slabs; ++slab)
          AccumulateTaps(s, padded + slab * x_distance, columns, rows_of_dy + slab * dy_distance,
                         rows, sums + (first_slab + slab) * s.out, s.out_channels);
      }
  });
  std::copy(partial.begin(), partial.begin() + size, result);
  AddParts(pool, partial.data() + size, parts - 1, size, result);
  return ffi::Error::Success();
}

}  // namespace

RESFLAX_HANDLER(Forward);
RESFLAX_HANDLER(ImageGradient);
RESFLAX_HANDLER(KernelGradient);
