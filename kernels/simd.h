// Vectors of CPM_VECTOR_BYTES bytes, built on the vector extensions of GCC and clang: loads, stores, conversions,
// transposition and sums. Included once per instruction set, so it has no include guard.

namespace cpm_rcnn {
namespace CPM_ISA {

#define CPM_INLINE inline __attribute__((always_inline))

template <typename T>
struct Simd {
  static constexpr int lanes = CPM_VECTOR_BYTES / sizeof(T);
  typedef T vec __attribute__((vector_size(CPM_VECTOR_BYTES)));
  using index = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
  typedef index index_vec __attribute__((vector_size(CPM_VECTOR_BYTES)));

  static CPM_INLINE vec load(const T* from) {
    vec value;
    __builtin_memcpy(&value, from, sizeof(vec));
    return value;
  }
  static CPM_INLINE void store(T* to, vec value) { __builtin_memcpy(to, &value, sizeof(vec)); }

  // Both treat x and y as blocks of D lanes. `even` interleaves the even blocks of x and y, `odd` the odd blocks.
  template <int D>
  static CPM_INLINE vec even(vec x, vec y) {
    return shuffle<D, 0>(x, y, std::make_integer_sequence<index, lanes>());
  }
  template <int D>
  static CPM_INLINE vec odd(vec x, vec y) {
    return shuffle<D, D>(x, y, std::make_integer_sequence<index, lanes>());
  }

  // Swaps rows[i][j] and rows[j][i].
  static CPM_INLINE void transpose(vec (&rows)[lanes]) { transpose_from<lanes / 2>(rows); }

  // Lane i of the result is the sum over the lanes of rows[i]. Overwrites rows.
  static CPM_INLINE vec row_sums(vec (&rows)[lanes]) {
    fold<lanes / 2>(rows);
    return rows[0];
  }

 private:
  template <int D, int From, index... I>
  static CPM_INLINE vec shuffle(vec x, vec y, std::integer_sequence<index, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(x, y, (From + ((I / D) % 2 == 0 ? I : lanes + I - D))...);
#else
    return __builtin_shuffle(x, y, index_vec{(From + ((I / D) % 2 == 0 ? I : lanes + I - D))...});
#endif
  }
  template <int D>
  static CPM_INLINE void transpose_from(vec (&rows)[lanes]) {
    if constexpr (D > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i & D) continue;
        const vec x = rows[i], y = rows[i + D];
        rows[i] = even<D>(x, y);
        rows[i + D] = odd<D>(x, y);
      }
      transpose_from<D / 2>(rows);
    }
  }
  template <int D>
  static CPM_INLINE void fold(vec (&rows)[lanes]) {
    if constexpr (D > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < D; ++i) rows[i] = even<D>(rows[i], rows[i + D]) + odd<D>(rows[i], rows[i + D]);
      fold<D / 2>(rows);
    }
  }
};

template <typename T>
using Vec = typename Simd<T>::vec;

// Converts between values of the storage type S in memory and lanes of the type in which they are computed.
template <typename S>
struct Stored {
  using T = S;
  static CPM_INLINE Vec<T> load(const S* from) { return Simd<T>::load(from); }
  static CPM_INLINE void store(S* to, Vec<T> value) { Simd<T>::store(to, value); }
  static CPM_INLINE T get(S value) { return value; }
  static CPM_INLINE S put(T value) { return value; }
};

template <>
struct Stored<BFloat16> {
  using T = float;
  static constexpr int lanes = Simd<float>::lanes;
  typedef std::uint16_t half_vec __attribute__((vector_size(CPM_VECTOR_BYTES / 2)));
  using word_vec = Simd<std::uint32_t>::vec;

  static CPM_INLINE Vec<float> load(const BFloat16* from) {
    half_vec half;
    __builtin_memcpy(&half, from, sizeof(half));
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, word_vec) << 16);
  }
  static CPM_INLINE void store(BFloat16* to, Vec<float> value) {
#if CPM_BF16_DOT
    const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
#else
    // Round to nearest, ties to even. NaN stays NaN.
    const word_vec word = reinterpret_cast<word_vec>(value);
    const word_vec rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const word_vec nan = reinterpret_cast<word_vec>(value != value);
    const half_vec half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), half_vec);
#endif
    __builtin_memcpy(to, &half, sizeof(half));
  }
  static CPM_INLINE float get(BFloat16 value) {
    const std::uint32_t word = std::uint32_t(value.bits) << 16;
    float result;
    __builtin_memcpy(&result, &word, 4);
    return result;
  }
  static CPM_INLINE BFloat16 put(float value) {
    std::uint32_t word;
    __builtin_memcpy(&word, &value, 4);
    if (value != value) return {0x7fc0};
    return {std::uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
  }
};

}  // namespace CPM_ISA
}  // namespace cpm_rcnn
