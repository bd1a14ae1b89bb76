// Winograd's convolutions of NHWC images by 3x3 kernels on a CPU, as custom calls of XLA.
//
// F(2x2, 3x3) of Lavin and Gray (arXiv 1509.09308): 2x2 pixels of the output, a tile, are
// A^T [(G w G^T) * (B^T d B)] A of the 4x4 pixels d of the input below them: 16 products for 36.
// At each of the 16 places of a tile, the products over channels are one of matrices, tiles by
// channels. A task takes as many tiles as stay in the cache, of whichever images, and transforms,
// multiplies and transforms back. The signs of the fourth row of B^T and A^T are exchanged, so that
// nothing is negated:
//
//         1  0 -1  0           1   0   0
//   B^T = 0  1  1  0      G = 1/2 1/2 1/2     A^T = 1  1  1  0
//         0 -1  1  0          1/2 -1/2 1/2          0  1 -1  1
//         0 -1  0  1           0   0   1

#include <cstring>

#include "convolution.h"
#include "tile.h"

namespace {

constexpr int kTaps = 9;
constexpr int kPlaces = 16;           // of a transformed tile
constexpr int64_t kSquare = 64;       // channels of a kernel's gradient at a time
constexpr int64_t kCache = 512 << 10; // bytes of it for what a task transforms

// What a call is about: images of `height` x `width` give out others. Tiles are numbered through
// all images, row by row.
struct Shape {
  int64_t images, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t top, left, groups;
  int64_t in, out;  // channels of a group
  int64_t tile_rows, tile_columns, tiles;
};

bool Describe(ffi::AnyBuffer::Dimensions x, ffi::AnyBuffer::Dimensions y,
              ffi::AnyBuffer::Dimensions kernel, int64_t groups, int64_t stride, int64_t top,
              int64_t left, Shape* s) {
  if (x.size() != 4 || y.size() != 4 || kernel.size() != 4) return false;
  int64_t rows = (y[1] + 1) / 2, columns = (y[2] + 1) / 2;
  *s = Shape{x[0], x[1], x[2], x[3], y[1], y[2], y[3], top, left, groups,
             x[3] / groups, y[3] / groups, rows, columns, x[0] * rows * columns};
  return stride == 1 && kernel[0] == 3 && kernel[1] == 3 && s->in % kLanes == 0 &&
         s->out % kLanes == 0;
}

// The top left pixel of a tile in the output.
struct Place {
  int64_t image, row, column;
};

Place PlaceOf(const Shape& s, int64_t tile) {
  int64_t line = tile / s.tile_columns;
  return {line / s.tile_rows, line % s.tile_rows * 2, tile % s.tile_columns * 2};
}

// A block of transformed tiles, [place][channels / kLanes][rows][kLanes], whose rows are tiles.
struct Block {
  float* data;
  int64_t channels, rows;
  // Not a multiple of the cache's size: the places of a tile are written at once.
  int64_t Place() const { return channels * rows + kLanes; }
  float* At(int64_t place, int64_t channel) const {
    return data + place * Place() + channel * rows;
  }
};

// Transforms the tiles from `first` on, n of them, and zeros for the other rows of the block.
void TransformImages(const Shape& s, const float* x, int64_t first, int64_t n, const float* zeros,
                     const Block& block) {
  for (int64_t t = 0; t < block.rows; ++t) {
    const float* pixels[kPlaces];
    Place tile = PlaceOf(s, first + t);
    const float* image = x + tile.image * s.height * s.width * s.channels;
    for (int64_t a = 0; a < 4; ++a)
      for (int64_t b = 0; b < 4; ++b) {
        int64_t row = tile.row - s.top + a, column = tile.column - s.left + b;
        bool inside = t < n && row >= 0 && row < s.height && column >= 0 && column < s.width;
        pixels[a * 4 + b] = inside ? image + (row * s.width + column) * s.channels : zeros;
      }
    for (int64_t c = 0; c < block.channels; c += kLanes) {
      Vector d[4][4];
#pragma GCC unroll 4
      for (int a = 0; a < 4; ++a) {
        Vector p[4];
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) p[b] = Load(pixels[a * 4 + b] + c);
        d[a][0] = p[0] - p[2], d[a][1] = p[1] + p[2], d[a][2] = p[2] - p[1], d[a][3] = p[3] - p[1];
      }
      float* to = block.At(0, c) + t * kLanes;
      int64_t place = block.Place();
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        Store(to + b * place, d[0][b] - d[2][b]);
        Store(to + (4 + b) * place, d[1][b] + d[2][b]);
        Store(to + (8 + b) * place, d[2][b] - d[1][b]);
        Store(to + (12 + b) * place, d[3][b] - d[1][b]);
      }
    }
  }
}

