// The functions that the kernels of each instruction set provide. Each is one step on one unit or one tile.
#pragma once

#include "deform_conv_problem.h"

namespace cpm_rcnn {

// The buffers of one thread that computes the gradients of a unit. `width` is the number of lanes in a block of
// channels, `L` the number of lanes in a vector, and `tile` the number of pixels in a tile.
template <typename T>
struct BackwardScratch {
  T* packed;                  // the packed input, with a border of zeros
  T* packed_grad;             // the gradient of the packed input
  T* grad_tile;               // [output of the unit][tile], the gradient of the output
  std::uint32_t* grad_pairs;  // the same in bfloat16, with two outputs in each word
  BFloat16* grad_half;        // the same in bfloat16, with two pixels in each word
  T* column_grad;             // [width][tile], the gradient of one tap's columns
  T* columns;                 // [width][tile], one tap's columns; in bfloat16, half of the buffer is used
  T* sample_grad;             // [L][width], the gradient of L samples
  T* sample_value;            // [L][width], the values of L samples
  T* weight;                  // [tap][segment][output][channel], the weights of the unit
  T* weight_sums;             // [tap][segment][sum tile], followed by one spare sum tile
  T* offset_sums;             // [dy, dx, mask][tap][pixel], accumulated over the thread's units
};

// The gradients to compute.
struct Needed {
  bool input, offset, mask, weight;
  // Whether backward has to sample the input.
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
  // For blocks of channels that are one and two vectors wide.
  ForwardTile forward_tile[2];
  BackwardUnit backward_unit[2];
  // With products of bfloat16 pairs, for blocks two vectors wide. Null if the instruction set has no such product.
  ForwardTile forward_tile_pairs = nullptr;
  BackwardUnit backward_unit_pairs = nullptr;
};

}  // namespace cpm_rcnn
