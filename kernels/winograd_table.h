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

// A weight (out, in, 3, 3) in memory. The strides are in elements.
template <typename S>
struct Weight {
  S* data;
  std::int64_t out, in, row, column;
};

// A transformed weight has one of these matrices for each position: [panel][in][output of the panel]. The number of
// values is such that the matrices begin in different sets of a cache.
inline std::int64_t weight_position(std::int64_t in, std::int64_t out) { return in * out + 16; }
inline std::int64_t weight_values(std::int64_t in, std::int64_t out) { return kPositions * weight_position(in, out); }

// Matrices of one row per tile, one for each position. The strides are in elements.
struct Planes {
  float* data;
  std::int64_t position, tile;
};

template <typename S>
struct KernelTable {
  int panel;  // the output channels of a panel of transformed weights

  // Sets to.data[position][tile - range.first][channel] to B^T d B for the inputs d of each tile in range.
  void (*transform_input)(Batch<const S>, const Tiles&, Range range, Planes to);
  // Sets to.data[position][tile - range.first][channel] to A d A^T for the gradients d of the outputs of each tile.
  void (*transform_grad)(Batch<const S>, const Tiles&, Range range, Planes to);
  // Computes the panels in `panels` of a transformed weight: G g G^T for its weights g.
  void (*transform_weight)(Weight<const S>, std::int64_t in, std::int64_t out, Range panels, float* to);
  // Computes these panels of the outputs of the tiles in `range`. `inputs` and `weight` are transformed, and scratch
  // holds kPositions * range.size() * panels.size() * panel values. `bias` may be null.
  void (*outputs)(const Tiles&, Range range, Planes inputs, std::int64_t in, const float* weight, const float* bias,
                  Range panels, float* scratch, Batch<S>);
  // Adds to to[3][3][in][out] the gradients of the weights between these inputs and the outputs of these panels, summed
  // over the tiles in `range`. `inputs` and `grads` are transformed, and scratch holds kPositions * ins.size() *
  // panels.size() * panel values.
  void (*grad_weight)(const Tiles&, Range range, Planes inputs, std::int64_t in, Planes grads, std::int64_t out,
                      Range ins, Range panels, float* scratch, float* to);
};

}  // namespace winograd
}  // namespace cpm_rcnn
