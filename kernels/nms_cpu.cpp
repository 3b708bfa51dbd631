// Non-maximum suppression on a CPU: the operator cpm_rcnn_cpu::nms_mask. Its result is that of torchvision.ops.nms for
// each group.
//
//   1. Rows are sorted by group, and within a group by descending score. Equal scores keep their order.
//   2. Each box of a group, best first, is compared with the boxes that were kept before it, one vector of them at a
//      time, until one of them suppresses it. These are the pairs that torchvision's operator compares.
//
// Threads take one group at a time. A large group is instead processed in chunks by all threads: they compare the boxes
// of a chunk with the boxes that were kept before the chunk, and one thread compares the remaining boxes with each
// other.
//
// The result does not depend on the number of threads. Memory is proportional to the number of boxes.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "nms_table.h"

#define CPM_ISA portable
#define CPM_VECTOR_BYTES 16
#include "nms_kernels.h"

#if CPM_X86
#define CPM_ISA avx2
#define CPM_TARGET "avx2"
#define CPM_VECTOR_BYTES 32
#include "nms_kernels.h"

#define CPM_ISA avx512
#define CPM_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2"
#define CPM_VECTOR_BYTES 64
#include "nms_kernels.h"
#endif  // x86-64

namespace cpm_rcnn {
namespace nms {
namespace {

// Fewer pairs than this are compared by one thread, because waking the others takes longer. Sorting a box counts as
// kSortingPairs pairs.
constexpr std::int64_t kSmall = 1 << 20, kSortingPairs = 32;
// A group of at least this many boxes is divided among the threads if it is also more than one thread's share.
constexpr std::int64_t kLarge = 1 << 11;
// The boxes of a large group that are compared with each other by one thread.
constexpr std::int64_t kChunk = 1 << 9;

// Returns the kernels of the best instruction set.
template <typename T>
const KernelTable<T>& kernels() {
  static const KernelTable<T> table = [] {
#if CPM_X86
    switch (best_instruction_set()) {
      case InstructionSet::avx512:
        return avx512::make_table<T>();
      case InstructionSet::avx2:
        return avx2::make_table<T>();
      case InstructionSet::portable:
        break;
    }
#endif
    return portable::make_table<T>();
  }();
  return table;
}

// ------------------------------------------------------------------------------------------------------------ sorting

// The rows of each group: rows[offsets[i]] to rows[offsets[i + 1] - 1].
struct Groups {
  std::vector<std::int32_t> rows;
  std::vector<std::int64_t> offsets;
};

// Collects the valid rows of each group, in ascending order. `valid` may be null.
Groups collect(const std::int64_t* groups, const bool* valid, std::int64_t count) {
  Groups result;
  const auto is_valid = [&](std::int64_t row) { return !valid || valid[row]; };
  std::int64_t total = 0, low = std::numeric_limits<std::int64_t>::max(),
               high = std::numeric_limits<std::int64_t>::min();
  for (std::int64_t row = 0; row < count; ++row)
    if (is_valid(row)) ++total, low = std::min(low, groups[row]), high = std::max(high, groups[row]);
  if (total == 0) return result;
  result.rows.resize(total);
  // The difference of two numbers of any size, modulo 2^64.
  const std::uint64_t range = std::uint64_t(high) - std::uint64_t(low);
  if (range < std::uint64_t(2 * count + 1024)) {
    std::vector<std::int64_t> next(range + 2);
    for (std::int64_t row = 0; row < count; ++row)
      if (is_valid(row)) ++next[groups[row] - low + 1];
    for (std::uint64_t i = 0; i <= range; ++i) {
      if (next[i + 1]) result.offsets.push_back(next[i]);
      next[i + 1] += next[i];
    }
    for (std::int64_t row = 0; row < count; ++row)
      if (is_valid(row)) result.rows[next[groups[row] - low]++] = std::int32_t(row);
  } else {
    std::int64_t i = 0;
    for (std::int64_t row = 0; row < count; ++row)
      if (is_valid(row)) result.rows[i++] = std::int32_t(row);
    std::stable_sort(result.rows.begin(), result.rows.end(),
                     [&](std::int32_t a, std::int32_t b) { return groups[a] < groups[b]; });
    for (i = 0; i < total; ++i)
      if (i == 0 || groups[result.rows[i]] != groups[result.rows[i - 1]]) result.offsets.push_back(i);
  }
  result.offsets.push_back(total);
  return result;
}

// An unsigned number that is smaller for a better score. NaN is better than infinity, as in torch.sort, and the two
// zeros are equal.
template <typename S>
auto sort_key(S score) {
  using Key = std::conditional_t<sizeof(S) == 8, std::uint64_t, std::uint32_t>;
  if (score != score) return Key(0);
  if (score == 0) score = 0;
  Key bits;
  __builtin_memcpy(&bits, &score, sizeof(bits));
  constexpr Key sign = Key(1) << (8 * sizeof(Key) - 1);
  return Key(bits & sign ? bits : ~bits & ~sign);
}

template <typename Key>
struct Keyed {
  Key key;
  std::int32_t row;
};

// Sorts rows, which are in ascending order, by descending score.
template <typename S>
void sort_rows(const S* scores, std::int32_t* rows, std::int64_t count) {
  using Key = decltype(sort_key(S()));
  const auto better = [](const Keyed<Key>& a, const Keyed<Key>& b) {
    return a.key < b.key || (a.key == b.key && a.row < b.row);
  };
  std::unique_ptr<Keyed<Key>[]> from(new Keyed<Key>[count]);
  bool sorted = true;
  for (std::int64_t i = 0; i < count; ++i) {
    from[i] = {sort_key(scores[rows[i]]), rows[i]};
    sorted = sorted && (i == 0 || from[i - 1].key <= from[i].key);
  }
  if (sorted) return;
  constexpr std::int64_t kRadixFrom = 64;
  if (count < kRadixFrom) {
    std::sort(from.get(), from.get() + count, better);
  } else {
    // Radix sort, from the lowest byte to the highest one.
    constexpr int bytes = sizeof(Key);
    std::unique_ptr<Keyed<Key>[]> to(new Keyed<Key>[count]);
    std::uint32_t starts[bytes][257] = {};
    for (std::int64_t i = 0; i < count; ++i)
      for (int byte = 0; byte < bytes; ++byte) ++starts[byte][(from[i].key >> (8 * byte) & 255) + 1];
    for (int byte = 0; byte < bytes; ++byte) {
      std::uint32_t* const start = starts[byte];
      // A byte that is the same in all keys does not change the order.
      if (start[(from[0].key >> (8 * byte) & 255) + 1] == count) continue;
      for (int value = 1; value < 256; ++value) start[value + 1] += start[value];
      for (std::int64_t i = 0; i < count; ++i) to[start[from[i].key >> (8 * byte) & 255]++] = from[i];
      std::swap(from, to);
    }
  }
  for (std::int64_t i = 0; i < count; ++i) rows[i] = from[i].row;
}

void sort_rows(const at::Tensor& scores, std::int32_t* rows, std::int64_t count) {
  if (scores.scalar_type() == at::kDouble)
    sort_rows(scores.const_data_ptr<double>(), rows, count);
  else
    sort_rows(scores.const_data_ptr<float>(), rows, count);
}

// -------------------------------------------------------------------------------------------------------------- groups

// The comparison IoU > threshold in float64, as in torchvision's operator, for IoUs of type T: they are compared with
// the largest number of type T that is not greater than the threshold.
template <typename T>
Threshold<T> make_threshold(double threshold) {
  T value = T(threshold);
  if (double(value) > threshold) value = std::nextafter(value, -std::numeric_limits<T>::infinity());
  return {value, value >= 0};
}

template <typename T>
class Suppression {
 public:
  Suppression(const T* boxes, const at::Tensor& scores, Groups& groups, double threshold, bool* mask)
      : table_(kernels<T>()),
        boxes_(boxes),
        scores_(scores),
        groups_(groups),
        threshold_(make_threshold<T>(threshold)),
        mask_(mask),
        count_(std::int64_t(groups.offsets.size()) - 1) {}

