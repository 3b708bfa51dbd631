// The transforms and matrix products of Winograd's convolution. winograd_cpu.cpp includes this file once per
// instruction set, so it has no include guard. Before each include, define the macros of isa_begin.h.

#include "isa_begin.h"

#define CPM_BF16_DOT 0
#include "simd.h"
#include "product_tile.h"
#undef CPM_BF16_DOT

namespace cpm_rcnn {
namespace winograd {
namespace CPM_ISA {

using namespace cpm_rcnn::CPM_ISA;

using Floats = Vec<float>;
constexpr int kLanes = Simd<float>::lanes;
constexpr int kPanel = 2 * kLanes;
static_assert(kChannelMultiple % kPanel == 0);

// The number of rows in a register tile, limited by the number of vector registers.
#if CPM_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRows = 14;
#else
constexpr int kRows = 6;
#endif

// --------------------------------------------------------------------------------------------------------- transforms

// Calls f.template operator()<i>() for i = 0 to N - 1.
template <int N, typename F>
CPM_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { (f.template operator()<I>(), ...); }(std::make_integer_sequence<int, N>());
}

// One-dimensional transforms of a tile with M outputs, and of weights.
template <int M>
struct ToInput {
  static constexpr int from = M + 2, to = M + 2;
  static constexpr auto matrix = input_matrix<M>();
};
template <int M>
struct ToGrad {
  static constexpr int from = M, to = M + 2;
  static constexpr auto matrix = output_matrix<M>();
};
template <int M>
struct ToOutput {
  static constexpr int from = M + 2, to = M;
  static constexpr auto matrix = transposed(output_matrix<M>());
};
struct ToWeight {
  static constexpr int from = kTaps, to = kPoints;
  static constexpr auto matrix = weight_matrix();
};
struct ToGradWeight {
  static constexpr int from = kPoints, to = kTaps;
  static constexpr auto matrix = transposed(weight_matrix());
};

// Sets to[i * to_stride] to the sum of matrix.at[i][j] * from[j * from_stride] over j.
template <typename Transform>
CPM_INLINE void apply(const Floats* from, int from_stride, Floats* to, int to_stride) {
  unrolled<Transform::to>([&]<int i>() __attribute__((always_inline)) {
    Floats sum{};
    unrolled<Transform::from>([&]<int j>() __attribute__((always_inline)) {
      constexpr float factor = float(Transform::matrix.at[i][j]);
      if constexpr (factor == 1) {
        sum += from[j * from_stride];
      } else if constexpr (factor != 0) {
        sum += factor * from[j * from_stride];
      }
    });
    to[i * to_stride] = sum;
  });
}

// Applies one transform to every column of a matrix and another one to every row of the result: load(row, column)
// returns the elements of the matrix, and store(row, column, value) takes the results.
template <typename Columns, typename Rows, typename Load, typename Store>
CPM_INLINE void transform_tile(const Load& load, const Store& store) {
  Floats half[Columns::to][Rows::from];
#pragma GCC unroll 6
  for (int j = 0; j < Rows::from; ++j) {
    Floats column[Columns::from];
#pragma GCC unroll 6
    for (int i = 0; i < Columns::from; ++i) column[i] = load(i, j);
    apply<Columns>(column, 1, &half[0][j], Rows::from);
  }
#pragma GCC unroll 6
  for (int i = 0; i < Columns::to; ++i) {
    Floats row[Rows::to];
    apply<Rows>(half[i], 1, row, 1);
#pragma GCC unroll 6
    for (int j = 0; j < Rows::to; ++j) store(i, j, row[j]);
  }
}

// Calls f.template operator()<Height, Width>() for the height and width of the tile.
template <typename F>
CPM_INLINE void with_sides(const Tile& tile, const F& f) {
  static_assert(kTile == 4);
  const auto with_height = [&]<int Height>() __attribute__((always_inline)) {
    switch (tile.width) {
      case 1:
        return f.template operator()<Height, 1>();
      case 2:
        return f.template operator()<Height, 2>();
      case 3:
        return f.template operator()<Height, 3>();
      default:
        return f.template operator()<Height, 4>();
    }
  };
  switch (tile.height) {
    case 1:
      return with_height.template operator()<1>();
    case 2:
      return with_height.template operator()<2>();
    case 3:
      return with_height.template operator()<3>();
    default:
      return with_height.template operator()<4>();
  }
}

template <typename S, int Height, int Width>
void input_of_tile(Batch<const S> batch, const Tile& tile, float* to, std::int64_t position) {
  constexpr int rows = Height + 2, columns = Width + 2;
  const S* pixels[rows][columns];  // null outside the image
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      const std::int64_t y = tile.y + i - 1, x = tile.x + j - 1;
      const bool inside = y >= 0 && y < batch.height && x >= 0 && x < batch.width;
      pixels[i][j] = inside ? batch.pixel(tile.image, y, x) : nullptr;
    }
  }
  for (std::int64_t c = 0; c < batch.channels; c += kLanes) {
    transform_tile<ToInput<Height>, ToInput<Width>>(
        [&](int i, int j) { return pixels[i][j] ? Stored<S>::load(pixels[i][j] + c) : Floats{}; },
        [&](int i, int j, Floats value) { Simd<float>::store(to + (i * kPoints + j) * position + c, value); });
  }
}

