// The steps of a deformable convolution on one unit of channels and one tile of output pixels.
// deform_conv_isa.h includes this file once per instruction set, so it has no include guard.

namespace cpm_rcnn {
namespace CPM_ISA {

// ---------------------------------------------------------------------------------------------------------- samples

// Computes the samples of the output pixels in the groups of L pixels [first, last), as [group][tap][pixel of the
// group]. `offset` and `mask` point to one offset group of one image; `mask` may be null. Pixels past the last output
// pixel sample zeros. A sample with a NaN or infinite offset is NaN: its weights and fractions are NaN, and its corners
// are zeros, so every value that depends on it becomes NaN, but no input's gradient does.
template <typename S>
void make_taps(const Problem& problem, const S* offset, const S* mask, Tap<Compute<S>>* taps, std::int64_t first,
               std::int64_t last) {
  using T = Compute<S>;
  constexpr int L = Simd<T>::lanes;
  const std::int64_t count = problem.taps(), pixels = problem.pixels();
  const T height = T(problem.height), width = T(problem.width);
  for (std::int64_t group = first; group < last; ++group) {
    Tap<T>* const row = taps + group * count * L;
    std::int64_t pixel = group * L, y = pixel / problem.out_width, x = pixel % problem.out_width;
    for (int lane = 0; lane < L; ++lane, ++pixel) {
      for (std::int64_t tap = 0; tap < count; ++tap) {
        Tap<T> sample{{0, 0, 0, 0}, 0, 0, 0, decltype(Tap<T>::corner)(problem.outside_index())};
        if (pixel < pixels) {
          const std::int64_t i = tap / problem.kernel_w, j = tap % problem.kernel_w;
          const T at_y = T(y * problem.stride_h - problem.pad_h + i * problem.dilation_h) +
                         Stored<S>::get(offset[2 * tap * pixels + pixel]);
          const T at_x = T(x * problem.stride_w - problem.pad_w + j * problem.dilation_w) +
                         Stored<S>::get(offset[(2 * tap + 1) * pixels + pixel]);
          const T factor = mask ? Stored<S>::get(mask[tap * pixels + pixel]) : T(1);
          // At exactly -1 the sample is zero, but its derivative is not. NaN fails every comparison.
          if (at_y >= -1 && at_y < height && at_x >= -1 && at_x < width) {
            const T low_y = std::floor(at_y), low_x = std::floor(at_x);
            const T down = at_y - low_y, right = at_x - low_x, up = 1 - down, left = 1 - right;
            sample = {{up * left * factor, up * right * factor, down * left * factor, down * right * factor},
                      down,
                      right,
                      factor,
                      decltype(Tap<T>::corner)(problem.packed_index(std::int64_t(low_y), std::int64_t(low_x)))};
          } else {
            // The difference of a number from itself is 0, or NaN if the number is not finite. A non-finite factor
            // makes zeros NaN, as it does for all samples.
            const T lost = (at_y - at_y) + (at_x - at_x), weight = lost + 0 * factor;
            sample = {{weight, weight, weight, weight}, lost, lost, factor, sample.corner};
          }
        }
        row[tap * L + lane] = sample;
      }
      if (++x == problem.out_width) x = 0, ++y;
    }
  }
}

// ------------------------------------------------------------------------------------- between images and buffers

// Sets to[j][i] to from[i][j] for `rows` rows and `columns` columns of `from`, converted to the type To. The row
// strides are in elements.
template <typename From, typename To>
void transpose_block(const From* from, std::int64_t from_row, To* to, std::int64_t to_row, std::int64_t rows,
                     std::int64_t columns) {
  using T = Compute<From>;
  constexpr int L = Simd<T>::lanes;
  for (std::int64_t row = 0; row < rows; row += L) {
    std::int64_t column = 0;
    if (row + L <= rows) {
      for (; column + L <= columns; column += L) {
        Vec<T> block[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = Stored<From>::load(from + (row + i) * from_row + column);
        Simd<T>::transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) Stored<To>::store(to + (column + i) * to_row + row, block[i]);
      }
    }
    for (; column < columns; ++column)
      for (std::int64_t i = row; i < std::min(row + L, rows); ++i)
        to[column * to_row + i] = Stored<To>::put(Stored<From>::get(from[i * from_row + column]));
  }
}

template <typename From, typename To>
void convert_row(const From* from, To* to, std::int64_t count) {
  using T = Compute<From>;
  constexpr int L = Simd<T>::lanes;
  std::int64_t i = 0;
  for (; i + L <= count; i += L) Stored<To>::store(to + i, Stored<From>::load(from + i));
  for (; i < count; ++i) to[i] = Stored<To>::put(Stored<From>::get(from[i]));
}

// Copies the rows [first, last) of an image into the packed plane [pixel][width]. Does not write the border and the
// lanes past the unit's channels.
template <typename S>
void pack(const Problem& problem, const Unit& unit, View<const S> input, std::int64_t image, Compute<S>* packed,
          std::int64_t width, std::int64_t first, std::int64_t last) {
  if (problem.width == 0) return;  // The image has no memory.
  for (std::int64_t y = first; y < last; ++y) {
    const S* const from = input.data + image * input.image + unit.first_channel * input.channel + y * input.row;
    Compute<S>* const to = packed + problem.packed_index(y, 0) * width;
    if (input.column == 1) {
      transpose_block(from, input.channel, to, width, unit.channels, problem.width);
    } else if (input.channel == 1) {
      for (std::int64_t x = 0; x < problem.width; ++x)
        convert_row(from + x * input.column, to + x * width, unit.channels);
    } else {
      for (std::int64_t x = 0; x < problem.width; ++x)
        for (std::int64_t c = 0; c < unit.channels; ++c)
          to[x * width + c] = Stored<S>::get(from[c * input.channel + x * input.column]);
    }
  }
}

// Copies the packed plane into an image; the inverse of pack() for all rows.
template <typename S>
void unpack(const Problem& problem, const Unit& unit, const Compute<S>* packed, std::int64_t width, View<S> output,
            std::int64_t image) {
  if (problem.width == 0) return;  // The image has no memory.
  for (std::int64_t y = 0; y < problem.height; ++y) {
    S* const to = output.data + image * output.image + unit.first_channel * output.channel + y * output.row;
    const Compute<S>* const from = packed + problem.packed_index(y, 0) * width;
    if (output.column == 1) {
      transpose_block(from, width, to, output.channel, problem.width, unit.channels);
    } else {
      for (std::int64_t x = 0; x < problem.width; ++x)
        convert_row(from + x * width, to + x * output.column, unit.channels);
    }
  }
}

// load_tile and store_tile copy the pixels [first, first + count) of the channels [channel, channel + rows) between an
// image and a tile [rows][pitch]. The pixels of the image must be evenly spaced in memory, and its pixels or its
// channels must be contiguous, as in dense_view(). load_tile fills the rest of each row of the tile with zeros.
template <typename S>
void load_tile(View<const S> image, std::int64_t number, std::int64_t channel, std::int64_t rows, std::int64_t first,
               std::int64_t count, Compute<S>* tile, std::int64_t pitch) {
  const S* const from = image.data + number * image.image + channel * image.channel + first * image.column;
  if (image.column == 1) {
    for (std::int64_t row = 0; row < rows; ++row) convert_row(from + row * image.channel, tile + row * pitch, count);
  } else {
    transpose_block(from, image.column, tile, pitch, count, rows);
  }
  if (count < pitch)
    for (std::int64_t row = 0; row < rows; ++row) std::fill(tile + row * pitch + count, tile + (row + 1) * pitch, 0);
}

template <typename S>
void store_tile(const Compute<S>* tile, std::int64_t pitch, View<S> image, std::int64_t number, std::int64_t channel,
                std::int64_t rows, std::int64_t first, std::int64_t count) {
  S* const to = image.data + number * image.image + channel * image.channel + first * image.column;
  if (image.column == 1) {
    for (std::int64_t row = 0; row < rows; ++row) convert_row(tile + row * pitch, to + row * image.channel, count);
  } else {
    transpose_block(tile, pitch, to, image.column, rows, count);
  }
}

// --------------------------------------------------------------------------------------------------------- forward

// One vector of channels of a sample. `upper` and `lower` are the packed plane, the latter advanced by one row.
template <typename T>
CPM_INLINE Vec<T> sample(const Tap<T>& tap, const T* upper, const T* lower, std::int64_t width) {
  using V = Simd<T>;
  const std::int64_t corner = std::int64_t(tap.corner) * width;
  Vec<T> value = tap.weight[0] * V::load(upper + corner);
  value += tap.weight[1] * V::load(upper + width + corner);
  value += tap.weight[2] * V::load(lower + corner);
  value += tap.weight[3] * V::load(lower + width + corner);
  return value;
}

// Samples all channels of a block at one tap of L pixels, and transposes the samples into columns that are `pitch`
// elements apart.
template <typename Op, int Vectors>
CPM_INLINE void sample_columns(const Tap<typename Op::Number>* taps, const typename Op::Number* packed,
                               std::int64_t row, typename Op::Element* columns, std::int64_t pitch) {
  using T = typename Op::Number;
  constexpr int L = Simd<T>::lanes, width = L * Vectors;
  if constexpr (Op::channels == 1) {
    for (int v = 0; v < Vectors; ++v) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = sample(taps[i], packed + v * L, packed + v * L + row, width);
      Simd<T>::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) Simd<T>::store(columns + (v * L + i) * pitch, block[i]);
    }
  } else {
#if CPM_BF16_DOT
    static_assert(Vectors == 2, "one vector of pairs is made of two vectors");
    using E = typename Op::Element;
    Vec<E> block[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      const Vec<T> low = sample(taps[i], packed, packed + row, width);
      const Vec<T> high = sample(taps[i], packed + L, packed + row + L, width);
      block[i] =
          reinterpret_cast<Vec<E>>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
    }
    Simd<E>::transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) Simd<E>::store(columns + i * pitch, block[i]);
#endif
  }
}

