// Normalization of an image on a CPU: the operator cpm_rcnn_cpu::normalize_image. It converts, subtracts and divides in
// one pass over the memory, in which an image has its channels last and the result has them first. The values are those
// of torch's operators.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "instruction_set.h"

namespace cpm_rcnn {
namespace normalize {

struct Image {
  const std::uint8_t* from;
  // Steps between rows and between channels. Interleaved channels are 1 apart and pixels 3; otherwise pixels are 1
  // apart.
  std::int64_t from_row, from_plane;
  bool interleaved;
  // The plane that receives each of the image's channels, and the step between its rows.
  float* to[3];
  std::int64_t to_row, width;
};

// Mean and standard deviation of each of the image's channels.
struct Channels {
  float mean[3], std[3];
};

}  // namespace normalize
}  // namespace cpm_rcnn

#define CPM_ISA portable
#define CPM_VECTOR_BYTES 16
#include "normalize_kernels.h"

#if CPM_X86
#define CPM_ISA avx2
#define CPM_TARGET "avx2"
#define CPM_VECTOR_BYTES 32
#include "normalize_kernels.h"

#define CPM_ISA avx512
#define CPM_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2"
#define CPM_VECTOR_BYTES 64
#include "normalize_kernels.h"
#endif  // x86-64

namespace cpm_rcnn {
namespace normalize {
namespace {

// A thread takes at least this many values, because waking another one takes longer.
constexpr std::int64_t kSmall = 1 << 16;

using Rows = void (*)(const Image&, const Channels&, std::int64_t first, std::int64_t last);

// Returns the kernel of the best instruction set.
Rows kernel() {
  static const Rows rows = [] {
#if CPM_X86
    switch (best_instruction_set()) {
      case InstructionSet::avx512:
        return avx512::rows;
      case InstructionSet::avx2:
        return avx2::rows;
      case InstructionSet::portable:
        break;
    }
#endif
    return portable::rows;
  }();
  return rows;
}

void check(const at::Tensor& image, const at::Tensor& mean, const at::Tensor& std, const at::Tensor& out) {
  TORCH_CHECK(image.dim() == 3 && image.size(0) == 3, "normalize_image: image must be (3, H, W), got ", image.sizes());
  TORCH_CHECK(image.scalar_type() == at::kByte, "normalize_image: image must be uint8, got ", image.scalar_type());
  TORCH_CHECK(out.sizes() == image.sizes() && (out.stride(2) == 1 || out.size(2) == 1),
              "normalize_image: out must have the shape of the image and contiguous rows");
  for (const at::Tensor& tensor : {mean, std})
    TORCH_CHECK(tensor.numel() == 3, "normalize_image: mean and std must have 3 values, got ", tensor.sizes());
  for (const at::Tensor& tensor : {mean, std, out})
    TORCH_CHECK(tensor.scalar_type() == at::kFloat, "normalize_image: mean, std and out must be float32");
  for (const at::Tensor& tensor : {image, mean, std, out})
    TORCH_CHECK(tensor.device().is_cpu(), "normalize_image: all tensors must be on the CPU");
}

void normalize_image(const at::Tensor& image, const at::Tensor& mean, const at::Tensor& std, bool reverse,
                     at::Tensor& out) {
  check(image, mean, std, out);
  const std::int64_t height = image.size(1), width = image.size(2);
  const bool interleaved = image.stride(0) == 1 && image.stride(2) == 3;
  const at::Tensor dense = interleaved || image.stride(2) == 1 ? image : image.contiguous();
  const at::Tensor means = mean.contiguous(), stds = std.contiguous();
  Image rows{
      dense.const_data_ptr<std::uint8_t>(), dense.stride(1), dense.stride(0), interleaved, {}, out.stride(1), width};
  Channels channels;
  for (int c = 0; c < 3; ++c) {
    const int target = reverse ? 2 - c : c;
    rows.to[c] = out.data_ptr<float>() + target * out.stride(0);
    channels.mean[c] = means.const_data_ptr<float>()[target];
    channels.std[c] = stds.const_data_ptr<float>()[target];
  }
  const std::int64_t grain = std::max<std::int64_t>(1, kSmall / std::max<std::int64_t>(1, 3 * width));
  at::parallel_for(0, height, grain,
                   [&](std::int64_t first, std::int64_t last) { kernel()(rows, channels, first, last); });
}

}  // namespace
}  // namespace normalize
}  // namespace cpm_rcnn

TORCH_LIBRARY_FRAGMENT(cpm_rcnn_cpu, m) {
  m.def("normalize_image(Tensor image, Tensor mean, Tensor std, bool reverse, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(cpm_rcnn_cpu, CPU, m) { m.impl("normalize_image", cpm_rcnn::normalize::normalize_image); }
