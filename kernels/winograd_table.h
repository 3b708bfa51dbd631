// The functions that the kernels of each instruction set provide.
#pragma once

#include "storage.h"
#include "winograd_problem.h"

namespace cpm_rcnn {
namespace winograd {

// The numbers of channels must be multiples of this.
constexpr std::int64_t kChannelMultiple = 32;

// A channels-last batch (images, channels, height, width) in memory.
template <typename S>
struct Batch {
  S* data;
  std::int64_t channels, height, width;
  S* pixel(std::int64_t image, std::int64_t y, std::int64_t x) const {
    return data + ((image * height + y) * width + x) * channels;
  }
};

// A weight (outputs, inputs, 3, 3) in memory, or its transpose that is rotated by 180 degrees. Strides are in elements.
template <typename S>
struct Weight {
  S* data;
  std::int64_t out, in, row, column;
};

// Matrices of one row per tile, one for each position. The strides are in elements.
struct Planes {
  float* data;
  std::int64_t position, tile;
};

inline std::int64_t weight_plane(std::int64_t in, std::int64_t out) { return in * out + 16; }

template <typename S>
struct KernelTable {
  int panel;  // the output channels of a panel of transformed weights

  // Sets to.data[position][tile - range.first][channel] to B^T d B for the inputs d of each tile in range.
  void (*transform_input)(Batch<const S>, const Tiles&, Range range, Planes to);
  // Sets to.data[position][tile - range.first][channel] to A d A^T for the gradients d of the outputs of each tile.
  void (*transform_grad)(Batch<const S>, const Tiles&, Range range, Planes to);
  // Sets to[position][panel][in][output of the panel] to G g G^T for the weights g of the panels in `panels`.
  void (*transform_weight)(Weight<const S>, std::int64_t in, std::int64_t out, Range panels, float* to);
  // Computes the panels in `panels` of the outputs of the tiles in `range`. `inputs` and `weight` are transformed, and
  // scratch holds kPositions * range.size() * (channels of these panels) values. `bias` may be null.
  void (*outputs)(const Tiles&, Range range, Planes inputs, std::int64_t in, const float* weight, const float* bias,
                  Range panels, float* scratch, Batch<S>);
  // Adds to `to` the gradients of the weights between the inputs and the outputs in these ranges, summed over the tiles
  // in `range`. Scratch holds kPositions * ins.size() * outs.size() values.
  void (*grad_weight)(const Tiles&, Range range, Planes inputs, Planes grads, Range ins, Range outs, float* scratch,
                      Weight<float> to);
};

}  // namespace winograd
}  // namespace cpm_rcnn