  void run() const {
    const std::int64_t total = groups_.offsets[count_];
    std::int64_t longest = 0, pairs = 0;
    for (std::int64_t group = 0; group < count_; ++group) pairs += size(group) * (size(group) / 2 + kSortingPairs);
    const std::int64_t threads = pairs < kSmall ? 1 : at::get_num_threads();
    const auto is_large = [&](std::int64_t group) {
      return threads > 1 && size(group) >= kLarge && size(group) > total / threads;
    };
    for (std::int64_t group = 0; group < count_; ++group) {
      if (is_large(group))
        process_large(group);
      else
        longest = std::max(longest, size(group));
    }
    if (longest == 0) return;
    std::atomic<std::int64_t> next{0};
    at::parallel_for(0, std::min(threads, count_), 1, [&](std::int64_t first, std::int64_t last) {
      for (; first < last; ++first) {
        std::unique_ptr<T[]> blocks = make_blocks(longest);
        for (std::int64_t group; (group = next.fetch_add(1, std::memory_order_relaxed)) < count_;)
          if (!is_large(group)) process(group, blocks.get());
      }
    });
  }

 private:
  std::int64_t size(std::int64_t group) const { return groups_.offsets[group + 1] - groups_.offsets[group]; }

  std::unique_ptr<T[]> make_blocks(std::int64_t boxes) const {
    const std::int64_t blocks = (boxes + table_.width - 1) / table_.width;
    return std::unique_ptr<T[]>(new T[blocks * table_.width * kBlockFields]);
  }

