// 3x3 convolution with stride 1 and padding 1 on a CPU by Winograd's algorithm F(4x4, 3x3): the operators
// cpm_rcnn_cpu::conv3x3, conv3x3_grad_input and conv3x3_grad_weight.
//
// A tile of 4x4 outputs needs 36 products per pair of an input and an output channel in place of 144. These are 36
// matrix products, one for each position of the transformed tiles, whose rows are tiles. The tiles are processed in
// blocks. For each block, the threads
//   1. transform the inputs of all tiles, and wait for each other;
//   2. take some tiles and some output channels at a time, compute all positions, and transform the sums to outputs.
// The gradient of the input is the convolution of the output's gradient with the rotated weight. For the gradient of the
// weight, the threads transform the input and the output's gradient, and then take some pairs of channels at a time.
//
// All arithmetic is in float32, also for bfloat16 tensors. Each sum has one order, whatever the number of threads.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "instruction_set.h"
#include "winograd_table.h"
#include "workers.h"

#define CPM_ISA portable
#define CPM_VECTOR_BYTES 16
#include "winograd_kernels.h"

#if CPM_X86
#define CPM_ISA avx2
#define CPM_TARGET "avx2,fma"
#define CPM_VECTOR_BYTES 32
#include "winograd_kernels.h"

#define CPM_ISA avx512
#define CPM_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#define CPM_VECTOR_BYTES 64
#include "winograd_kernels.h"
#endif  // x86-64

namespace cpm_rcnn {
namespace winograd {
namespace {

std::int64_t env(const char* name, std::int64_t value) { const char* t = std::getenv(name); return t ? std::atoll(t) : value; }

// Returns the kernels of the best instruction set.
template <typename S>
const KernelTable<S>& kernels() {
  static const KernelTable<S> table = [] {
#if CPM_X86
    switch (best_instruction_set()) {
      case InstructionSet::avx512:
        return avx512::make_table<S>();
      case InstructionSet::avx2:
        return avx2::make_table<S>();
      case InstructionSet::portable:
        break;
    }
#endif
    return portable::make_table<S>();
  }();
  return table;
}

// Memory that a thread keeps for its next convolution, because the system takes longer to provide new pages than the
// transforms take to fill them.
class Workspace {
 public:
  explicit Workspace(std::int64_t values) {
    thread_local at::Tensor kept;
    if (!kept.defined() || kept.numel() < values) kept.reset(), kept = in_large_pages(at::empty({values}, at::kFloat));
    next_ = kept.data_ptr<float>();
  }
  float* take(std::int64_t values) {
    float* const taken = next_;
    next_ += values;
    return taken;
  }

