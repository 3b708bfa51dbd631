// Deformable convolution on a CPU: the operators cpm_rcnn_cpu::deform_conv2d and deform_conv2d_backward. Semantics and
// border rules are those of torchvision.ops.deform_conv2d: one (dy, dx) offset pair per tap, offset groups, groups and
// an optional mask. The operators have no bias; the caller adds it.
//
// Forward processes one unit of channels at a time (see deform_conv_problem.h):
//   1. It packs the unit's input as [pixel][channel].
//   2. For each tile of output pixels it samples every tap. Each corner of a sample is one contiguous run of channels.
//   3. It transposes the samples into columns whose lanes are pixels, and multiplies these by broadcast weights.
// Backward takes the same steps, with one tap at a time. Each of its threads owns the units that it processes, so the
// gradients of the input and the weight need no locks. The gradients of the offsets are summed over the threads at the
// end.
//
// Each thread holds only one tile of one unit's column matrix. For a given number of threads, sums are always computed
// in the same order.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "deform_conv_problem.h"
#include "deform_conv_table.h"
#include "instruction_set.h"
#include "workers.h"

// deform_conv_isa.h compiles the same kernels once for each instruction set; kernels() below picks one at run time.
#define CPM_ISA portable
#define CPM_VECTOR_BYTES 16
#define CPM_BF16_DOT 0
#include "deform_conv_isa.h"

#if CPM_X86
#define CPM_ISA avx2
#define CPM_TARGET "avx2,fma"
#define CPM_VECTOR_BYTES 32
#define CPM_BF16_DOT 0
#include "deform_conv_isa.h"

#define CPM_ISA avx512
#define CPM_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#define CPM_VECTOR_BYTES 64
#define CPM_BF16_DOT 0
#include "deform_conv_isa.h"

#define CPM_ISA avx512_bf16
#define CPM_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16"
#define CPM_VECTOR_BYTES 64
#define CPM_BF16_DOT 1
#include "deform_conv_isa.h"
#endif  // x86-64