template <typename S>
void transform_input(Batch<const S> batch, const Tiles& tiles, Range range, Planes to) {
  for (std::int64_t index = range.first; index < range.last; ++index, to.data += to.tile) {
    const Tile tile = tiles[index];
    with_sides(tile,
               [&]<int Height, int Width>() { input_of_tile<S, Height, Width>(batch, tile, to.data, to.position); });
  }
}

template <typename S>
void transform_grad(Batch<const S> batch, const Tiles& tiles, Range range, Planes to) {
  for (std::int64_t index = range.first; index < range.last; ++index, to.data += to.tile) {
    const Tile tile = tiles[index];
    with_sides(tile, [&]<int Height, int Width>() {
      for (std::int64_t c = 0; c < batch.channels; c += kLanes) {
        transform_tile<ToGrad<Height>, ToGrad<Width>>(
            [&](int i, int j) { return Stored<S>::load(batch.pixel(tile.image, tile.y + i, tile.x + j) + c); },
            [&](int i, int j, Floats value) {
              Simd<float>::store(to.data + (i * kPoints + j) * to.position + c, value);
            });
      }
    });
  }
}

template <typename S>
void transform_weight(Weight<const S> weight, std::int64_t in, std::int64_t out, Range panels, float* to) {
  const std::int64_t position = weight_position(in, out);
  for (std::int64_t panel = panels.first; panel < panels.last; ++panel) {
    for (std::int64_t k = 0; k < in; ++k) {
      float taps[kTaps * kTaps][kPanel];
      for (int lane = 0; lane < kPanel; ++lane) {
        const S* from = weight.data + (panel * kPanel + lane) * weight.out + k * weight.in;
        for (int tap = 0; tap < kTaps * kTaps; ++tap)
          taps[tap][lane] = Stored<S>::get(from[tap / kTaps * weight.row + tap % kTaps * weight.column]);
      }
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        transform_tile<ToWeight, ToWeight>(
            [&](int i, int j) { return Simd<float>::load(taps[i * kTaps + j] + lane); },
            [&](int i, int j, Floats value) {
              Simd<float>::store(to + (i * kPoints + j) * position + (panel * in + k) * kPanel + lane, value);
            });
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- products

// Sets out[rows][panel] to factors[rows][depth] x values[depth][panel], in register tiles of almost equal heights.
template <bool ByColumn>
struct Product {
  cpm_rcnn::CPM_ISA::Matrix<float> factors;
  std::int64_t depth;
  const float* values;
  std::int64_t values_pitch;
  float* out;
  std::int64_t out_pitch;

  template <int Rows = kRows>
  void rows(int count) const {
    if (count == Rows) {
      product_tile<Plain<float>, Rows, ByColumn>(factors, depth, values, values_pitch, out, out_pitch, false);
    } else if constexpr (Rows > 1) {
      rows<Rows - 1>(count);
    }
  }
};

// Calls f(first, count) for blocks of at most kRows rows, whose sizes differ by at most one.
template <typename F>
CPM_INLINE void for_each_block(Range rows, const F& f) {
  const std::int64_t blocks = (rows.size() + kRows - 1) / kRows;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = rows.size() * block / blocks, last = rows.size() * (block + 1) / blocks;
    f(rows.first + first, int(last - first));
  }
}

template <typename S>
void outputs(const Tiles& tiles, Range range, Planes inputs, std::int64_t in, const float* weight, const float* bias,
             Range panels, float* scratch, Batch<S> to) {
  const std::int64_t pitch = panels.size() * kPanel, plane = range.size() * pitch,
                     first_channel = panels.first * kPanel;
  for (int position = 0; position < kPositions; ++position) {
    const float* const weights = weight + position * weight_position(in, to.channels) + first_channel * in;
    for_each_block(tiles.at_position(position, range), [&](std::int64_t first, int count) {
      for (std::int64_t panel = 0; panel < panels.size(); ++panel)
        Product<false>{{inputs.data + position * inputs.position + first * inputs.tile, inputs.tile, 1},
                       in,
                       weights + panel * in * kPanel,
                       kPanel,
                       scratch + position * plane + first * pitch + panel * kPanel,
                       pitch}
            .rows(count);
    });
  }
  for (std::int64_t index = range.first; index < range.last; ++index) {
    const Tile tile = tiles[index];
    const float* const sums = scratch + (index - range.first) * pitch;
    with_sides(tile, [&]<int Height, int Width>() {
      for (std::int64_t c = 0; c < pitch; c += kLanes) {
        const Floats shift = bias ? Simd<float>::load(bias + first_channel + c) : Floats{};
        transform_tile<ToOutput<Height>, ToOutput<Width>>(
            [&](int i, int j) { return Simd<float>::load(sums + (i * kPoints + j) * plane + c); },
            [&](int i, int j, Floats value) {
              Stored<S>::store(to.pixel(tile.image, tile.y + i, tile.x + j) + first_channel + c, value + shift);
            });
      }
    });
  }
}

inline void grad_weight(const Tiles& tiles, Range range, Planes inputs, std::int64_t in, Planes grads, std::int64_t out,
                        Range ins, Range panels, float* scratch, float* to) {
  const std::int64_t pitch = panels.size() * kPanel, plane = ins.size() * pitch, first_out = panels.first * kPanel;
  for (int position = 0; position < kPositions; ++position) {
    const Range rows = tiles.at_position(position, range);
    const float* const left = inputs.data + position * inputs.position + rows.first * inputs.tile;
    const float* const right = grads.data + position * grads.position + rows.first * grads.tile + first_out;
    for_each_block(ins, [&](std::int64_t first, int count) {
      for (std::int64_t o = 0; o < pitch; o += kPanel)
        Product<true>{{left + first, 1, inputs.tile},
                      rows.size(),
                      right + o,
                      grads.tile,
                      scratch + position * plane + (first - ins.first) * pitch + o,
                      pitch}
            .rows(count);
    });
  }
  for (std::int64_t i = 0; i < ins.size(); ++i) {
    for (std::int64_t o = 0; o < pitch; o += kLanes) {
      const float* const from = scratch + i * pitch + o;
      float* const sums = to + (ins.first + i) * out + first_out + o;
      transform_tile<ToGradWeight, ToGradWeight>(
          [&](int row, int column) { return Simd<float>::load(from + (row * kPoints + column) * plane); },
          [&](int row, int column, Floats value) {
            float* const sum = sums + (row * kTaps + column) * in * out;
            Simd<float>::store(sum, Simd<float>::load(sum) + value);
          });
    }
  }
}

template <typename S>
KernelTable<S> make_table() {
  return {kPanel, transform_input<S>, transform_grad<S>, transform_weight<S>, outputs<S>, grad_weight};
}

}  // namespace CPM_ISA
}  // namespace winograd
}  // namespace cpm_rcnn

#include "isa_end.h"
