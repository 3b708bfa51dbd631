// The sizes of a deformable convolution, and the division of its channels into units of work.
// Nothing in this file depends on torch or on the instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "storage.h"

namespace cpm_rcnn {

struct Problem {
  std::int64_t images, in_channels, height, width;
  std::int64_t out_channels, out_height, out_width;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::int64_t groups, offset_groups;

  std::int64_t taps() const { return kernel_h * kernel_w; }
  std::int64_t pixels() const { return out_height * out_width; }
  std::int64_t in_per_group() const { return in_channels / groups; }
  std::int64_t out_per_group() const { return out_channels / groups; }

  // A unit's channels are packed into a plane [pixel][channel] with a border of zeros, so that all four corners of
  // every sample that touches the image can be read. Consecutive rows share one border pixel: the zero to the right of
  // a row is also the zero to the left of the next row. Two more zero pixels follow the last row of zeros: a sample
  // that lies entirely outside the image reads this row and these pixels (see outside_index()).
  std::int64_t packed_row() const { return width + 1; }
  std::int64_t packed_index(std::int64_t y, std::int64_t x) const { return (y + 1) * packed_row() + x + 1; }
  std::int64_t outside_index() const { return (height + 1) * packed_row(); }
  std::int64_t packed_pixels() const { return (height + 2) * packed_row() + 2; }
};

// A batch of images in memory. `image`, `channel`, `row` and `column` are strides in elements.
template <typename S>
struct View {
  S* data;
  std::int64_t image, channel, row, column;
};

// One bilinear sample. `corner` is the index of its upper left corner in the packed plane, in pixels. `weight` holds
// the weights of the upper left, upper right, lower left and lower right corners, each multiplied by the factor `mask`.
// The weights follow from `fraction_y` and `fraction_x`, the position of the sample relative to its upper left corner.
template <typename T>
struct Tap {
  T weight[4];
  T fraction_y, fraction_x, mask;
  std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t> corner;
};

// The channels of a unit that belong to one group of the convolution.
struct Segment {
  std::int64_t first_row;      // its first channel, relative to the unit's first channel
  std::int64_t channels;       // number of channels
  std::int64_t group_channel;  // its first channel, relative to the group's first channel
  std::int64_t first_output;   // the group's first output channel
};

// Channels that are packed together. All belong to one offset group, and they fit in one block of lanes.
struct Unit {
  std::int64_t offset_group, first_channel, channels;
  std::vector<Segment> segments;
  std::int64_t first_output() const { return segments.front().first_output; }
};

struct Plan {
  std::vector<Unit> units;       // ordered by offset group
  bool whole_groups = true;      // no group is split, so one unit computes each output channel
  std::int64_t most_groups = 1;  // largest number of groups in one unit
};

inline Plan make_plan(const Problem& problem, std::int64_t width) {
  Plan plan;
  const std::int64_t per_group = problem.in_per_group();
  const std::int64_t per_offset_group = problem.in_channels / problem.offset_groups;
  for (std::int64_t offset_group = 0; offset_group < problem.offset_groups; ++offset_group) {
    std::int64_t channel = offset_group * per_offset_group;
    const std::int64_t end = channel + per_offset_group;
    while (channel < end) {
      const std::int64_t inside = channel % per_group;
      // Take as many whole groups as fit. If not even one fits, take the part of a group that does.
      std::int64_t count = inside == 0 ? std::min(width, end - channel) / per_group * per_group : 0;
      if (count == 0) count = std::min({width, end - channel, per_group - inside});
      Unit unit{offset_group, channel, count, {}};
      for (std::int64_t row = 0; row < count;) {
        const std::int64_t group = (channel + row) / per_group, from = (channel + row) % per_group;
        const std::int64_t channels = std::min(per_group - from, count - row);
        unit.segments.push_back({row, channels, from, group * problem.out_per_group()});
        plan.whole_groups = plan.whole_groups && channels == per_group;
        row += channels;
      }
      plan.most_groups = std::max<std::int64_t>(plan.most_groups, unit.segments.size());
      plan.units.push_back(std::move(unit));
      channel += count;
    }
  }
  return plan;
}

}  // namespace cpm_rcnn
