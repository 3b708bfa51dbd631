// The matrix products of a tile. In all of them lanes are output pixels and weights are broadcast, so that groups with
// any number of channels use whole vectors. deform_conv_isa.h includes this file once per instruction set, so it has no
// include guard.

namespace cpm_rcnn {
namespace CPM_ISA {

// The number of rows in a register tile, limited by the number of vector registers.
#if CPM_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

// Sets out[rows][pixels] to factors[rows][depth] x values[depth][pixels], or adds it if `accumulate`. `pixels` must be
// a multiple of two vectors. One stride of `factors` must be 1: `row` if ByColumn, otherwise `column`.
template <typename Op, bool ByColumn, int Rows = kTileRows>
void product(Matrix<typename Op::Element> factors, std::int64_t rows, std::int64_t depth,
             const typename Op::Element* values, typename Op::Number* out, std::int64_t pixels, std::int64_t pitch,
             bool accumulate) {
  std::int64_t row = 0;
  for (; row + Rows <= rows; row += Rows) {
    Matrix<typename Op::Element> some = factors;
    some.data += row * (ByColumn ? 1 : factors.row);
    for (std::int64_t pixel = 0; pixel < pixels; pixel += 2 * Simd<typename Op::Number>::lanes)
      product_tile<Op, Rows, ByColumn>(some, depth, values + pixel, pitch, out + row * pitch + pixel, pitch,
                                       accumulate);
  }
  if constexpr (Rows > 1) {
    if (row < rows) {
      factors.data += row * (ByColumn ? 1 : factors.row);
      product<Op, ByColumn, Rows / 2>(factors, rows - row, depth, values, out + row * pitch, pixels, pitch, accumulate);
    }
  }
}

// correlation() stores its sums as sum tiles of kTileRows outputs by two channels, in the order of its registers.
constexpr int kSumTile = 2 * kTileRows;
// The number of sum tiles that hold outputs x channels sums.
inline std::int64_t sum_tiles(std::int64_t outputs, std::int64_t channels) {
  return (outputs + kTileRows - 1) / kTileRows * ((channels + 1) / 2);
}
// The position of one sum in these sum tiles.
inline std::int64_t sum_index(std::int64_t output, std::int64_t channel, std::int64_t channels) {
  return (output / kTileRows * ((channels + 1) / 2) + channel / 2) * kSumTile + output % kTileRows * 2 + channel % 2;
}

// One sum tile of correlation(), from `Rows` rows of left and `Columns` rows of right.
template <typename Op, int Rows, int Columns>
CPM_INLINE void correlation_tile(const typename Op::Element* left, const typename Op::Element* right,
                                 std::int64_t pitch, std::int64_t vectors, typename Op::Number* sums) {
  using T = typename Op::Number;
  using E = Simd<typename Op::Element>;
  constexpr int L = Simd<T>::lanes;
  static_assert(kSumTile % L == 0, "a sum tile must consist of whole vectors");
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

// Adds to sums[outputs][channels] the dot products over pixels of left[outputs][pixels] and right[channels][pixels],
// whose rows are `pitch` elements apart and `vectors` vectors long. May write up to one sum tile past the end of the
// sums.
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
    // If this block had fewer rows than a sum tile, the next rows continue in the same sum tile. correlation_tile()
    // always adds kSumTile values; those past its rows are zeros.
    sums = Rows == kTileRows ? tile : sums + 2 * Rows;
  }
  if constexpr (Rows > 1) {
    if (outputs > 0) correlation<Op, Rows / 2>(left, outputs, right, channels, pitch, vectors, sums);
  }
}

}  // namespace CPM_ISA
}  // namespace cpm_rcnn