namespace cpm_rcnn {
namespace {

// Of input, offset, mask and weight. A gradient that is not needed is an undefined tensor.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// ------------------------------------------------------------------------------------------------------- dispatch

// Returns the kernels of the best instruction set.
template <typename S>
const KernelTable<S>& kernels() {
  static const KernelTable<S> table = [] {
#if CPM_X86
    switch (best_instruction_set()) {
      case InstructionSet::avx512:
        if constexpr (std::is_same_v<S, BFloat16>)
          if (__builtin_cpu_supports("avx512bf16")) return avx512_bf16::make_table<S>();
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

template <typename S>
constexpr at::ScalarType kScalarType = at::kFloat;
template <>
constexpr at::ScalarType kScalarType<double> = at::kDouble;
template <>
constexpr at::ScalarType kScalarType<BFloat16> = at::kBFloat16;

// --------------------------------------------------------------------------------------------------------- arguments

Problem make_problem(const at::Tensor& input, const at::Tensor& offset, const c10::optional<at::Tensor>& mask,
                     const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation) {
  TORCH_CHECK(input.dim() == 4, "deform_conv2d: input must have 4 dimensions, got ", input.dim());
  TORCH_CHECK(offset.dim() == 4, "deform_conv2d: offset must have 4 dimensions, got ", offset.dim());
  TORCH_CHECK(weight.dim() == 4, "deform_conv2d: weight must have 4 dimensions, got ", weight.dim());
  TORCH_CHECK(!mask || mask->dim() == 4, "deform_conv2d: mask must have 4 dimensions");
  TORCH_CHECK(offset.scalar_type() == input.scalar_type() && weight.scalar_type() == input.scalar_type() &&
                  (!mask || mask->scalar_type() == input.scalar_type()),
              "deform_conv2d: input, offset, mask and weight must have one dtype, got input ", input.scalar_type(),
              ", offset ", offset.scalar_type(), ", weight ", weight.scalar_type());
  TORCH_CHECK(offset.device().is_cpu() && weight.device().is_cpu() && (!mask || mask->device().is_cpu()),
              "deform_conv2d: all tensors must be on the CPU");
  for (const auto& pair : {stride, padding, dilation})
    TORCH_CHECK(pair.size() == 2, "deform_conv2d: stride, padding and dilation must be pairs");
  Problem p;
  p.images = input.size(0), p.in_channels = input.size(1), p.height = input.size(2), p.width = input.size(3);
  p.out_channels = weight.size(0), p.kernel_h = weight.size(2), p.kernel_w = weight.size(3);
  p.stride_h = stride[0], p.stride_w = stride[1], p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  TORCH_CHECK(p.kernel_h > 0 && p.kernel_w > 0, "deform_conv2d: kernel size must be positive, got ", p.kernel_h, "x",
              p.kernel_w);
  TORCH_CHECK(p.stride_h > 0 && p.stride_w > 0, "deform_conv2d: stride must be positive, got ", stride);
  TORCH_CHECK(p.pad_h >= 0 && p.pad_w >= 0, "deform_conv2d: padding must not be negative, got ", padding);
  TORCH_CHECK(p.dilation_h > 0 && p.dilation_w > 0, "deform_conv2d: dilation must be positive, got ", dilation);
  TORCH_CHECK(weight.size(1) > 0 && p.in_channels > 0 && p.in_channels % weight.size(1) == 0,
              "deform_conv2d: input has ", p.in_channels,
              " channels, not a multiple of weight.size(1) = ", weight.size(1));
  p.groups = p.in_channels / weight.size(1);
  TORCH_CHECK(p.out_channels > 0 && p.out_channels % p.groups == 0, "deform_conv2d: weight has ", p.out_channels,
              " output channels, not a multiple of ", p.groups, " groups");
  TORCH_CHECK(offset.size(1) > 0 && offset.size(1) % (2 * p.taps()) == 0,
              "deform_conv2d: offset.size(1) = ", offset.size(1),
              " is not a multiple of 2 * kernel height * kernel width = ", 2 * p.taps());
  p.offset_groups = offset.size(1) / (2 * p.taps());
  TORCH_CHECK(p.in_channels % p.offset_groups == 0, "deform_conv2d: input has ", p.in_channels,
              " channels, not a multiple of ", p.offset_groups, " offset groups");
  // The distances from the first to the last row and column where the kernel fits. Division would round them up to
  // zero.
  const std::int64_t last_y = p.height + 2 * p.pad_h - (p.dilation_h * (p.kernel_h - 1) + 1);
  const std::int64_t last_x = p.width + 2 * p.pad_w - (p.dilation_w * (p.kernel_w - 1) + 1);
  TORCH_CHECK(last_y >= 0 && last_x >= 0, "deform_conv2d: kernel is larger than the padded input of ",
              p.height + 2 * p.pad_h, "x", p.width + 2 * p.pad_w);
  p.out_height = last_y / p.stride_h + 1, p.out_width = last_x / p.stride_w + 1;
  TORCH_CHECK(offset.size(0) == p.images && (!mask || mask->size(0) == p.images), "deform_conv2d: input has ", p.images,
              " images, but offset has ", offset.size(0));
  TORCH_CHECK(offset.size(2) == p.out_height && offset.size(3) == p.out_width, "deform_conv2d: offset is ",
              offset.size(2), "x", offset.size(3), " but the output is ", p.out_height, "x", p.out_width);
  if (mask) {
    TORCH_CHECK(mask->size(1) == p.offset_groups * p.taps(), "deform_conv2d: mask.size(1) = ", mask->size(1),
                " is not offset groups * kernel height * kernel width = ", p.offset_groups * p.taps());
    TORCH_CHECK(mask->size(2) == p.out_height && mask->size(3) == p.out_width, "deform_conv2d: mask is ", mask->size(2),
                "x", mask->size(3), " but the output is ", p.out_height, "x", p.out_width);
  }
  return p;
}

// Checks that a Tap can hold the index of every pixel of the packed plane.
template <typename S>
void check_corners(const Problem& p) {
  using Corner = decltype(Tap<Compute<S>>::corner);
  TORCH_CHECK(std::uint64_t(p.packed_pixels()) <= std::numeric_limits<Corner>::max(), "deform_conv2d: an input of ",
              p.height, "x", p.width, " is too large");
}

// A view of a tensor with any strides. The stride of a side of length 1 is arbitrary, so it must only be multiplied by
// indices of its own side. Kernels that step over pixels or assume contiguous channels need dense_view().
template <typename S>
View<const S> view(const at::Tensor& tensor) {
  return {static_cast<const S*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

// A view of a tensor that is contiguous or channels-last. Its strides are computed from the sizes, because
// is_contiguous() ignores the stride of a side of length 1.
template <typename S>
View<S> dense_view(const at::Tensor& tensor) {
  S* const data = static_cast<S*>(const_cast<void*>(tensor.const_data_ptr()));
  const std::int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
  if (tensor.is_contiguous(at::MemoryFormat::ChannelsLast))
    return {data, channels * height * width, 1, channels * width, channels};
  return {data, channels * height * width, height * width, width, 1};
}

// The output is channels-last if the input is.
at::MemoryFormat format_like(const at::Tensor& input) {
  return input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? at::MemoryFormat::ChannelsLast
                                                                         : at::MemoryFormat::Contiguous;
}

// Returns a contiguous or channels-last tensor with these values.
at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_contiguous(at::MemoryFormat::ChannelsLast) ? tensor : tensor.contiguous();
}

// Returns the values of one offset group of one image: `each` values of a contiguous offset or mask tensor, or null for
// an undefined mask.
template <typename S>
const S* group_values(const Problem& p, const at::Tensor& tensor, std::int64_t image, std::int64_t group,
                      std::int64_t each) {
  if (!tensor.defined()) return nullptr;
  return static_cast<const S*>(tensor.const_data_ptr()) + (image * p.offset_groups + group) * each;
}

// ------------------------------------------------------------------------------------------------------------ forward

// A small problem uses one thread, because waking the others takes longer than computing it.
std::int64_t threads_for(const Problem& problem) {
  constexpr std::int64_t kSmall = 1 << 16;
  return problem.in_channels * problem.taps() * problem.pixels() < kSmall ? 1 : at::get_num_threads();
}

// The width of a block of channels in vectors: two, or one if two would leave lanes or threads idle.
template <typename S>
int block_vectors(const Problem& problem, const KernelTable<S>& table, std::int64_t threads, bool pairs) {
  if (pairs) return 2;
  const bool enough = make_plan(problem, 2 * table.lanes).units.size() >= std::size_t(2 * threads);
  return enough && problem.in_channels / problem.offset_groups > table.lanes ? 2 : 1;
}

// Whether the forward product can use pairs of bfloat16 channels. A pair must not span two groups or offset groups.
template <typename S>
bool pairs_of_channels(const Problem& problem, const KernelTable<S>& table) {
  return table.forward_tile_pairs && problem.in_per_group() % 2 == 0 &&
         problem.in_channels / problem.offset_groups % 2 == 0;
}

// The weight as [output][channel][tap] in the type of the computation, or [output][channel pair][tap][2] for pairs.
template <typename S>
at::Tensor forward_weight(const Problem& problem, const at::Tensor& weight, bool pairs) {
  if (!pairs) return weight.to(kScalarType<Compute<S>>).contiguous();
  return weight.reshape({problem.out_channels, problem.in_per_group() / 2, 2, problem.taps()})
      .transpose(2, 3)
      .contiguous();
}

template <typename S>
class Forward {
  using T = Compute<S>;

 public:
  Forward(const Problem& problem, const at::Tensor& input, const at::Tensor& offset, const at::Tensor& mask,
          const at::Tensor& weight)
      : p_(problem),
        table_(kernels<S>()),
        threads_(threads_for(problem)),
        pairs_(pairs_of_channels(problem, table_)),
        vectors_(block_vectors(problem, table_, threads_, pairs_)),
        forward_tile_(pairs_ ? table_.forward_tile_pairs : table_.forward_tile[vectors_ - 1]),
        width_(vectors_ * table_.lanes),
        tile_(2 * table_.lanes),
        tiles_(divide_up(p_.pixels(), tile_)),
        plan_(make_plan(p_, width_)),
        options_(input.options().dtype(kScalarType<T>)),
        input_(input),
        offset_(offset.contiguous()),
        mask_(mask.defined() ? mask.contiguous() : mask),
        weight_(forward_weight<S>(problem, weight, pairs_)),
        output_(in_large_pages(at::empty({p_.images, p_.out_channels, p_.out_height, p_.out_width},
                                         input.options().memory_format(format_like(input))))) {}

  at::Tensor run() {
    const std::int64_t values_per_tap = sizeof(Tap<T>) / sizeof(T);
    const at::Tensor taps = at::empty({tiles_ * tile_ * p_.taps() * values_per_tap}, options_);
    taps_ = reinterpret_cast<Tap<T>*>(taps.data_ptr<T>());
    for (image_ = 0; image_ < p_.images; ++image_) {
      // One thread per unit if that leaves few threads idle. Otherwise all threads share each unit, and its products
      // are added to the sums of the units before it.
      const bool thread_per_unit = plan_.whole_groups && std::int64_t(plan_.units.size()) / p_.offset_groups >=
                                                             (threads_ > 1 ? 2 * threads_ : 1);
      if (!thread_per_unit) sums_ = at::zeros({tiles_ * p_.out_channels * tile_}, options_);
      auto begin = plan_.units.begin();
      for (std::int64_t group = 0; group < p_.offset_groups; ++group) {
        const auto end = std::find_if(begin, plan_.units.end(), [&](const Unit& u) { return u.offset_group != group; });
        make_taps(group);
        if (thread_per_unit) {
          process_units_in_parallel(&*begin, end - begin);
        } else {
          for (auto unit = begin; unit != end; ++unit) process_unit_with_all_threads(*unit);
        }
        begin = end;
      }
      if (!thread_per_unit) store_sums();
    }
    return output_;
  }

 private:
  void make_taps(std::int64_t group) {
    const std::int64_t plane = p_.pixels() * p_.taps();
    const std::int64_t rows = tiles_ * (tile_ / table_.lanes);
    at::parallel_for(0, rows, divide_up(rows, threads_), [&](std::int64_t first, std::int64_t last) {
      table_.make_taps(p_, group_values<S>(p_, offset_, image_, group, 2 * plane),
                       group_values<S>(p_, mask_, image_, group, plane), taps_, first, last);
    });
  }

  at::Tensor scratch(std::int64_t count) { return at::empty({count}, options_); }

  const Tap<T>* taps_of(std::int64_t tile) const { return taps_ + tile * tile_ * p_.taps(); }

  std::int64_t pixels_of(std::int64_t tile) const { return std::min(tile_, p_.pixels() - tile * tile_); }

  void process_units_in_parallel(const Unit* units, std::int64_t count) {
    Counter counter(count);
    for_each_worker(std::min(threads_, count), [&](std::int64_t) {
      const at::Tensor packed = at::zeros({p_.packed_pixels() * width_}, options_);
      const at::Tensor columns = scratch(width_ * p_.taps() * tile_);
      const at::Tensor out = scratch(plan_.most_groups * p_.out_per_group() * tile_);
      for (std::int64_t number; counter.next(number);) {
        const Unit& unit = units[number];
        table_.pack(p_, unit, view<S>(input_), image_, packed.data_ptr<T>(), width_, 0, p_.height);
        for (std::int64_t tile = 0; tile < tiles_; ++tile) {
          forward_tile_(p_, unit, packed.data_ptr<T>(), taps_of(tile), weight_.const_data_ptr(), columns.data_ptr<T>(),
                        out.data_ptr<T>(), tile_, false);
          table_.store_tile(out.data_ptr<T>(), tile_, dense_view<S>(output_), image_, unit.first_output(),
                            unit.segments.size() * p_.out_per_group(), tile * tile_, pixels_of(tile));
        }
      }
    });
  }

  void process_unit_with_all_threads(const Unit& unit) {
    const at::Tensor packed = at::zeros({p_.packed_pixels() * width_}, options_);
    at::parallel_for(0, p_.height, divide_up(p_.height, threads_), [&](std::int64_t first, std::int64_t last) {
      table_.pack(p_, unit, view<S>(input_), image_, packed.data_ptr<T>(), width_, first, last);
    });
    Counter counter(tiles_);
    for_each_worker(std::min(threads_, tiles_), [&](std::int64_t) {
      const at::Tensor columns = scratch(width_ * p_.taps() * tile_);
      for (std::int64_t tile; counter.next(tile);)
        forward_tile_(p_, unit, packed.data_ptr<T>(), taps_of(tile), weight_.const_data_ptr(), columns.data_ptr<T>(),
                      sums_.data_ptr<T>() + (tile * p_.out_channels + unit.first_output()) * tile_, tile_, true);
    });
  }

  void store_sums() {
    at::parallel_for(0, tiles_, divide_up(tiles_, threads_), [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t tile = first; tile < last; ++tile)
        table_.store_tile(sums_.data_ptr<T>() + tile * p_.out_channels * tile_, tile_, dense_view<S>(output_), image_,
                          0, p_.out_channels, tile * tile_, pixels_of(tile));
    });
  }

  const Problem& p_;
  const KernelTable<S>& table_;
  const std::int64_t threads_;
  const bool pairs_;
  const int vectors_;
  const typename KernelTable<S>::ForwardTile forward_tile_;
  const std::int64_t width_, tile_, tiles_;
  const Plan plan_;
  const at::TensorOptions options_;
  const at::Tensor input_, offset_, mask_, weight_;
  at::Tensor output_, sums_;
  Tap<T>* taps_ = nullptr;
  std::int64_t image_ = 0;
};

// ----------------------------------------------------------------------------------------------------------- backward

template <typename S>
class Backward {
  using T = Compute<S>;

 public:
  Backward(const Problem& problem, const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& offset,
           const at::Tensor& mask, const at::Tensor& weight, Needed needed)
      : p_(problem),
        table_(kernels<S>()),
        threads_(threads_for(problem)),
        pairs_(table_.backward_unit_pairs && problem.out_per_group() % 2 == 0),
        vectors_(block_vectors(problem, table_, threads_, pairs_)),
        backward_unit_(pairs_ ? table_.backward_unit_pairs : table_.backward_unit[vectors_ - 1]),
        width_(vectors_ * table_.lanes),
        tile_(8 * table_.lanes),
        tiles_(divide_up(p_.pixels(), tile_)),
        plan_(make_plan(p_, width_)),
        needed_(needed),
        options_(input.options().dtype(kScalarType<T>)),
        grad_output_(dense(grad_output)),
        input_(input),
        offset_(offset.contiguous()),
        mask_(mask.defined() ? mask.contiguous() : mask),
        weight_(weight.to(kScalarType<T>).contiguous()) {
    if (needed.input)
      grad_input_ = in_large_pages(at::empty(input.sizes(), input.options().memory_format(format_like(input))));
    if (needed.offset) grad_offset_ = at::empty(offset.sizes(), offset.options());
    if (needed.mask) grad_mask_ = at::empty(mask.sizes(), mask.options());
    if (needed.weight) grad_weight_ = at::zeros(weight.sizes(), options_);
  }

  Gradients run() {
    const std::int64_t values_per_tap = sizeof(Tap<T>) / sizeof(T);
    const at::Tensor taps = at::empty({tiles_ * tile_ * p_.taps() * values_per_tap}, options_);
    taps_ = reinterpret_cast<Tap<T>*>(taps.data_ptr<T>());
    for (std::int64_t image = 0; image < p_.images; ++image) {
      auto begin = plan_.units.begin();
      for (std::int64_t group = 0; group < p_.offset_groups; ++group) {
        const auto end = std::find_if(begin, plan_.units.end(), [&](const Unit& u) { return u.offset_group != group; });
        process_offset_group(image, group, &*begin, end - begin);
        begin = end;
      }
    }
    return {grad_input_, grad_offset_, grad_mask_,
            needed_.weight ? grad_weight_.to(input_.scalar_type()) : grad_weight_};
  }

 private:
  // Each worker gets a fixed range of the units, so that sums over units are reproducible.
  void process_offset_group(std::int64_t image, std::int64_t group, const Unit* units, std::int64_t count) {
    const std::int64_t plane = p_.pixels() * p_.taps();
    const std::int64_t rows = tiles_ * (tile_ / table_.lanes);
    at::parallel_for(0, rows, divide_up(rows, threads_), [&](std::int64_t first, std::int64_t last) {
      table_.make_taps(p_, group_values<S>(p_, offset_, image, group, 2 * plane),
                       group_values<S>(p_, mask_, image, group, plane), taps_, first, last);
    });
    const std::int64_t workers = std::min(threads_, count), sums = (needed_.mask ? 3 : 2) * p_.taps() * tiles_ * tile_;
    const bool geometry = needed_.offset || needed_.mask;
    const at::Tensor offset_sums = at::empty({geometry ? workers * sums : 0}, options_);
    for_each_worker(workers, [&](std::int64_t worker) {
      T* const own_sums = geometry ? offset_sums.data_ptr<T>() + worker * sums : nullptr;
      if (geometry) std::fill_n(own_sums, sums, T(0));
      process_units(image, units + count * worker / workers, units + count * (worker + 1) / workers, own_sums);
    });
    if (geometry) store_offset_sums(image, group, offset_sums.data_ptr<T>(), workers, sums);
  }

  void process_units(std::int64_t image, const Unit* first, const Unit* last, T* offset_sums) {
    const std::int64_t outputs = p_.out_per_group(), packed = p_.packed_pixels() * width_, taps = p_.taps();
    std::int64_t most_sums = 0;
    for (const Unit* unit = first; unit != last; ++unit) {
      std::int64_t unit_sums = 0;
      for (const Segment& segment : unit->segments)
        unit_sums += table_.sum_tiles(outputs, segment.channels) * table_.sum_tile;
      most_sums = std::max(most_sums, unit_sums);
    }
    std::vector<at::Tensor> owners;
    const auto scratch = [&](std::int64_t count, bool zero = false) {
      owners.push_back(zero ? at::zeros({count}, options_) : at::empty({count}, options_));
      return owners.back().data_ptr<T>();
    };
    BackwardScratch<T> s;
    s.packed = scratch(needed_.samples() ? packed : 0, true);
    s.packed_grad = scratch(needed_.input ? packed : 0);
    s.grad_tile = scratch(plan_.most_groups * outputs * tile_);
    s.grad_pairs = reinterpret_cast<std::uint32_t*>(scratch(pairs_ ? plan_.most_groups * outputs * tile_ / 2 : 0));
    s.grad_half = reinterpret_cast<BFloat16*>(scratch(pairs_ ? plan_.most_groups * outputs * tile_ / 2 : 0));
    s.column_grad = scratch(width_ * tile_);
    s.columns = scratch(width_ * tile_);
    s.sample_grad = scratch(table_.lanes * width_);
    s.sample_value = scratch(table_.lanes * width_);
    s.weight = scratch(taps * outputs * width_);
    s.weight_sums = scratch(needed_.weight ? taps * most_sums + table_.sum_tile : 0);
    s.offset_sums = offset_sums;
    for (const Unit* unit = first; unit != last; ++unit)
      backward_unit_(p_, *unit, dense_view<const S>(grad_output_), view<S>(input_), weight_.data_ptr<T>(), taps_, tile_,
                     image, needed_, s, needed_.input ? dense_view<S>(grad_input_) : View<S>{},
                     needed_.weight ? grad_weight_.data_ptr<T>() : nullptr);
  }

  void store_offset_sums(std::int64_t image, std::int64_t group, T* sums, std::int64_t workers, std::int64_t each) {
    const std::int64_t taps = p_.taps(), padded = tiles_ * tile_;
    const std::int64_t planes = (needed_.mask ? 3 : 2) * taps;
    at::parallel_for(0, planes, divide_up(planes, threads_), [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t plane = first; plane < last; ++plane) {
        T* const total = sums + plane * padded;
        for (std::int64_t worker = 1; worker < workers; ++worker)
          for (std::int64_t i = 0; i < padded; ++i) total[i] += total[worker * each + i];
        const std::int64_t kind = plane / taps, tap = plane % taps;
        at::Tensor& grad = kind == 2 ? grad_mask_ : grad_offset_;
        if (!grad.defined()) continue;
        const std::int64_t channel = kind == 2 ? group * taps + tap : 2 * (group * taps + tap) + kind;
        table_.store_tile(total, padded, dense_view<S>(grad), image, channel, 1, 0, p_.pixels());
      }
    });
  }

  const Problem& p_;
  const KernelTable<S>& table_;
  const std::int64_t threads_;
  const bool pairs_;
  const int vectors_;
  const typename KernelTable<S>::BackwardUnit backward_unit_;
  const std::int64_t width_, tile_, tiles_;
  const Plan plan_;
  const Needed needed_;
  const at::TensorOptions options_;
  const at::Tensor grad_output_, input_, offset_, mask_, weight_;
  at::Tensor grad_input_, grad_offset_, grad_mask_, grad_weight_;
  Tap<T>* taps_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------- operators

template <typename F>
auto with_stored_type(const at::Tensor& input, const F& f) {
  switch (input.scalar_type()) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    case at::kBFloat16:
      return f(BFloat16());
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "deform_conv2d: not implemented for ", input.scalar_type());
  }
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& offset, const c10::optional<at::Tensor>& mask,
                   const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation) {
  const Problem problem = make_problem(input, offset, mask, weight, stride, padding, dilation);
  return with_stored_type(input, [&](auto stored) {
    check_corners<decltype(stored)>(problem);
    return Forward<decltype(stored)>(problem, input, offset, mask ? *mask : at::Tensor(), weight).run();
  });
}

Gradients backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& offset,
                   const c10::optional<at::Tensor>& mask, const at::Tensor& weight, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, std::array<bool, 4> needed) {
  const Problem problem = make_problem(input, offset, mask, weight, stride, padding, dilation);
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type() &&
                  grad_output.sizes() ==
                      at::IntArrayRef({problem.images, problem.out_channels, problem.out_height, problem.out_width}),
              "deform_conv2d: grad_output must have the shape and dtype of the output");
  return with_stored_type(input, [&](auto stored) {
    check_corners<decltype(stored)>(problem);
    return Backward<decltype(stored)>(problem, grad_output, input, offset, mask ? *mask : at::Tensor(), weight,
                                      {needed[0], needed[1], needed[2] && mask, needed[3]})
        .run();
  });
}

}  // namespace
}  // namespace cpm_rcnn

TORCH_LIBRARY(cpm_rcnn_cpu, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
      "int[2] stride, int[2] padding, int[2] dilation, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cpm_rcnn_cpu, CPU, m) {
  m.impl("deform_conv2d", cpm_rcnn::forward);
  m.impl("deform_conv2d_backward", cpm_rcnn::backward);
}