// Sets out[outputs][tile] to the unit's part of the convolution, or adds it if `accumulate`. `taps` are the samples of
// the tile. `weights` is [output][depth], where depth runs over the channels of the group (or pairs of them) and the
// taps. `column_scratch` has room for width x taps x tile elements.
template <typename Op, int Vectors>
void forward_tile(const Problem& problem, const Unit& unit, const typename Op::Number* packed,
                  const Tap<typename Op::Number>* taps, const void* weights, void* column_scratch,
                  typename Op::Number* out, std::int64_t tile, bool accumulate) {
  const auto* const weight = static_cast<const typename Op::Element*>(weights);
  auto* const columns = static_cast<typename Op::Element*>(column_scratch);
  constexpr int L = Simd<typename Op::Number>::lanes, C = Op::channels;
  const std::int64_t count = problem.taps(), row = problem.packed_row() * L * Vectors;
  for (std::int64_t group = 0; group < tile / L; ++group)
    for (std::int64_t tap = 0; tap < count; ++tap)
      sample_columns<Op, Vectors>(taps + (group * count + tap) * L, packed, row, columns + tap * tile + group * L,
                                  count * tile);
  const std::int64_t depth = problem.in_per_group() / C * count;
  for (const Segment& segment : unit.segments) {
    const Matrix<typename Op::Element> factors{
        weight + segment.first_output * depth + segment.group_channel / C * count, depth, 1};
    product<Op, false>(factors, problem.out_per_group(), segment.channels / C * count,
                       columns + segment.first_row / C * count * tile,
                       out + (segment.first_output - unit.first_output()) * tile, tile, tile, accumulate);
  }
}