 private:
  float* next_;
};

// Row and plane strides that spread the rows and planes over the sets of a cache.
struct Pitch {
  std::int64_t tile, position;
  Pitch(std::int64_t channels, std::int64_t tiles) : tile(odd(channels)), position(tile * (tiles | 1)) {}
  static std::int64_t odd(std::int64_t channels) { return (channels / 16 | 1) * 16; }
};

template <typename S>
Batch<S> batch(const at::Tensor& tensor) {
  return {static_cast<S*>(const_cast<void*>(tensor.const_data_ptr())), tensor.size(1), tensor.size(2), tensor.size(3)};
}

at::Tensor channels_last(const at::Tensor& tensor) { return tensor.contiguous(at::MemoryFormat::ChannelsLast); }

std::int64_t tiles_per_block(std::int64_t tiles, std::int64_t channels) {
  static const std::int64_t kBlockBytes = env("WB", 8) << 20;
  const std::int64_t most = std::max<std::int64_t>(kBlockBytes / (kPositions * 4 * channels), 1);
  return divide_up(tiles, divide_up(tiles, most));
}

template <typename F>
void for_each_share(Range range, std::int64_t each, const F& f) {
  Counter counter(divide_up(range.size(), each));
  for_each_worker(std::min<std::int64_t>(at::get_num_threads(), divide_up(range.size(), each)), [&](std::int64_t) {
    for (std::int64_t i; counter.next(i);)
      f(Range{range.first + i * each, std::min(range.first + (i + 1) * each, range.last)});
  });
}

constexpr std::int64_t kTransformTiles = 8;

// Convolves a channels-last input with a transformed weight.
template <typename S>
void convolve(const at::Tensor& input, Weight<const S> weight, const float* bias, const at::Tensor& output) {
  const KernelTable<S>& table = kernels<S>();
  const std::int64_t in = input.size(1), out = output.size(1), threads = at::get_num_threads();
  const Tiles tiles({input.size(0), in, out, input.size(2), input.size(3)});
  if (tiles.count() == 0) return;
  const std::int64_t block = tiles_per_block(tiles.count(), in);
  const Pitch pitch(in, block);
  static const std::int64_t kTiles = env("WT", 112), kChannels = env("WC", 96);
  const std::int64_t sub = std::min(kTiles, block), group = std::min(kChannels / table.panel, out / table.panel);
  const std::int64_t groups = divide_up(out / table.panel, group), subs = divide_up(block, sub);
  const std::int64_t scratch_size = kPositions * sub * group * table.panel;
  Workspace workspace(kPositions * (weight_plane(in, out) + pitch.position) + threads * scratch_size);
  float* const transformed_weight = workspace.take(kPositions * weight_plane(in, out));
  const Planes inputs{workspace.take(kPositions * pitch.position), pitch.position, pitch.tile};
  float* const scratch = workspace.take(threads * scratch_size);
  for_each_share({0, out / table.panel}, 1,
                 [&](Range panels) { table.transform_weight(weight, in, out, panels, transformed_weight); });
  for (std::int64_t first = 0; first < tiles.count(); first += block) {
    const Range range{first, std::min(first + block, tiles.count())};
    for_each_share(range, kTransformTiles, [&](Range some) {
      Planes to = inputs;
      to.data += (some.first - first) * to.tile;
      table.transform_input(batch<const S>(input), tiles, some, to);
    });
    Counter counter(groups * subs);
    for_each_worker(std::min(threads, groups * subs), [&](std::int64_t worker) {
      for (std::int64_t i; counter.next(i);) {
        const std::int64_t g = i / subs, t = i % subs;
        const Range some{std::min(first + t * sub, range.last), std::min(first + (t + 1) * sub, range.last)};
        Planes from = inputs;
        from.data += (some.first - first) * from.tile;
        table.outputs(tiles, some, from, in, transformed_weight, bias,
                      {g * group, std::min((g + 1) * group, out / table.panel)}, scratch + worker * scratch_size,
                      batch<S>(output));
      }
    });
  }
}

template <typename F>
auto with_stored_type(const at::Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return f(float());
    case at::kBFloat16:
      return f(BFloat16());
    default:
      TORCH_CHECK(false, "conv3x3: the kernel supports float32 and bfloat16, got ", tensor.scalar_type());
  }
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const c10::optional<at::Tensor>& bias) {
  const at::Tensor last = channels_last(input);
  const at::Tensor output = in_large_pages(at::empty({input.size(0), weight.size(0), input.size(2), input.size(3)},
                                      input.options().memory_format(at::MemoryFormat::ChannelsLast)));
  const at::Tensor shift = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  with_stored_type(input, [&](auto stored) {
    using S = decltype(stored);
    convolve<S>(last, {static_cast<const S*>(weight.const_data_ptr()), weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
                bias ? shift.const_data_ptr<float>() : nullptr, output);
  });
  return output;
}

}  // namespace
}  // namespace winograd
}  // namespace cpm_rcnn

TORCH_LIBRARY_FRAGMENT(cpm_rcnn_cpu, m) {
  m.def("conv3x3(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(cpm_rcnn_cpu, CPU, m) { m.impl("conv3x3", cpm_rcnn::winograd::forward); }
