// Propagates the gradient of one sample whose corner is past the first 2^32 elements of the packed plane. Exits with 1
// if it reads or writes another place, and with 77 if the system does not reserve the memory.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <type_traits>
#include <utility>
#include <vector>

#include "deform_conv_problem.h"
#include "deform_conv_table.h"

#define CPM_ISA portable
#define CPM_VECTOR_BYTES 16
#define CPM_BF16_DOT 0
#include "deform_conv_isa.h"

namespace {

constexpr int kWidth = cpm_rcnn::portable::Simd<float>::lanes;
constexpr std::int64_t kCorner = (std::int64_t(1) << 32) / kWidth + 5, kPixels = kCorner + 100;

// Returns zeros. Only the pages that are touched need memory.
float* reserve() {
  void* const plane = mmap(nullptr, kPixels * kWidth * sizeof(float), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return plane == MAP_FAILED ? nullptr : static_cast<float*>(plane);
}

}  // namespace

int main() {
  cpm_rcnn::BackwardScratch<float> scratch{};
  scratch.packed = reserve(), scratch.packed_grad = reserve();
  if (!scratch.packed || !scratch.packed_grad) {
    std::puts("the system does not reserve 32 GiB of address space");
    return 77;
  }
  std::vector<float> sample_grad(kWidth * kWidth), sample_value(kWidth * kWidth), columns(kWidth * kWidth);
  std::vector<float> sum_y(kWidth), sum_x(kWidth);
  const std::vector<float> column_grad(kWidth * kWidth, 1);
  scratch.sample_grad = sample_grad.data(), scratch.sample_value = sample_value.data();
  cpm_rcnn::Tap<float> taps[kWidth];
  for (auto& tap : taps) tap = {{1, 0, 0, 0}, 0, 0, 1, std::uint32_t(kCorner)};
  scratch.packed[kCorner * kWidth] = 3;
  cpm_rcnn::portable::scatter<float, float, 1, true, true, true>(
      taps, 10 * kWidth, scratch, column_grad.data(), columns.data(), kWidth, sum_y.data(), sum_x.data(), nullptr);
  const float grad = scratch.packed_grad[kCorner * kWidth], wrapped = scratch.packed_grad[5 * kWidth];
  std::printf("value %g (expected 3), gradient %g (expected %d), wrapped gradient %g (expected 0)\n", columns[0], grad,
              kWidth, wrapped);
  return columns[0] == 3 && grad == kWidth && wrapped == 0 ? 0 : 1;
}