// The pixels of n tiles out of their products, of some channels of the output.
void TransformProducts(const Shape& s, const Block& products, int64_t first, int64_t n, float* y) {
  int64_t place = products.Place();
  for (int64_t t = 0; t < n; ++t) {
    Place tile = PlaceOf(s, first + t);
    float* pixel = y + ((tile.image * s.out_height + tile.row) * s.out_width + tile.column) *
                           s.out_channels;
    bool below = tile.row + 1 < s.out_height, right = tile.column + 1 < s.out_width;
    for (int64_t o = 0; o < products.channels; o += kLanes, pixel += kLanes) {
      const float* from = products.At(0, o) + t * kLanes;
      Vector m[2][4];
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        Vector p[4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a) p[a] = Load(from + (a * 4 + b) * place);
        m[0][b] = p[0] + p[1] + p[2], m[1][b] = p[1] - p[2] + p[3];
      }
      float* next = pixel + s.out_width * s.out_channels;
      Store(pixel, m[0][0] + m[0][1] + m[0][2]);
      if (right) Store(pixel + s.out_channels, m[0][1] - m[0][2] + m[0][3]);
      if (below) Store(next, m[1][0] + m[1][1] + m[1][2]);
      if (below && right) Store(next + s.out_channels, m[1][1] - m[1][2] + m[1][3]);
    }
  }
}

// G w G^T of `in` x kLanes weights, taps and rows so many floats apart. to: [place][in][row]
void TransformWeights(const float* w, int64_t tap, int64_t row, int64_t in, float* to,
                      int64_t to_row) {
  for (int64_t c = 0; c < in; ++c, w += row, to += to_row) {
    Vector g[4][3];
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
      Vector p[3];
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) p[a] = Load(w + (a * 3 + b) * tap);
      Vector ends = (p[0] + p[2]) * 0.5f, middle = p[1] * 0.5f;
      g[0][b] = p[0], g[1][b] = ends + middle, g[2][b] = ends - middle, g[3][b] = p[2];
    }
    int64_t place = in * to_row;
#pragma GCC unroll 4
    for (int a = 0; a < 4; ++a) {
      Vector ends = (g[a][0] + g[a][2]) * 0.5f, middle = g[a][1] * 0.5f;
      float* target = to + a * 4 * place;
      Store(target, g[a][0]);
      Store(target + place, ends + middle);
      Store(target + 2 * place, ends - middle);
      Store(target + 3 * place, g[a][2]);
    }
  }
}

// The products of kRows tiles, in a block of `rows`, with V vectors of output channels.
template <int V>
void MultiplyTiles(const float* tiles, int64_t rows, int64_t in, const float* weights,
                   float* products) {
  Vector sums[kRows][V] = {};
  Multiply<V>(tiles, rows * kLanes, weights, in, sums);
#pragma GCC unroll 14
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) Store(products + (v * rows + t) * kLanes, sums[t][v]);
}

// The convolution of x that gives out y. transform(vector, to, row) transforms the weights of a
// vector of output channels, the vector-th of all groups', to [place][in][row].
template <typename Transform>
void Convolve(const ffi::ThreadPool& pool, const Shape& s, const float* x,
              const Transform& transform, float* y) {
  int64_t vectors = s.out % (2 * kLanes) == 0 ? 2 : 1, width = vectors * kLanes;
  int64_t size = kPlaces * s.in * width;
  // Once, for all images: [group][out / width][place][in][width].
  Floats weights = Allocate(s.out_channels / width * size);
  Parallel(pool, s.out_channels / width, [&](int64_t i) {
    for (int64_t v = 0; v < vectors; ++v)
      transform(i * vectors + v, weights.get() + i * size + v * kLanes, width);
  });
  int64_t strip = kPlaces * kRows * (s.in + width) * sizeof(float);
  int64_t most = std::max<int64_t>(kCache / strip, 1) * kRows, blocks = (s.tiles + most - 1) / most;
  Parallel(pool, blocks * s.groups, [&](int64_t i) {
    int64_t group = i % s.groups, first = i / s.groups * most;
    int64_t n = std::min(most, s.tiles - first), rows = std::max<int64_t>(n, kRows);
    Block tiles{nullptr, s.in, rows}, products{nullptr, width, rows};
    tiles.data = Scratch(0, kPlaces * tiles.Place());
    products.data = Scratch(1, kPlaces * products.Place());
    float* zeros = Scratch(2, s.in);
    std::fill(zeros, zeros + s.in, 0.0f);
    TransformImages(s, x + group * s.in, first, n, zeros, tiles);
    const float* u = weights.get() + group * (s.out / width) * size;
    for (int64_t o = 0; o < s.out; o += width) {
      for (int64_t place = 0; place < kPlaces; ++place, u += s.in * width)
        for (int64_t t = 0; t < rows; t += kRows) {
          // The last tiles again with some before them.
          int64_t at = std::min(t, rows - kRows) * kLanes;
          (vectors == 2 ? MultiplyTiles<2> : MultiplyTiles<1>)(tiles.At(place, 0) + at, rows, s.in,
                                                               u, products.At(place, 0) + at);
        }
      TransformProducts(s, products, first, n, y + group * s.out + o);
    }
  });
}