// -------------------------------------------------------------------------------------------------------- backward

// Propagates the gradient of L samples at one tap, which are columns of column_grad. Input: adds to the gradient of the
// packed input. Geometry: adds the gradients of the offsets and the mask to sum_y, sum_x and sum_mask (null without a
// mask). Values: stores the samples themselves in `columns`, for the gradient of the weight.
template <typename T, typename Column, int Vectors, bool Input, bool Geometry, bool Values>
CPM_INLINE void scatter(const Tap<T>* taps, std::int64_t row, const BackwardScratch<T>& scratch, const T* column_grad,
                        Column* columns, std::int64_t tile, T* sum_y, T* sum_x, T* sum_mask) {
  using V = Simd<T>;
  constexpr int L = V::lanes, width = L * Vectors;
  for (int v = 0; v < Vectors; ++v) {
    Vec<T> block[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) block[i] = V::load(column_grad + (v * L + i) * tile);
    V::transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) V::store(scratch.sample_grad + i * width + v * L, block[i]);
  }
  alignas(CPM_VECTOR_BYTES) T dots[3][L][L];
  for (int pixel = 0; pixel < L; ++pixel) {
    const Tap<T>& tap = taps[pixel];
    // The corner has 32 bits in float32, where the product would wrap.
    const std::int64_t corner = std::int64_t(tap.corner) * width;
    Vec<T> dot_y{}, dot_x{}, dot_mask{};
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const Vec<T> grad = V::load(scratch.sample_grad + pixel * width + v * L);
      if constexpr (Geometry || Values) {
        const T* const from = scratch.packed + corner + v * L;
        const Vec<T> origin = V::load(from);
        const Vec<T> down = V::load(from + row) - origin, right = V::load(from + width) - origin;
        const Vec<T> twist = V::load(from + row + width) - origin - right - down;
        const Vec<T> slope_y = down + tap.fraction_x * twist;
        const Vec<T> value = origin + tap.fraction_y * slope_y + tap.fraction_x * right;
        if constexpr (Geometry) {
          const Vec<T> slope_x = right + tap.fraction_y * twist;
          dot_y += grad * slope_y;
          dot_x += grad * slope_x;
          dot_mask += grad * value;
        }
        if constexpr (Values) V::store(scratch.sample_value + pixel * width + v * L, tap.mask * value);
      }
      if constexpr (Input) {
        T* const to = scratch.packed_grad + corner + v * L;
        V::store(to, V::load(to) + tap.weight[0] * grad);
        V::store(to + width, V::load(to + width) + tap.weight[1] * grad);
        V::store(to + row, V::load(to + row) + tap.weight[2] * grad);
        V::store(to + row + width, V::load(to + row + width) + tap.weight[3] * grad);
      }
    }
    if constexpr (Geometry) {
      V::store(dots[0][pixel], tap.mask * dot_y);
      V::store(dots[1][pixel], tap.mask * dot_x);
      V::store(dots[2][pixel], dot_mask);
    }
  }
  if constexpr (Geometry) {
    T* const sums[3] = {sum_y, sum_x, sum_mask};
    for (int kind = 0; kind < (sum_mask ? 3 : 2); ++kind) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = V::load(dots[kind][i]);
      V::store(sums[kind], V::load(sums[kind]) + V::row_sums(block));
    }
  }
  if constexpr (Values) {
    for (int v = 0; v < Vectors; ++v) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = V::load(scratch.sample_value + i * width + v * L);
      V::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) Stored<Column>::store(columns + (v * L + i) * tile, block[i]);
    }
  }
}

