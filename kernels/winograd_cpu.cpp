// 3x3 convolution with stride 1 and padding 1 on a CPU by Winograd's algorithm F(4x4, 3x3): the operators
// cpm_rcnn_cpu::conv3x3, conv3x3_grad_input and conv3x3_grad_weight.
//
// A tile of 4x4 outputs needs 36 products per pair of an input and an output channel in place of 144. These are 36
// matrix products, one for each position of the transformed tiles, whose rows are tiles. The tiles are processed in
// blocks. For each block, the threads
//   1. transform the inputs of all tiles, and wait for each other;
//   2. take some tiles and some output channels at a time, compute all positions, and transform the sums to outputs.
// The gradient of the input is the convolution of the output's gradient with the rotated weight. For the gradient of
// the weight, the threads transform the input and the output's gradient, and then take some pairs of channels at a
// time.
//
// All arithmetic is in float32, also for bfloat16 tensors, whose weights may be float32. The order of each sum depends
// only on the sizes and the number of threads.

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

// ------------------------------------------------------------------------------------------------- memory and threads

// Memory that a thread keeps for its next convolution: the system takes longer to provide new pages than the transforms
// take to fill them.
class Workspace {
 public:
  explicit Workspace(std::int64_t values) {
    thread_local at::Tensor kept;
    if (!kept.defined() || kept.numel() < values) {
      kept.reset();
      kept = in_large_pages(at::empty({values}, at::kFloat));
    }
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

// Matrices of `tiles` rows for each position. Their strides are odd numbers of cache lines, because multiples of a
// large power of two would put the same element of many rows or positions into one set of a cache.
struct Layout {
  Layout(std::int64_t channels, std::int64_t tiles) : tile((channels / 16 | 1) * 16), position(tile * (tiles | 1)) {}
  std::int64_t values() const { return kPositions * position; }
  std::int64_t tile, position;
};

// Part `i` of `parts` of almost equal sizes.
Range part(Range range, std::int64_t parts, std::int64_t i) {
  return {range.first + range.size() * i / parts, range.first + range.size() * (i + 1) / parts};
}

// Calls f(range, worker) on the threads for parts of a range, which have almost equal sizes of at most `most`.
template <typename F>
void for_each_part(Range range, std::int64_t most, const F& f) {
  const std::int64_t parts = divide_up(range.size(), most);
  Counter counter(parts);
  for_each_worker(std::min<std::int64_t>(at::get_num_threads(), parts), [&](std::int64_t worker) {
    for (std::int64_t i; counter.next(i);) f(part(range, parts, i), worker);
  });
}

// Calls f(left, right, worker) on the threads for all pairs of parts of two ranges.
template <typename F>
void for_each_pair_of_parts(Range left, std::int64_t most_left, Range right, std::int64_t most_right, const F& f) {
  const std::int64_t parts_left = divide_up(left.size(), most_left), parts_right = divide_up(right.size(), most_right);
  for_each_part({0, parts_left * parts_right}, 1, [&](Range pair, std::int64_t worker) {
    f(part(left, parts_left, pair.first / parts_right), part(right, parts_right, pair.first % parts_right), worker);
  });
}

// The transformed tiles of a block should stay in the cache that the cores share, and the sums of one step in the cache
// of a core.
constexpr std::int64_t kBlockValues = 1 << 21, kBlockValuesPerThread = 1 << 19;
constexpr std::int64_t kStepTiles = 112, kStepChannels = 128, kGradStepChannels = 96, kTransformTiles = 8;

// The number of tiles in each of almost equal blocks.
std::int64_t tiles_per_block(std::int64_t tiles, std::int64_t channels) {
  const std::int64_t values = std::max(kBlockValues, kBlockValuesPerThread * at::get_num_threads());
  const std::int64_t most = std::max<std::int64_t>(values / (kPositions * channels), 1);
  return divide_up(tiles, divide_up(tiles, most));
}

// --------------------------------------------------------------------------------------------------------- convolution

// A view of a channels-last tensor.
template <typename S>
Batch<S> batch(const at::Tensor& tensor) {
  return {static_cast<S*>(const_cast<void*>(tensor.const_data_ptr())), tensor.size(1), tensor.size(2), tensor.size(3)};
}

at::Tensor channels_last(const at::Tensor& tensor) { return tensor.contiguous(at::MemoryFormat::ChannelsLast); }

at::Tensor empty_channels_last(const at::Tensor& like, std::int64_t channels) {
  const auto options = like.options().memory_format(at::MemoryFormat::ChannelsLast);
  return in_large_pages(at::empty({like.size(0), channels, like.size(2), like.size(3)}, options));
}

template <typename S>
Weight<const S> view(const at::Tensor& weight) {
  return {static_cast<const S*>(weight.const_data_ptr()), weight.stride(0), weight.stride(1), weight.stride(2),
          weight.stride(3)};
}

// The weight of the convolution that computes the gradient of the input from the gradient of the output.
template <typename S>
Weight<const S> rotated_view(const at::Tensor& weight) {
  const Weight<const S> w = view<S>(weight);
  return {w.data + (kTaps - 1) * (w.row + w.column), w.in, w.out, -w.row, -w.column};
}

// Tiles [range.first, range.last) of planes whose first tile is `first`.
Planes from_tile(Planes planes, std::int64_t first, Range range) {
  planes.data += (range.first - first) * planes.tile;
  return planes;
}

// Convolves a channels-last input with a weight. `bias` may be null.
template <typename S, typename W>
at::Tensor convolve(const at::Tensor& input, Weight<const W> weight, std::int64_t out, const float* bias) {
  const KernelTable<S>& table = kernels<S>();
  const at::Tensor output = empty_channels_last(input, out);
  const std::int64_t in = input.size(1), panels = out / table.panel;
  const Tiles tiles(input.size(0), input.size(2), input.size(3));
  if (tiles.count() == 0) return output;
  const std::int64_t block = tiles_per_block(tiles.count(), in);
  const Layout layout(in, block);
  const std::int64_t sums = kPositions * kStepTiles * kStepChannels;
  Workspace workspace(weight_values(in, out) + layout.values() + at::get_num_threads() * sums);
  float* const weights = workspace.take(weight_values(in, out));
  const Planes inputs{workspace.take(layout.values()), layout.position, layout.tile};
  float* const scratch = workspace.take(at::get_num_threads() * sums);
  for_each_part({0, panels}, 1,
                [&](Range some, std::int64_t) { kernels<W>().transform_weight(weight, in, out, some, weights); });
  for (std::int64_t first = 0; first < tiles.count(); first += block) {
    const Range range{first, std::min(first + block, tiles.count())};
    for_each_part(range, kTransformTiles, [&](Range some, std::int64_t) {
      table.transform_input(batch<const S>(input), tiles, some, from_tile(inputs, first, some));
    });
    // The panels come first, so that the threads share the weights of a part.
    for_each_pair_of_parts({0, panels}, kStepChannels / table.panel, range, kStepTiles,
                           [&](Range some_panels, Range some, std::int64_t worker) {
                             table.outputs(tiles, some, from_tile(inputs, first, some), in, weights, bias, some_panels,
                                           scratch + worker * sums, batch<S>(output));
                           });
  }
  return output;
}

// Sets to[out][in][3][3] to from[3][3][in][out].
template <typename S>
void reorder_weight(const float* from, std::int64_t in, std::int64_t out, S* to) {
  constexpr std::int64_t taps = kTaps * kTaps, few = 16;  // a cache line of outputs
  for_each_part({0, out}, few, [&](Range outs, std::int64_t) {
    for (std::int64_t i = 0; i < in; ++i)
      for (std::int64_t o = outs.first; o < outs.last; ++o)
        for (std::int64_t tap = 0; tap < taps; ++tap) to[(o * in + i) * taps + tap] = S(from[(tap * in + i) * out + o]);
  });
}

// The gradient of the weight, from a channels-last input and gradient of the output, as a (3, 3, in, out) tensor.
template <typename S>
at::Tensor grad_weight(const at::Tensor& grad_output, const at::Tensor& input) {
  const KernelTable<S>& table = kernels<S>();
  const std::int64_t in = input.size(1), out = grad_output.size(1);
  const at::Tensor result = at::zeros({kTaps, kTaps, in, out}, at::kFloat);
  const Tiles tiles(input.size(0), input.size(2), input.size(3));
  if (tiles.count() == 0) return result;
  const std::int64_t block = tiles_per_block(tiles.count(), std::max(in, out));
  const Layout left(in, block), right(out, block);
  const std::int64_t sums = kPositions * kGradStepChannels * kGradStepChannels;
  Workspace workspace(left.values() + right.values() + at::get_num_threads() * sums);
  const Planes inputs{workspace.take(left.values()), left.position, left.tile};
  const Planes grads{workspace.take(right.values()), right.position, right.tile};
  float* const scratch = workspace.take(at::get_num_threads() * sums);
  for (std::int64_t first = 0; first < tiles.count(); first += block) {
    const Range range{first, std::min(first + block, tiles.count())};
    for_each_part(range, kTransformTiles, [&](Range some, std::int64_t) {
      table.transform_input(batch<const S>(input), tiles, some, from_tile(inputs, first, some));
      table.transform_grad(batch<const S>(grad_output), tiles, some, from_tile(grads, first, some));
    });
    for_each_pair_of_parts({0, in}, kGradStepChannels, {0, out / table.panel}, kGradStepChannels / table.panel,
                           [&](Range ins, Range panels, std::int64_t worker) {
                             table.grad_weight(tiles, range, inputs, in, grads, out, ins, panels,
                                               scratch + worker * sums, result.data_ptr<float>());
                           });
  }
  return result;
}

// ---------------------------------------------------------------------------------------------------------- operators

template <typename F>
at::Tensor with_stored_type(const at::Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kFloat) return f(float());
  TORCH_CHECK(tensor.scalar_type() == at::kBFloat16, "conv3x3: the tensors must be float32 or bfloat16, got ",
              tensor.scalar_type());
  return f(BFloat16());
}

void check_batch(const char* name, const at::Tensor& batch, std::int64_t channels) {
  TORCH_CHECK(batch.dim() == 4 && batch.size(1) == channels, "conv3x3: ", name, " must be (N, ", channels,
              ", H, W), got ", batch.sizes());
  TORCH_CHECK(channels > 0 && channels % kChannelMultiple == 0, "conv3x3: ", name, " has ", channels,
              " channels: must be a multiple of ", kChannelMultiple);
  TORCH_CHECK(batch.device().is_cpu(), "conv3x3: all tensors must be on the CPU");
}

void check_weight(const at::Tensor& weight, const at::Tensor& batch) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == kTaps && weight.size(3) == kTaps,
              "conv3x3: weight must be (C_out, C_in, 3, 3), got ", weight.sizes());
  TORCH_CHECK(weight.size(0) % kChannelMultiple == 0 && weight.size(1) % kChannelMultiple == 0, "conv3x3: weight is ",
              weight.sizes(), ": its channels must be multiples of ", kChannelMultiple);
  TORCH_CHECK(weight.device().is_cpu(), "conv3x3: all tensors must be on the CPU");
  TORCH_CHECK(weight.scalar_type() == batch.scalar_type() || weight.scalar_type() == at::kFloat,
              "conv3x3: weight must be float32 or have the dtype of the other tensors, got ", weight.scalar_type(),
              " and ", batch.scalar_type());
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const c10::optional<at::Tensor>& bias) {
  check_weight(weight, input);
  check_batch("input", input, weight.size(1));
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->device().is_cpu()),
              "conv3x3: bias must be (", weight.size(0), ",) on the CPU");
  const at::Tensor shift = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  return with_stored_type(input, [&](auto stored) {
    return with_stored_type(weight, [&](auto stored_weight) {
      return convolve<decltype(stored)>(channels_last(input), view<decltype(stored_weight)>(weight), weight.size(0),
                                        bias ? shift.const_data_ptr<float>() : nullptr);
    });
  });
}

