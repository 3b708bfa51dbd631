// The sizes of a 3x3 convolution, its division into tiles, and the matrices of Winograd's transforms.
// Nothing in this file depends on torch or on the instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace cpm_rcnn {
namespace winograd {

// A tile is kTile x kTile outputs, which depend on kPoints x kPoints inputs.
constexpr int kTile = 4, kTaps = 3, kPoints = kTile + kTaps - 1, kPositions = kPoints * kPoints;

// ----------------------------------------------------------------------------------------------------------- matrices

// The one-dimensional convolution of M outputs is A^T ((G g) * (B^T d)), where d are its M + 2 inputs, g its 3 weights,
// and * multiplies element by element. The rows of all three matrices belong to points at which polynomials are
// evaluated: infinity and the first M + 1 of kFinite. A convolution of fewer outputs therefore needs the first of the
// same G g. These points have smaller rounding errors in float32 than the usual 0, 1, -1, 2 and -2.
constexpr std::array<double, kPoints - 1> kFinite = {0, 0.625, -0.625, 1.5, -1.5};

template <int Rows, int Columns>
struct Matrix {
  double at[Rows][Columns];
};

template <int Rows, int Columns>
constexpr Matrix<Columns, Rows> transposed(const Matrix<Rows, Columns>& matrix) {
  Matrix<Columns, Rows> result{};
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Columns; ++j) result.at[j][i] = matrix.at[i][j];
  return result;
}

// The coefficients of the product of (x - kFinite[j]) over the first `count` points, without point `skipped`.
template <int Size>
constexpr std::array<double, Size> from_roots(int count, int skipped) {
  std::array<double, Size> result{1};
  for (int j = 0; j < count; ++j) {
    if (j == skipped) continue;
    for (int i = Size - 1; i >= 0; --i) result[i] = (i > 0 ? result[i - 1] : 0) - kFinite[j] * result[i];
  }
  return result;
}

// Row 0 evaluates a polynomial of `Columns` coefficients at infinity, and row 1 + i at kFinite[i].
template <int Rows, int Columns>
constexpr Matrix<Rows, Columns> evaluation() {
  Matrix<Rows, Columns> result{};
  result.at[0][Columns - 1] = 1;
  for (int i = 1; i < Rows; ++i) {
    double power = 1;
    for (int j = 0; j < Columns; ++j, power *= kFinite[i - 1]) result.at[i][j] = power;
  }
  return result;
}

// A, with M + 2 rows and M columns.
template <int M>
constexpr Matrix<M + 2, M> output_matrix() {
  return evaluation<M + 2, M>();
}

// G, with kPoints rows and kTaps columns. Its rows are divided by the product of the differences of their point from
// all others, so that the elements of B^T are products of points, which float32 represents exactly.
constexpr Matrix<kPoints, kTaps> weight_matrix() {
  auto result = evaluation<kPoints, kTaps>();
  for (int i = 0; i < kPoints - 1; ++i)
    for (int j = 0; j < kPoints - 1; ++j)
      if (i != j)
        for (double& value : result.at[1 + i]) value /= kFinite[i] - kFinite[j];
  return result;
}

// B^T, with M + 2 rows and columns: the coefficients of the polynomials that are zero at all points except one.
template <int M>
constexpr Matrix<M + 2, M + 2> input_matrix() {
  Matrix<M + 2, M + 2> result{};
  for (int k = 0; k < M + 2; ++k) result.at[0][k] = from_roots<M + 2>(M + 1, -1)[k];
  for (int i = 0; i < M + 1; ++i) {
    for (int k = 0; k < M + 2; ++k) result.at[1 + i][k] = from_roots<M + 2>(M + 1, i)[k];
    // The points of a larger convolution, whose differences G contains.
    for (int j = M + 1; j < kPoints - 1; ++j)
      for (double& value : result.at[1 + i]) value *= kFinite[i] - kFinite[j];
  }
  return result;
}

// -------------------------------------------------------------------------------------------------------------- tiles

// The tile of the outputs [y, y + height) x [x, x + width) of an image.
struct Tile {
  std::int64_t image, y, x;
  int height, width;
};

struct Range {
  std::int64_t first, last;
  std::int64_t size() const { return std::max<std::int64_t>(last - first, 0); }
};

// The tiles of a batch. Those at the lower and right border have fewer rows and columns if the sides of an image are no
// multiples of kTile, and a tile of fewer outputs needs fewer products. The order of the tiles is chosen so that those
// which need a position are consecutive: first the tiles of fewer columns, then the complete ones, then those of fewer
// rows, then those of both.
class Tiles {
 public:
  Tiles(std::int64_t images, std::int64_t height, std::int64_t width)
      : rows_(height / kTile),
        columns_(width / kTile),
        rest_rows_(int(height % kTile)),
        rest_columns_(int(width % kTile)) {
    const std::int64_t per_image[] = {rest_columns_ ? rows_ : 0, rows_ * columns_, rest_rows_ ? columns_ : 0,
                                      rest_rows_ && rest_columns_ ? 1 : 0};
    for (int kind = 0; kind < 4; ++kind) end_[kind] = (kind ? end_[kind - 1] : 0) + images * per_image[kind];
  }

  std::int64_t count() const { return end_[3]; }

  Tile operator[](std::int64_t index) const {
    const bool low = index >= end_[1], right = index < end_[0] || index >= end_[2];
    const std::int64_t rows = low ? 1 : rows_, columns = right ? 1 : columns_;
    const std::int64_t inside = index - (low ? (right ? end_[2] : end_[1]) : (right ? 0 : end_[0]));
    const std::int64_t row = low ? rows_ : inside / columns % rows, column = right ? columns_ : inside % columns;
    return {inside / (rows * columns), row * kTile, column * kTile, low ? rest_rows_ : kTile,
            right ? rest_columns_ : kTile};
  }

  // The tiles in `range` that need the position of this row and column, relative to range.first.
  Range at_position(int position, Range range) const {
    const bool complete_rows = position / kPoints >= rest_rows_ + kTaps - 1;
    const bool complete_columns = position % kPoints >= rest_columns_ + kTaps - 1;
    const std::int64_t first = complete_columns ? end_[0] : 0;
    const std::int64_t last = complete_rows ? end_[1] : complete_columns ? end_[2] : end_[3];
    return {std::max(first, range.first) - range.first, std::min(last, range.last) - range.first};
  }

 private:
  const std::int64_t rows_, columns_;  // of complete tiles
  const int rest_rows_, rest_columns_;
  std::int64_t end_[4];
};

}  // namespace winograd
}  // namespace cpm_rcnn
