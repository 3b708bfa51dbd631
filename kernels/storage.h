// Types in which the values of a tensor are stored and computed.
// Nothing in this file depends on torch or on the instruction set.
#pragma once

#include <cstdint>

namespace cpm_rcnn {

// A storage type. All arithmetic on its values is in float32.
struct BFloat16 {
  std::uint16_t bits;
};

// The type in which values of a storage type are computed.
template <typename S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

}  // namespace cpm_rcnn