ffi::Error WinogradForward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                           ffi::Buffer<ffi::F32> kernel, ffi::ResultBuffer<ffi::F32> y,
                           int64_t groups, int64_t stride, int64_t top, int64_t left) {
  Shape s;
  if (!Describe(x.dimensions(), y->dimensions(), kernel.dimensions(), groups, stride, top, left,
                &s))
    return Unsupported();
  const float* w = kernel.typed_data();
  Convolve(pool, s, x.typed_data(), [&](int64_t vector, float* to, int64_t row) {
    TransformWeights(w + vector * kLanes, s.in * s.out_channels, s.out_channels, s.in, to, row);
  }, y->typed_data());
  return ffi::Error::Success();
}

// The convolution of `dy` by the kernel turned around, with input and output channels exchanged.
ffi::Error WinogradImageGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> dy,
                                 ffi::Buffer<ffi::F32> kernel, ffi::ResultBuffer<ffi::F32> dx,
                                 int64_t groups, int64_t stride, int64_t top, int64_t left) {
  Shape s;
  if (!Describe(dy.dimensions(), dx->dimensions(), kernel.dimensions(), groups, stride, 2 - top,
                2 - left, &s))
    return Unsupported();
  const float* w = kernel.typed_data();
  Convolve(pool, s, dy.typed_data(), [&](int64_t vector, float* to, int64_t row) {
    float* turned = Scratch(0, kTaps * s.in * kLanes);
    int64_t group = vector * kLanes / s.out, channel = vector * kLanes % s.out;
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const float* from = w + (tap * s.out + channel) * s.channels + group * s.in;
      float* target = turned + (kTaps - 1 - tap) * s.in * kLanes;
      for (int64_t c = 0; c < s.in; c += kLanes) {
        Vector square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = Load(from + i * s.channels + c);
        Transpose(square);
        for (int i = 0; i < kLanes; ++i) Store(target + (c + i) * kLanes, square[i]);
      }
    }
    TransformWeights(turned, s.in * kLanes, kLanes, s.in, to, row);
  }, dx->typed_data());
  return ffi::Error::Success();
}

// Transforms the pixels of the output's gradient, A dy A^T, like TransformImages.
void TransformGradients(const Shape& s, const float* dy, int64_t first, const float* zeros,
                        const Block& block) {
  for (int64_t t = 0; t < block.rows; ++t) {
    Place tile = PlaceOf(s, first + t);
    const float* pixel = dy + ((tile.image * s.out_height + tile.row) * s.out_width + tile.column) *
                                  s.out_channels;
    bool below = tile.row + 1 < s.out_height, right = tile.column + 1 < s.out_width;
    int64_t next = s.out_width * s.out_channels;
    const float* pixels[4] = {pixel, right ? pixel + s.out_channels : zeros,
                              below ? pixel + next : zeros,
                              below && right ? pixel + next + s.out_channels : zeros};
    for (int64_t o = 0; o < block.channels; o += kLanes) {
      Vector d[4][2];
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        Vector upper = Load(pixels[b] + o), lower = Load(pixels[2 + b] + o);
        d[0][b] = upper, d[1][b] = upper + lower, d[2][b] = upper - lower, d[3][b] = lower;
      }
      int64_t place = block.Place();
#pragma GCC unroll 4
      for (int a = 0; a < 4; ++a) {
        float* to = block.At(a * 4, o) + t * kLanes;
        Store(to, d[a][0]);
        Store(to + place, d[a][0] + d[a][1]);
        Store(to + 2 * place, d[a][0] - d[a][1]);
        Store(to + 3 * place, d[a][1]);
      }
    }
  }
}