  void process(std::int64_t group, T* blocks) const {
    std::int32_t* const rows = groups_.rows.data() + groups_.offsets[group];
    const std::int64_t count = size(group);
    sort_rows(scores_, rows, count);
    Kept<T> kept{blocks, 0};
    table_.greedy(boxes_, rows, 0, count, nullptr, 0, kept, threshold_, mask_);
  }

  void process_large(std::int64_t group) const {
    std::int32_t* const rows = groups_.rows.data() + groups_.offsets[group];
    const std::int64_t count = size(group);
    sort_rows(scores_, rows, count);
    const std::unique_ptr<T[]> blocks = make_blocks(count);
    const std::unique_ptr<bool[]> suppressed(new bool[count]);
    Kept<T> kept{blocks.get(), 0};
    for (std::int64_t first = 0; first < count; first += kChunk) {
      const std::int64_t last = std::min(first + kChunk, count);
      // Boxes that are suppressed early take less time, so the threads take a few boxes at a time.
      constexpr std::int64_t kFew = 16;
      std::atomic<std::int64_t> next{first};
      at::parallel_for(0, at::get_num_threads(), 1, [&](std::int64_t worker, std::int64_t end) {
        for (; worker < end; ++worker)
          for (std::int64_t i; (i = next.fetch_add(kFew, std::memory_order_relaxed)) < last;)
            table_.test(boxes_, rows, i, std::min(i + kFew, last), kept, threshold_, suppressed.get());
      });
      table_.greedy(boxes_, rows, first, last, suppressed.get(), kept.count / table_.width, kept, threshold_, mask_);
    }
  }

  const KernelTable<T>& table_;
  const T* const boxes_;
  const at::Tensor& scores_;
  Groups& groups_;
  const Threshold<T> threshold_;
  bool* const mask_;
  const std::int64_t count_;
};

// ----------------------------------------------------------------------------------------------------------- operator

at::Tensor nms_mask(const at::Tensor& boxes, const at::Tensor& scores, const at::Tensor& groups, double iou_threshold,
                    const c10::optional<at::Tensor>& valid) {
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "nms_mask: boxes must be (R, 4), got ", boxes.sizes());
  const std::int64_t count = boxes.size(0);
  const auto check = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == count, "nms_mask: ", name, " must be (", count, ",), got ",
                tensor.sizes());
    TORCH_CHECK(tensor.device().is_cpu(), "nms_mask: all tensors must be on the CPU");
  };
  const auto is_supported = [](const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
  };
  check("scores", scores), check("groups", groups);
  if (valid) check("valid", *valid);
  TORCH_CHECK(is_supported(boxes) && is_supported(scores),
              "nms_mask: boxes and scores must be float32 or float64, got ", boxes.scalar_type(), " and ",
              scores.scalar_type());
  TORCH_CHECK(groups.scalar_type() == at::kLong, "nms_mask: groups must be int64, got ", groups.scalar_type());
  TORCH_CHECK(!valid || valid->scalar_type() == at::kBool, "nms_mask: valid must be bool");
  TORCH_CHECK(count <= std::numeric_limits<std::int32_t>::max(), "nms_mask: ", count, " boxes are too many");

  const at::Tensor dense_boxes = boxes.contiguous(), dense_scores = scores.contiguous();
  const at::Tensor dense_groups = groups.contiguous(), dense_valid = valid ? valid->contiguous() : at::Tensor();
  const at::Tensor mask = at::zeros({count}, boxes.options().dtype(at::kBool));
  Groups rows =
      collect(dense_groups.const_data_ptr<std::int64_t>(), valid ? dense_valid.const_data_ptr<bool>() : nullptr, count);
  if (rows.rows.empty()) return mask;
  const auto run = [&](auto type) {
    using T = decltype(type);
    Suppression<T>(dense_boxes.const_data_ptr<T>(), dense_scores, rows, iou_threshold, mask.data_ptr<bool>()).run();
  };
  boxes.scalar_type() == at::kDouble ? run(double()) : run(float());
  return mask;
}

}  // namespace
}  // namespace nms
}  // namespace cpm_rcnn

TORCH_LIBRARY_FRAGMENT(cpm_rcnn_cpu, m) {
  m.def("nms_mask(Tensor boxes, Tensor scores, Tensor groups, float iou_threshold, Tensor? valid) -> Tensor");
}

TORCH_LIBRARY_IMPL(cpm_rcnn_cpu, CPU, m) { m.impl("nms_mask", cpm_rcnn::nms::nms_mask); }