#if CPM_BF16_DOT
// Converts the tile of the output gradient to bfloat16 for the two products: grad_pairs holds pairs of outputs,
// grad_half holds pairs of pixels.
inline void make_pairs(const BackwardScratch<float>& scratch, std::int64_t outputs, std::int64_t tile) {
  using Word = Simd<std::uint32_t>;
  for (std::int64_t output = 0; output < outputs; ++output)
    convert_row(scratch.grad_tile + output * tile, scratch.grad_half + output * tile, tile);
  for (std::int64_t output = 0; output < outputs; output += 2)
    for (std::int64_t pixel = 0; pixel < tile; pixel += Word::lanes) {
      const float* const low = scratch.grad_tile + output * tile + pixel;
      const auto lower = reinterpret_cast<Word::vec>(Simd<float>::load(low)) >> 16;
      const auto upper = reinterpret_cast<Word::vec>(Simd<float>::load(low + tile)) & 0xffff0000u;
      Word::store(scratch.grad_pairs + output / 2 * tile + pixel, lower | upper);
    }
}
#endif

// Computes the gradients of one unit of one image. Adds to the gradient of the weight and to scratch.offset_sums.
template <typename S, int Vectors, bool Dot>
void backward_unit(const Problem& problem, const Unit& unit, View<const S> grad_output, View<const S> input,
                   const Compute<S>* weight, const Tap<Compute<S>>* taps, std::int64_t tile, std::int64_t image,
                   Needed needed, const BackwardScratch<Compute<S>>& scratch, View<S> grad_input,
                   Compute<S>* grad_weight) {
  using T = Compute<S>;
  constexpr int L = Simd<T>::lanes;
  constexpr std::int64_t width = L * Vectors;
  const std::int64_t count = problem.taps(), pixels = problem.pixels(), outputs = problem.out_per_group();
  const std::int64_t tiles = (pixels + tile - 1) / tile, padded = tiles * tile;
  const std::int64_t row = problem.packed_row() * width, depth = problem.in_per_group() * count;
  const std::int64_t all_outputs = outputs * unit.segments.size();
  std::int64_t sums = 0;
  for (const Segment& segment : unit.segments) sums += sum_tiles(outputs, segment.channels) * kSumTile;

  if (needed.samples()) pack<S>(problem, unit, input, image, scratch.packed, width, 0, problem.height);
  if (needed.input) std::fill_n(scratch.packed_grad, problem.packed_pixels() * width, T(0));
  if (needed.weight) std::fill_n(scratch.weight_sums, count * sums + kSumTile, T(0));
  // The gradient of the lanes past the unit's channels is zero.
  std::fill_n(scratch.column_grad + unit.channels * tile, (width - unit.channels) * tile, T(0));
  T* reordered = scratch.weight;
  for (std::int64_t tap = 0; tap < count; ++tap)
    for (const Segment& segment : unit.segments)
      for (std::int64_t o = 0; o < outputs; o += Dot ? 2 : 1)
        for (std::int64_t c = 0; c < segment.channels; ++c) {
          const T* const from = weight + (segment.first_output + o) * depth + (segment.group_channel + c) * count + tap;
          if constexpr (Dot) {
            const BFloat16 pair[2] = {Stored<BFloat16>::put(from[0]), Stored<BFloat16>::put(from[depth])};
            __builtin_memcpy(reordered++, pair, sizeof(pair));
          } else {
            *reordered++ = *from;
          }
        }

  for (std::int64_t number = 0; number < tiles; ++number) {
    const std::int64_t first = number * tile;
    load_tile<S>(grad_output, image, unit.first_output(), all_outputs, first, std::min(tile, pixels - first),
                 scratch.grad_tile, tile);
#if CPM_BF16_DOT
    if constexpr (Dot) make_pairs(scratch, all_outputs, tile);
#endif
    const T* factors = scratch.weight;
    T* weight_sums = scratch.weight_sums;
    for (std::int64_t tap = 0; tap < count; ++tap) {
      for (const Segment& segment : unit.segments) {
        const std::int64_t output = segment.first_output - unit.first_output();
        T* const column_grad = scratch.column_grad + segment.first_row * tile;
        if constexpr (Dot) {
#if CPM_BF16_DOT
          product<Pairs, true>({reinterpret_cast<const std::uint32_t*>(factors), 1, segment.channels}, segment.channels,
                               outputs / 2, scratch.grad_pairs + output / 2 * tile, column_grad, tile, tile, false);
          factors += outputs / 2 * segment.channels;
#endif
        } else {
          product<Plain<T>, true>({factors, 1, segment.channels}, segment.channels, outputs,
                                  scratch.grad_tile + output * tile, column_grad, tile, tile, false);
          factors += outputs * segment.channels;
        }
      }
      using Column = std::conditional_t<Dot, BFloat16, T>;
      Column* const columns = reinterpret_cast<Column*>(scratch.columns);
      const auto scatter_all = [&](auto with_input, auto geometry, auto values) __attribute__((always_inline)) {
        for (std::int64_t pixel = 0; pixel < tile; pixel += L) {
          T* const at = scratch.offset_sums + tap * padded + first + pixel;
          scatter<T, Column, Vectors, decltype(with_input)::value, decltype(geometry)::value, decltype(values)::value>(
              taps + (first + pixel) * count + tap * L, row, scratch, scratch.column_grad + pixel, columns + pixel,
              tile, at, at + count * padded, needed.mask ? at + 2 * count * padded : nullptr);
        }
      };
      const std::true_type yes;
      const std::false_type no;
      const bool geometry = needed.offset || needed.mask;
      if (needed.input && geometry && needed.weight)
        scatter_all(yes, yes, yes);
      else if (needed.input && geometry)
        scatter_all(yes, yes, no);
      else if (needed.input && needed.weight)
        scatter_all(yes, no, yes);
      else if (geometry && needed.weight)
        scatter_all(no, yes, yes);
      else if (needed.input)
        scatter_all(yes, no, no);
      else if (geometry)
        scatter_all(no, yes, no);
      else if (needed.weight)
        scatter_all(no, no, yes);
      if (needed.weight) {
        for (const Segment& segment : unit.segments) {
          const std::int64_t output = segment.first_output - unit.first_output();
          if constexpr (Dot) {
#if CPM_BF16_DOT
            correlation<Pairs>(reinterpret_cast<const std::uint32_t*>(scratch.grad_half + output * tile), outputs,
                               reinterpret_cast<const std::uint32_t*>(columns + segment.first_row * tile),
                               segment.channels, tile / 2, tile / 2 / L, weight_sums);
#endif
          } else {
            correlation<Plain<T>>(scratch.grad_tile + output * tile, outputs, columns + segment.first_row * tile,
                                  segment.channels, tile, tile / L, weight_sums);
          }
          weight_sums += sum_tiles(outputs, segment.channels) * kSumTile;
        }
      }
    }
  }

  if (needed.input) unpack<S>(problem, unit, scratch.packed_grad, width, grad_input, image);
  if (needed.weight) {
    const T* from = scratch.weight_sums;
    for (std::int64_t tap = 0; tap < count; ++tap)
      for (const Segment& segment : unit.segments) {
        for (std::int64_t o = 0; o < outputs; ++o)
          for (std::int64_t c = 0; c < segment.channels; ++c)
            grad_weight[(segment.first_output + o) * depth + (segment.group_channel + c) * count + tap] +=
                from[sum_index(o, c, segment.channels)];
        from += sum_tiles(outputs, segment.channels) * kSumTile;
      }
  }
}

// ------------------------------------------------------------------------------------------------------------ table

template <typename S>
KernelTable<S> make_table() {
  using T = Compute<S>;
  KernelTable<S> table;
  table.lanes = Simd<T>::lanes;
  table.sum_tile = kSumTile;
  table.sum_tiles = sum_tiles;
  table.make_taps = make_taps<S>;
  table.pack = pack<S>;
  table.store_tile = store_tile<S>;
  table.forward_tile[0] = forward_tile<Plain<T>, 1>;
  table.forward_tile[1] = forward_tile<Plain<T>, 2>;
  table.backward_unit[0] = backward_unit<S, 1, false>;
  table.backward_unit[1] = backward_unit<S, 2, false>;
#if CPM_BF16_DOT
  table.forward_tile_pairs = forward_tile<Pairs, 2>;
  table.backward_unit_pairs = backward_unit<S, 2, true>;
#endif
  return table;
}

}  // namespace CPM_ISA
}  // namespace cpm_rcnn
