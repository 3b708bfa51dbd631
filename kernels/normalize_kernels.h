// Normalization of rows of an image for one instruction set. normalize_cpu.cpp includes this file once per instruction
// set, so it has no include guard. Before each include, define the macros of isa_begin.h.
//
// The compiler vectorizes the loops.

#include "isa_begin.h"

namespace cpm_rcnn {
namespace normalize {
namespace CPM_ISA {

#define CPM_INLINE inline __attribute__((always_inline))

// Rounded after the subtraction and after the division, as torch rounds.
CPM_INLINE float normalized(std::uint8_t value, float mean, float std) { return (float(value) - mean) / std; }

// The three channels of a row whose pixels are contiguous and have their channels together.
inline void interleaved_row(const std::uint8_t* __restrict from, std::int64_t width, const Channels& channels,
                            float* const* to) {
  const float mean0 = channels.mean[0], mean1 = channels.mean[1], mean2 = channels.mean[2];
  const float std0 = channels.std[0], std1 = channels.std[1], std2 = channels.std[2];
  float* __restrict to0 = to[0], * __restrict to1 = to[1], * __restrict to2 = to[2];
  for (std::int64_t x = 0; x < width; ++x) {
    to0[x] = normalized(from[3 * x], mean0, std0);
    to1[x] = normalized(from[3 * x + 1], mean1, std1);
    to2[x] = normalized(from[3 * x + 2], mean2, std2);
  }
}

// One channel of a row whose values are contiguous.
inline void plane_row(const std::uint8_t* __restrict from, std::int64_t width, float mean, float std,
                      float* __restrict to) {
  for (std::int64_t x = 0; x < width; ++x) to[x] = normalized(from[x], mean, std);
}

inline void rows(const Image& image, const Channels& channels, std::int64_t first, std::int64_t last) {
  for (std::int64_t y = first; y < last; ++y) {
    const std::uint8_t* const from = image.from + y * image.from_row;
    float* to[3];
    for (int c = 0; c < 3; ++c) to[c] = image.to[c] + y * image.to_row;
    if (image.interleaved)
      interleaved_row(from, image.width, channels, to);
    else
      for (int c = 0; c < 3; ++c)
        plane_row(from + c * image.from_plane, image.width, channels.mean[c], channels.std[c], to[c]);
  }
}

#undef CPM_INLINE

}  // namespace CPM_ISA
}  // namespace normalize
}  // namespace cpm_rcnn

#include "isa_end.h"
