// The kernels of one instruction set, over contiguous groups; one source, compiled once per set.
//
// Fake quantisation makes two passes over a group: its scale, then the levels from cache. Only the
// canonical sum is floating-point work per element; see grids.h for the second pass.
//
// A caller who flushes subnormals to zero gets other sums of subnormal weights, and other values
// under subnormal scales; with scales from 1e-5 up, the default eps, every level and code is the
// same.
//
// The build sets BITCPM_GET_KERNELS to the name of the getter, and -ffp-contract=off. Everything
// else has internal linkage, see vectors.h.

#include "kernels.h"

#include "grids.h"
#include "int8.h"
#include "pack.h"

namespace bitcpm {
namespace {

template <class Type, class GridType>
void fake_quantize_groups(const typename Type::Bits* w, typename Type::Bits* wq,
                          int64_t num_groups, int64_t group_len, float eps) {
  const float one_over_n = invert_length(group_len);
  for (int64_t g = 0; g < num_groups; ++g, w += group_len, wq += group_len) {
    const float scale = compute_scale<Type, GridType>(w, group_len, one_over_n, eps);
    if (is_finite(scale))
      write_levels<Type, GridType, false>(w, wq, group_len, scale);
    else
      fill(wq, Type::kNaN, group_len);
  }
}

template <class Type, class GridType>
void quantize_groups(const typename Type::Bits* w, int8_t* codes, float* scales,
                     int64_t num_groups, int64_t group_len, float eps) {
  const float one_over_n = invert_length(group_len);
  for (int64_t g = 0; g < num_groups; ++g, w += group_len, codes += group_len) {
    const float scale = compute_scale<Type, GridType>(w, group_len, one_over_n, eps);
    scales[g] = scale;
    if (is_finite(scale))
      write_codes<Type, GridType>(w, codes, group_len, scale);
    else
      fill(codes, int8_t{0}, group_len);
  }
}

template <class Type, class GridType>
void fake_quantize_groups_with_scales(const typename Type::Bits* w, const float* scales,
                                      typename Type::Bits* wq, int64_t num_groups,
                                      int64_t group_len) {
  for (int64_t g = 0; g < num_groups; ++g, w += group_len, wq += group_len) {
    if (is_positive_finite(scales[g]))
      write_levels<Type, GridType, true>(w, wq, group_len, scales[g]);
    else
      fill(wq, Type::kNaN, group_len);
  }
}

template <class Type>
void sum_groups(const typename Type::Bits* w, float* sums, int64_t num_groups, int64_t group_len) {
  for (int64_t g = 0; g < num_groups; ++g, w += group_len) {
    const float sum = sum_abs<Type>(w, group_len);
    // Processors differ in the payload bits of NaN; here there is one NaN.
    sums[g] = sum == sum ? sum : bits_to_float(kFloat32NaN);
  }
}

// Call `body` with the format of a type, the only place that lists the formats.
template <class Body>
inline void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32: return body(Float32{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
  }
}

// Call `body` with a format and a grid, the only place that lists the grids.
template <class Body>
inline void with_type_and_grid(DType dtype, Grid grid, Body body) {
  with_type(dtype, [&](auto type) {
    switch (grid) {
      case Grid::kTernary: return body(type, Ternary{});
      case Grid::kAsym4: return body(type, Asym4{});
      case Grid::kHalfSym4: return body(type, HalfSym4{});
      case Grid::kIntSym4: return body(type, IntSym4{});
      case Grid::kFive: return body(type, Five{});
    }
  });
}

void fake_quantize(DType dtype, Grid grid, const void* w, void* wq, int64_t num_groups,
                   int64_t group_len, float eps) {
  with_type_and_grid(dtype, grid, [&](auto type, auto grid_type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    fake_quantize_groups<Type, decltype(grid_type)>(
        static_cast<const Bits*>(w), static_cast<Bits*>(wq), num_groups, group_len, eps);
  });
}

void quantize(DType dtype, Grid grid, const void* w, int8_t* codes, float* scales,
              int64_t num_groups, int64_t group_len, float eps) {
  with_type_and_grid(dtype, grid, [&](auto type, auto grid_type) {
    using Type = decltype(type);
    quantize_groups<Type, decltype(grid_type)>(static_cast<const typename Type::Bits*>(w), codes,
                                               scales, num_groups, group_len, eps);
  });
}

void fake_quantize_with_scales(DType dtype, Grid grid, const void* w, const float* scales,
                               void* wq, int64_t num_groups, int64_t group_len) {
  with_type_and_grid(dtype, grid, [&](auto type, auto grid_type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    fake_quantize_groups_with_scales<Type, decltype(grid_type)>(
        static_cast<const Bits*>(w), scales, static_cast<Bits*>(wq), num_groups, group_len);
  });
}

void abs_sums(DType dtype, const void* w, float* sums, int64_t num_groups, int64_t group_len) {
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    sum_groups<Type>(static_cast<const typename Type::Bits*>(w), sums, num_groups, group_len);
  });
}

int64_t pack2(const int8_t* codes, uint8_t* packed, int64_t rows, int64_t cols) {
  return pack_rows(codes, packed, rows, cols);
}

int64_t unpack2(const uint8_t* packed, int8_t* codes, int64_t rows, int64_t cols) {
  return unpack_rows(packed, codes, rows, cols);
}

void int8_per_token(DType dtype, const void* x, void* xq, int64_t rows, int64_t cols) {
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    const Bits* from = static_cast<const Bits*>(x);
    Bits* to = static_cast<Bits*>(xq);
    for (int64_t row = 0; row < rows; ++row, from += cols, to += cols)
      quantize_row_int8<Type>(from, to, cols);
  });
}

}  // namespace

Kernels BITCPM_GET_KERNELS() {
  return {fake_quantize, quantize, abs_sums, fake_quantize_with_scales,
          pack2,         unpack2,  int8_per_token};
}

}  // namespace bitcpm
