// What each instruction set provides: the steps on one unit and one tile, as functions.
#pragma once

#include "deform_conv_problem.h"

namespace cpm_rcnn {

// What a thread works in while it computes the gradients of a unit.
template <typename T>
struct BackwardScratch {
  T* packed;                  // the input, packed; its border zero
  T* packed_grad;             // the input's gradient, likewise
  T* grad_tile;               // [outputs of the unit][tile]
  std::uint32_t* grad_pairs;  // the same, two outputs in a word; for products in bfloat16
  BFloat16* grad_half;        // the same in bfloat16
  T* column_grad;             // [width][tile], of one tap
  T* columns;                 // [width][tile], of one tap (or half as much, in bfloat16)
  T* sample_grad;             // [L][width]
  T* sample_value;            // [L][width]
  T* weight;                  // [tap][segment][output][channel]
  T* weight_sums;             // [tap][segment][sums as tiles], and a tile more
  T* offset_sums;             // [dy, dx, mask][tap][pixel], of the thread; added to
};

struct Needed {
  bool input, offset, mask, weight;
  bool samples() const { return offset || mask || weight; }
};

template <typename S>
struct KernelTable {
  using T = Compute<S>;
  using ForwardTile = void (*)(const Problem&, const Unit&, const T* packed, const Tap<T>*, const void* weight,
                               void* columns, T* out, std::int64_t tile, bool accumulate);
  using BackwardUnit = void (*)(const Problem&, const Unit&, View<const S> grad_output, View<const S> input,
                                const T* weight, const Tap<T>*, std::int64_t tile, std::int64_t image, Needed,
                                const BackwardScratch<T>&, View<S> grad_input, T* grad_weight);

  int lanes;
  int sum_tile;
  std::int64_t (*sum_tiles)(std::int64_t outputs, std::int64_t channels);
  void (*make_taps)(const Problem&, const S* offset, const S* mask, Tap<T>*, std::int64_t first, std::int64_t last);
  void (*pack)(const Problem&, const Unit&, View<const S>, std::int64_t image, T* packed, std::int64_t width,
               std::int64_t first, std::int64_t last);
  void (*store_tile)(const T* tile, std::int64_t pitch, View<S>, std::int64_t image, std::int64_t channel,
                     std::int64_t rows, std::int64_t first, std::int64_t count);
  // By the vectors that a block of channels is wide: one, two.
  ForwardTile forward_tile[2];
  BackwardUnit backward_unit[2];
  // Products of bfloat16 pairs, two vectors wide; null where the processor has none.
  ForwardTile forward_tile_pairs = nullptr;
  BackwardUnit backward_unit_pairs = nullptr;
};

}  // namespace cpm_rcnn
