// Non-maximum suppression for one instruction set. nms_cpu.cpp includes this file once per instruction set, so it has
// no include guard. Before each include, define the macros of isa_begin.h.
//
// All arithmetic is that of torchvision's operator: the same operations in the same order, each rounded. Compile with
// -ffp-contract=off, because a fused multiply-add rounds once where torchvision rounds twice.

#include "isa_begin.h"

namespace cpm_rcnn {
namespace nms {
namespace CPM_ISA {

#define CPM_INLINE inline __attribute__((always_inline))

template <typename T>
struct Simd {
  static constexpr int lanes = CPM_VECTOR_BYTES / sizeof(T);
  typedef T vec __attribute__((vector_size(CPM_VECTOR_BYTES)));

  static CPM_INLINE vec load(const T* from) {
    vec value;
    __builtin_memcpy(&value, from, sizeof(vec));
    return value;
  }

  // std::max(a, b) and std::min(a, b) of each lane: a, if either is NaN.
  static CPM_INLINE vec max(vec a, vec b) { return a < b ? b : a; }
  static CPM_INLINE vec min(vec a, vec b) { return b < a ? b : a; }

  // Whether a[0] >= b[0] or a[1] >= b[1] in any lane, and the same for >.
#if CPM_VECTOR_BYTES == 64
  static CPM_INLINE bool any_at_least(const vec (&a)[2], const vec (&b)[2]) { return any<_CMP_GE_OQ>(a, b); }
  static CPM_INLINE bool any_greater(const vec (&a)[2], const vec (&b)[2]) { return any<_CMP_GT_OQ>(a, b); }

 private:
  template <int Comparison>
  static CPM_INLINE bool any(const vec (&a)[2], const vec (&b)[2]) {
    if constexpr (sizeof(T) == 8)
      return _mm512_cmp_pd_mask(__m512d(a[0]), __m512d(b[0]), Comparison) |
             _mm512_cmp_pd_mask(__m512d(a[1]), __m512d(b[1]), Comparison);
    else
      return _mm512_cmp_ps_mask(__m512(a[0]), __m512(b[0]), Comparison) |
             _mm512_cmp_ps_mask(__m512(a[1]), __m512(b[1]), Comparison);
  }
#else
  static CPM_INLINE bool any_at_least(const vec (&a)[2], const vec (&b)[2]) {
    return any((a[0] >= b[0]) | (a[1] >= b[1]));
  }
  static CPM_INLINE bool any_greater(const vec (&a)[2], const vec (&b)[2]) {
    return any((a[0] > b[0]) | (a[1] > b[1]));
  }

 private:
  template <typename Mask>
  static CPM_INLINE bool any(Mask mask) {
#if CPM_X86 && CPM_VECTOR_BYTES == 32
    return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask));
#elif CPM_X86
    return _mm_movemask_epi8(reinterpret_cast<__m128i>(mask));
#else
    std::uint64_t words[CPM_VECTOR_BYTES / 8], all = 0;
    __builtin_memcpy(words, &mask, sizeof(mask));
    for (const std::uint64_t word : words) all |= word;
    return all;
#endif
  }
#endif
};

// Two vectors wide, so that the operations of one vector can start before those of the other have ended.
template <typename T>
constexpr int kWidth = 2 * Simd<T>::lanes;

// The fields of one box, as in Kept.
template <typename T>
struct Box {
  T x1, y1, x2, y2, area;

  static CPM_INLINE Box load(const T* boxes, std::int32_t row) {
    const T* from = boxes + 4 * std::int64_t(row);
    return {from[0], from[1], from[2], from[3], (from[2] - from[0]) * (from[3] - from[1])};
  }
};

// Whether any of these blocks of kept boxes suppresses the box.
template <typename T>
CPM_INLINE bool is_suppressed(const Box<T>& box, const T* block, const T* end, Threshold<T> threshold) {
  using V = Simd<T>;
  using vec = typename V::vec;
  const vec zero = {}, x1 = zero + box.x1, y1 = zero + box.y1, x2 = zero + box.x2, y2 = zero + box.y2;
  const vec area = zero + box.area, limit = zero + threshold.value, limits[2] = {limit, limit};
  for (; block != end; block += kBlockFields * kWidth<T>) {
    vec overlap[2], all[2], product[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const T* from = block + half * V::lanes;
      const vec left = V::max(V::load(from), x1), top = V::max(V::load(from + kWidth<T>), y1);
      const vec right = V::min(V::load(from + 2 * kWidth<T>), x2), bottom = V::min(V::load(from + 3 * kWidth<T>), y2);
      overlap[half] = V::max(zero, right - left) * V::max(zero, bottom - top);
      all[half] = V::load(from + 4 * kWidth<T>) + area - overlap[half];
      product[half] = limit * all[half];
    }
    // If the quotient overlap / all, rounded, is greater than the limit, then overlap > limit * all before rounding.
    // Rounding is monotonic and overlap is representable, so overlap >= product. Few pairs need the division.
    if (threshold.can_skip_division && !V::any_at_least(overlap, product)) continue;
    const vec iou[2] = {overlap[0] / all[0], overlap[1] / all[1]};
    if (V::any_greater(iou, limits)) return true;
  }
  return false;
}

template <typename T>
const T* end_of(const Kept<T>& kept) {
  return kept.blocks + (kept.count + kWidth<T> - 1) / kWidth<T> * kWidth<T> * kBlockFields;
}

template <typename T>
void test(const T* boxes, const std::int32_t* rows, std::int64_t first, std::int64_t last, const Kept<T>& kept,
          Threshold<T> threshold, bool* suppressed) {
  for (std::int64_t i = first; i < last; ++i)
    suppressed[i] = is_suppressed<T>(Box<T>::load(boxes, rows[i]), kept.blocks, end_of(kept), threshold);
}

template <typename T>
void greedy(const T* boxes, const std::int32_t* rows, std::int64_t first, std::int64_t last, const bool* suppressed,
            std::int64_t first_block, Kept<T>& kept, Threshold<T> threshold, bool* mask) {
  constexpr int width = kWidth<T>;
  const T* const begin = kept.blocks + first_block * width * kBlockFields;
  for (std::int64_t i = first; i < last; ++i) {
    if (suppressed && suppressed[i]) continue;
    const Box<T> box = Box<T>::load(boxes, rows[i]);
    if (is_suppressed<T>(box, begin, end_of(kept), threshold)) continue;
    mask[rows[i]] = true;
    T* const block = kept.blocks + kept.count / width * width * kBlockFields;
    const std::int64_t lane = kept.count % width;
    if (lane == 0) std::fill_n(block, width * kBlockFields, std::numeric_limits<T>::quiet_NaN());
    block[lane] = box.x1, block[width + lane] = box.y1, block[2 * width + lane] = box.x2;
    block[3 * width + lane] = box.y2, block[4 * width + lane] = box.area;
    ++kept.count;
  }
}

template <typename T>
KernelTable<T> make_table() {
  return {kWidth<T>, test<T>, greedy<T>};
}

}  // namespace CPM_ISA
}  // namespace nms
}  // namespace cpm_rcnn

#include "isa_end.h"
