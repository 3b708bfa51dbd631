// Matrix products that keep their sums in vector registers. Included once per instruction set after simd.h, so it has
// no include guard.

namespace cpm_rcnn {
namespace CPM_ISA {

// A multiply-add on vectors. `Element` is the type of the operands' elements and `Number` the type of the sums.
template <typename T>
struct Plain {
  using Number = T;
  using Element = T;
  static constexpr int channels = 1;  // per element of the columns
  static CPM_INLINE Vec<T> madd(Vec<T> sum, T factor, Vec<T> value) { return sum + factor * value; }
  static CPM_INLINE Vec<T> madd(Vec<T> sum, Vec<T> factor, Vec<T> value) { return sum + factor * value; }
};

#if CPM_BF16_DOT
// Each element holds two bfloat16 values, whose products are both added to one float32 sum.
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

// A matrix whose rows are `row` elements apart and whose columns are `column` elements apart.
template <typename E>
struct Matrix {
  const E* data;
  std::int64_t row, column;
};

// Sets out[Rows][2 vectors] to factors[Rows][depth] x values[depth][2 vectors], or adds it if `accumulate`. One stride
// of `factors` must be 1: `row` if ByColumn, otherwise `column`. The rows of values and out are `values_pitch` and
// `out_pitch` elements apart.
template <typename Op, int Rows, bool ByColumn>
CPM_INLINE void product_tile(Matrix<typename Op::Element> factors, std::int64_t depth,
                             const typename Op::Element* values, std::int64_t values_pitch, typename Op::Number* out,
                             std::int64_t out_pitch, bool accumulate) {
  using T = typename Op::Number;
  using S = Simd<T>;
  constexpr int L = S::lanes;
  Vec<T> sums[Rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    sums[i][0] = accumulate ? S::load(out + i * out_pitch) : Vec<T>{};
    sums[i][1] = accumulate ? S::load(out + i * out_pitch + L) : Vec<T>{};
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const auto left = Simd<typename Op::Element>::load(values + k * values_pitch);
    const auto right = Simd<typename Op::Element>::load(values + k * values_pitch + L);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const auto factor = ByColumn ? factors.data[k * factors.column + i] : factors.data[i * factors.row + k];
      sums[i][0] = Op::madd(sums[i][0], factor, left);
      sums[i][1] = Op::madd(sums[i][1], factor, right);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    S::store(out + i * out_pitch, sums[i][0]);
    S::store(out + i * out_pitch + L, sums[i][1]);
  }
}

}  // namespace CPM_ISA
}  // namespace cpm_rcnn
