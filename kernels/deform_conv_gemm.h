// The three matrix products of a tile. Lanes are output pixels throughout, weights are broadcast: so groups of any size
// fill the vectors. Included once for each instruction set; hence no include guard.

namespace cpm_rcnn {
namespace CPM_ISA {

// Rows of a register tile: as many accumulators as the instruction set has registers for.
#if CPM_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

// One multiply-add. `Element` is what the operands are made of: a number, or a pair of bfloat16 in one word.
template <typename T>
struct Plain {
  using Number = T;
  using Element = T;
  static constexpr int channels = 1;  // in an element of the columns
  static CPM_INLINE Vec<T> madd(Vec<T> sum, T factor, Vec<T> value) { return sum + factor * value; }
  static CPM_INLINE Vec<T> madd(Vec<T> sum, Vec<T> factor, Vec<T> value) { return sum + factor * value; }
};

#if CPM_BF16_DOT
struct Pairs {
  using Number = float;
  using Element = std::uint32_t;
  static constexpr int channels = 2;
  static CPM_INLINE Vec<float> madd(Vec<float> sum, Vec<Element> factor, Vec<Element> value) {
    return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(factor), reinterpret_cast<__m512bh>(value)));
  }
  static CPM_INLINE Vec<float> madd(Vec<float> sum, Element factor, Vec<Element> value) {
    return madd(sum, reinterpret_cast<Vec<Element>>(_mm512_set1_epi32(factor)), value);
  }
};
#endif

// A matrix by rows `row` elements apart and columns `column` elements apart.
template <typename E>
struct Matrix {
  const E* data;
  std::int64_t row, column;
};

// out[Rows][2 vectors] (+)= factors[Rows][depth] x values[depth][2 vectors]; rows of values and out are `pitch` apart.
template <typename Op, int Rows, bool ByColumn>
CPM_INLINE void product_tile(Matrix<typename Op::Element> factors, std::int64_t depth,
                             const typename Op::Element* values, typename Op::Number* out, std::int64_t pitch,
                             bool accumulate) {
  using T = typename Op::Number;
  using S = Simd<T>;
  constexpr int L = S::lanes;
  Vec<T> sums[Rows][2];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    sums[i][0] = accumulate ? S::load(out + i * pitch) : Vec<T>{};
    sums[i][1] = accumulate ? S::load(out + i * pitch + L) : Vec<T>{};
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const auto left = Simd<typename Op::Element>::load(values + k * pitch);
    const auto right = Simd<typename Op::Element>::load(values + k * pitch + L);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const auto factor = ByColumn ? factors.data[k * factors.column + i] : factors.data[i * factors.row + k];
      sums[i][0] = Op::madd(sums[i][0], factor, left);
      sums[i][1] = Op::madd(sums[i][1], factor, right);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    S::store(out + i * pitch, sums[i][0]);
    S::store(out + i * pitch + L, sums[i][1]);
  }
}

// out[rows][pixels] (+)= factors[rows][depth] x values[depth][pixels]; pixels a multiple of two vectors. One of the
// strides of `factors` is 1: the row's if ByColumn, else the column's.
template <typename Op, bool ByColumn, int Rows = kTileRows>
void product(Matrix<typename Op::Element> factors, std::int64_t rows, std::int64_t depth,
             const typename Op::Element* values, typename Op::Number* out, std::int64_t pixels, std::int64_t pitch,
             bool accumulate) {
  std::int64_t row = 0;
  for (; row + Rows <= rows; row += Rows) {
    Matrix<typename Op::Element> some = factors;
    some.data += row * (ByColumn ? 1 : factors.row);
    for (std::int64_t pixel = 0; pixel < pixels; pixel += 2 * Simd<typename Op::Number>::lanes)
      product_tile<Op, Rows, ByColumn>(some, depth, values + pixel, out + row * pitch + pixel, pitch, accumulate);
  }
  if constexpr (Rows > 1) {
    if (row < rows) {
      factors.data += row * (ByColumn ? 1 : factors.row);
      product<Op, ByColumn, Rows / 2>(factors, rows - row, depth, values, out + row * pitch, pixels, pitch, accumulate);
    }
  }
}

// Sums over pixels are kept as tiles of kTileRows outputs by two channels, in the order of the registers.
constexpr int kSumTile = 2 * kTileRows;
inline std::int64_t sum_tiles(std::int64_t outputs, std::int64_t channels) {
  return (outputs + kTileRows - 1) / kTileRows * ((channels + 1) / 2);
}
inline std::int64_t sum_index(std::int64_t output, std::int64_t channel, std::int64_t channels) {
  return (output / kTileRows * ((channels + 1) / 2) + channel / 2) * kSumTile + output % kTileRows * 2 + channel % 2;
}

template <typename Op, int Rows, int Columns>
CPM_INLINE void correlation_tile(const typename Op::Element* left, const typename Op::Element* right,
                                 std::int64_t pitch, std::int64_t vectors, typename Op::Number* sums) {
  using T = typename Op::Number;
  using E = Simd<typename Op::Element>;
  constexpr int L = Simd<T>::lanes;
  static_assert(kSumTile % L == 0, "whole vectors of sums");
  Vec<T> products[kSumTile] = {};
  for (std::int64_t v = 0; v < vectors; ++v) {
    Vec<typename Op::Element> columns[Columns];
#pragma GCC unroll 2
    for (int j = 0; j < Columns; ++j) columns[j] = E::load(right + j * pitch + v * L);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const auto row = E::load(left + i * pitch + v * L);
#pragma GCC unroll 2
      for (int j = 0; j < Columns; ++j) products[i * 2 + j] = Op::madd(products[i * 2 + j], row, columns[j]);
    }
  }
#pragma GCC unroll 4
  for (int block = 0; block < kSumTile; block += L) {
    Vec<T> some[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) some[i] = products[block + i];
    Simd<T>::store(sums + block, Simd<T>::load(sums + block) + Simd<T>::row_sums(some));
  }
}

// sums[outputs][channels] += left[outputs][pixels] . right[channels][pixels], rows `pitch` elements apart. Writes up to
// one tile beyond the sums.
template <typename Op, int Rows = kTileRows>
void correlation(const typename Op::Element* left, std::int64_t outputs, const typename Op::Element* right,
                 std::int64_t channels, std::int64_t pitch, std::int64_t vectors, typename Op::Number* sums) {
  for (; outputs >= Rows; outputs -= Rows, left += Rows * pitch) {
    auto* tile = sums;
    for (std::int64_t channel = 0; channel < channels; channel += 2, tile += kSumTile) {
      if (channel + 1 < channels) {
        correlation_tile<Op, Rows, 2>(left, right + channel * pitch, pitch, vectors, tile);
      } else {
        correlation_tile<Op, Rows, 1>(left, right + channel * pitch, pitch, vectors, tile);
      }
    }
    // Fewer rows than a tile has leave room in it for those that follow (and add zeros to what lies after it).
    sums = Rows == kTileRows ? tile : sums + 2 * Rows;
  }
  if constexpr (Rows > 1) {
    if (outputs > 0) correlation<Op, Rows / 2>(left, outputs, right, channels, pitch, vectors, sums);
  }
}

}  // namespace CPM_ISA
}  // namespace cpm_rcnn
