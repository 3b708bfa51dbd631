// What the deformable convolution is asked to do, and how its channels are cut into units of work.
// Plain data: nothing here depends on torch or on the instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cpm_rcnn {

// Sixteen bits of storage; every calculation is in float32.
struct BFloat16 {
  std::uint16_t bits;
};

// The type that a stored type is calculated in.
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

struct Problem {
  std::int64_t images, in_channels, height, width;
  std::int64_t out_channels, out_height, out_width;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::int64_t groups, offset_groups;

  std::int64_t taps() const { return kernel_h * kernel_w; }
  std::int64_t pixels() const { return out_height * out_width; }
  std::int64_t in_per_group() const { return in_channels / groups; }
  std::int64_t out_per_group() const { return out_channels / groups; }

  // A unit's channels are packed as [pixel][channel] with a border of zeros, so that the four corners of every sample
  // that touches the image are there to be read. Rows share their border: the zero right of a row is the zero left of
  // the next. The last row of zeros is followed by two more, for the samples that lie wholly outside.
  std::int64_t packed_row() const { return width + 1; }
  std::int64_t packed_index(std::int64_t y, std::int64_t x) const { return (y + 1) * packed_row() + x + 1; }
  std::int64_t outside_index() const { return (height + 1) * packed_row(); }
  std::int64_t packed_pixels() const { return (height + 2) * packed_row() + 2; }
};

// An image tensor in memory; strides in elements.
template <typename S>
struct View {
  S* data;
  std::int64_t image, channel, row, column;
};

// One bilinear sample: where its upper left corner lies in the packed plane (in pixels), the weights of the corners
// (upper left, upper right, lower left, lower right, the mask's factor included), the fractions that they come from
// and the mask's factor.
template <typename T>
struct Tap {
  T weight[4];
  T fraction_y, fraction_x, mask;
  std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t> corner;
};

// The part of a unit that belongs to one group of the convolution.
struct Segment {
  std::int64_t first_row;      // its first channel, counted from the unit's first
  std::int64_t channels;       // how many
  std::int64_t group_channel;  // its first channel, counted from the group's first
  std::int64_t first_output;   // the group's first output channel
};

// Channels that are packed together, at most as many as the block of lanes is wide, all of one offset group.
struct Unit {
  std::int64_t offset_group, first_channel, channels;
  std::vector<Segment> segments;
  std::int64_t first_output() const { return segments.front().first_output; }
};

struct Plan {
  std::vector<Unit> units;       // by offset group
  bool whole_groups = true;      // no group is cut: every output channel is made by one unit
  std::int64_t most_groups = 1;  // in one unit
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
      // As many whole groups as fit, or else as much of one group as fits.
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