at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& weight) {
  check_weight(weight, grad_output);
  check_batch("grad_output", grad_output, weight.size(0));
  return with_stored_type(grad_output, [&](auto stored) {
    return with_stored_type(weight, [&](auto stored_weight) {
      return convolve<decltype(stored)>(channels_last(grad_output), rotated_view<decltype(stored_weight)>(weight),
                                        weight.size(1), nullptr);
    });
  });
}

at::Tensor grad_weight_of(const at::Tensor& grad_output, const at::Tensor& input, at::ScalarType dtype) {
  TORCH_CHECK(input.dim() == 4 && grad_output.dim() == 4 && input.size(0) == grad_output.size(0) &&
                  input.size(2) == grad_output.size(2) && input.size(3) == grad_output.size(3),
              "conv3x3: grad_output is ", grad_output.sizes(), " but input is ", input.sizes());
  TORCH_CHECK(input.scalar_type() == grad_output.scalar_type(),
              "conv3x3: input and grad_output must have one dtype, got ", input.scalar_type(), " and ",
              grad_output.scalar_type());
  check_batch("input", input, input.size(1));
  check_batch("grad_output", grad_output, grad_output.size(1));
  const at::Tensor grad = with_stored_type(input, [&](auto stored) {
    return grad_weight<decltype(stored)>(channels_last(grad_output), channels_last(input));
  });
  const std::int64_t in = input.size(1), out = grad_output.size(1);
  const at::Tensor result = at::empty({out, in, kTaps, kTaps}, input.options().dtype(dtype));
  if (dtype == at::kFloat)
    reorder_weight(grad.const_data_ptr<float>(), in, out, result.data_ptr<float>());
  else
    reorder_weight(grad.const_data_ptr<float>(), in, out, result.data_ptr<at::BFloat16>());
  return result;
}

}  // namespace
}  // namespace winograd
}  // namespace cpm_rcnn

TORCH_LIBRARY_FRAGMENT(cpm_rcnn_cpu, m) {
  m.def("conv3x3(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("conv3x3_grad_input(Tensor grad_output, Tensor weight) -> Tensor");
  m.def("conv3x3_grad_weight(Tensor grad_output, Tensor input, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(cpm_rcnn_cpu, CPU, m) {
  m.impl("conv3x3", cpm_rcnn::winograd::forward);
  m.impl("conv3x3_grad_input", cpm_rcnn::winograd::grad_input);
  m.impl("conv3x3_grad_weight", cpm_rcnn::winograd::grad_weight_of);
}