// G^T u G of the sums [place][in][out]; taps and rows of the result so many floats apart.
void TransformSums(const float* sums, int64_t in, int64_t out, float* dw, int64_t tap,
                   int64_t row) {
  int64_t place = in * out;
  for (int64_t c = 0; c < in; ++c, dw += row)
    for (int64_t o = 0; o < out; o += kLanes, sums += kLanes) {
      Vector g[3][4];
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        Vector p[4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a) p[a] = Load(sums + (a * 4 + b) * place);
        Vector middle = (p[1] + p[2]) * 0.5f;
        g[0][b] = p[0] + middle, g[1][b] = (p[1] - p[2]) * 0.5f, g[2][b] = middle + p[3];
      }
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) {
        Vector middle = (g[a][1] + g[a][2]) * 0.5f;
        float* to = dw + a * 3 * tap + o;
        Store(to, g[a][0] + middle);
        Store(to + tap, (g[a][1] - g[a][2]) * 0.5f);
        Store(to + 2 * tap, middle + g[a][3]);
      }
    }
}

ffi::Error WinogradKernelGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                                  ffi::Buffer<ffi::F32> dy, ffi::ResultBuffer<ffi::F32> dkernel,
                                  int64_t groups, int64_t stride, int64_t top, int64_t left) {
  Shape s;
  if (!Describe(x.dimensions(), dy.dimensions(), dkernel->dimensions(), groups, stride, top, left,
                &s))
    return Unsupported();
  const float* images = x.typed_data();
  const float* gradients = dy.typed_data();
  float* result = dkernel->typed_data();
  // A square of channels at a time: its sums stay in the cache.
  int64_t in_squares = (s.in + kSquare - 1) / kSquare, out_squares = (s.out + kSquare - 1) / kSquare;
  int64_t squares = s.groups * in_squares * out_squares;
  // Where these are few, the tiles are divided too; the division, and so the order of the sums,
  // does not depend on the number of threads.
  int64_t parts = (8 + squares - 1) / squares;
  int64_t size = kTaps * s.in * s.out_channels;
  Floats partial = Allocate((parts - 1) * size);
  Parallel(pool, parts * squares, [&](int64_t i) {
    int64_t part = i / squares, group = i / (in_squares * out_squares) % s.groups;
    int64_t c = i / out_squares % in_squares * kSquare, o = i % out_squares * kSquare;
    int64_t in = std::min(s.in - c, kSquare), out = std::min(s.out - o, kSquare);
    int64_t most = kCache / (kPlaces * (in + out) * sizeof(float));
    float* sums = Scratch(2, kPlaces * in * out + kSquare);
    std::memset(sums, 0, (kPlaces * in * out + kSquare) * sizeof(float));
    const float* zeros = sums + kPlaces * in * out;
    int64_t end = (part + 1) * s.tiles / parts;
    for (int64_t first = part * s.tiles / parts; first < end; first += most) {
      int64_t n = std::min(most, end - first);
      Block tiles{nullptr, in, n}, changes{nullptr, out, n};
      tiles.data = Scratch(0, kPlaces * tiles.Place());
      changes.data = Scratch(1, kPlaces * changes.Place());
      TransformImages(s, images + group * s.in + c, first, n, zeros, tiles);
      TransformGradients(s, gradients + group * s.out + o, first, zeros, changes);
      for (int64_t place = 0; place < kPlaces; ++place) {
        float* to = sums + place * in * out;
        int64_t width = out % (2 * kLanes) == 0 ? 2 * kLanes : kLanes;
        auto accumulate = width == kLanes ? Accumulate<kTerms, 1> : Accumulate<kTerms, 2>;
        for (int64_t b = 0; b < out; b += width)
          for (int64_t a = 0; a < in; a += kTerms)
            accumulate(tiles.At(place, a / kLanes * kLanes) + a % kLanes, kLanes,
                       changes.At(place, b), kLanes, n * kLanes, n, kTerms, to + a * out + b, out,
                       false);
      }
    }
    float* target = part ? partial.get() + (part - 1) * size : result;
    TransformSums(sums, in, out, target + c * s.out_channels + group * s.out + o,
                  s.in * s.out_channels, s.out_channels);
  });
  AddParts(pool, partial.get(), parts - 1, size, result);
  return ffi::Error::Success();
}

}  // namespace

RESFLAX_HANDLER(WinogradForward);
RESFLAX_HANDLER(WinogradImageGradient);
RESFLAX_HANDLER(WinogradKernelGradient);
