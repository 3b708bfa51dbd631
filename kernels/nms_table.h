// The functions of the non-maximum suppression (NMS) that every instruction set provides.
// Nothing in this file depends on torch or on the instruction set.
#pragma once

#include <cstdint>

namespace cpm_rcnn {
namespace nms {

// A box suppresses another one if their IoU, rounded to T, is greater than `value`.
template <typename T>
struct Threshold {
  T value;
  // Whether the test that avoids divisions is exact. It is not for a negative threshold.
  bool can_skip_division;
};

// The kept boxes of a group, in blocks of KernelTable::width boxes: x1, y1, x2, y2 and area of the boxes of a block,
// each contiguous. The last block is padded with NaN, which never suppresses a box.
template <typename T>
struct Kept {
  T* blocks;
  std::int64_t count;
};

constexpr int kBlockFields = 5;

template <typename T>
struct KernelTable {
  int width;
  // Sets suppressed[i] for each i in [first, last) for which a kept box suppresses the box rows[i].
  void (*test)(const T* boxes, const std::int32_t* rows, std::int64_t first, std::int64_t last, const Kept<T>&,
               Threshold<T>, bool* suppressed);
  // Greedy NMS of the boxes rows[i] for i in [first, last), best box first: each one that no kept box suppresses is
  // added to `kept`, and its element of `mask` is set. Boxes with suppressed[i] are left out; `suppressed` may be null.
  // Tests only the blocks of kept boxes from `first_block` on.
  void (*greedy)(const T* boxes, const std::int32_t* rows, std::int64_t first, std::int64_t last,
                 const bool* suppressed, std::int64_t first_block, Kept<T>& kept, Threshold<T>, bool* mask);
};

}  // namespace nms
}  // namespace cpm_rcnn
