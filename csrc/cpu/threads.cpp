#include "threads.h"

#include <algorithm>
#include <atomic>

namespace bitcpm {
namespace {

// A thread is worth waking for this many elements (torch's grain size).
constexpr int64_t kElementsPerThread = 32768;

struct Size {
  int64_t num_groups, group_len;
};

// Call body(job, first, count) for contiguous ranges of groups that cover every job once. Each
// thread takes an equal share of the elements of all jobs together, and of a group the thread in
// whose share it starts takes all.
template <class SizeOf, class Body>
void for_ranges(int64_t num_jobs, SizeOf size_of_job, int threads, Body body) {
  int64_t total = 0;
  for (int64_t job = 0; job < num_jobs; ++job) {
    const Size size = size_of_job(job);
    total += size.num_groups * size.group_len;
  }
  const int64_t parts = std::min<int64_t>(threads, total / kElementsPerThread);
  if (parts <= 1) {
    for (int64_t job = 0; job < num_jobs; ++job) body(job, int64_t{0}, size_of_job(job).num_groups);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = total / parts * part + std::min(total % parts, part);
    const int64_t end = begin + total / parts + (part < total % parts);
    int64_t start = 0;  // of the job, in elements
    for (int64_t job = 0; job < num_jobs && start < end; ++job) {
      const Size size = size_of_job(job);
      if (size.num_groups * size.group_len == 0) continue;
      // The first group that starts at or behind an element.
      const auto find_group = [&](int64_t element) {
        const int64_t group = (element - start + size.group_len - 1) / size.group_len;
        return element <= start ? int64_t{0} : std::min(group, size.num_groups);
      };
      const int64_t first = find_group(begin), last = find_group(end);
      if (first < last) body(job, first, last - first);
      start += size.num_groups * size.group_len;
    }
  }
}

// The same for one tensor: body(first, count).
template <class Body>
void for_ranges(int64_t num_groups, int64_t group_len, int threads, Body body) {
  for_ranges(
      1, [=](int64_t) { return Size{num_groups, group_len}; }, threads,
      [&](int64_t, int64_t first, int64_t count) { body(first, count); });
}

template <class SizeOf, class Body>
void for_jobs(const std::vector<Job>& jobs, SizeOf size_of_job, int threads, Body body) {
  for_ranges(static_cast<int64_t>(jobs.size()), size_of_job, threads,
             [&](int64_t index, int64_t first, int64_t count) {
               body(jobs[static_cast<size_t>(index)], first, count);
             });
}

auto make_size_of(const std::vector<Job>& jobs) {
  return [&jobs](int64_t index) {
    const Job& job = jobs[static_cast<size_t>(index)];
    return Size{job.num_groups, job.group_len};
  };
}

const char* advance(const void* from, int64_t bytes) {
  return static_cast<const char*>(from) + bytes;
}

char* advance(void* from, int64_t bytes) { return static_cast<char*>(from) + bytes; }

// Rows of each thread that hold something invalid, reduced to the first one.
class FirstBadRow {
 public:
  // `found` counts from `first`; -1 is none.
  void add(int64_t first, int64_t found) {
    if (found < 0) return;
    int64_t before = row_.load();
    while (first + found < before && !row_.compare_exchange_weak(before, first + found)) {
    }
  }
  int64_t get() const { return row_.load() == kNone ? -1 : row_.load(); }

 private:
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> row_{kNone};
};

}  // namespace

void fake_quantize(const Kernels& kernels, const std::vector<Job>& jobs, Grid grid, float eps,
                   int threads) {
  for_jobs(jobs, make_size_of(jobs), threads, [&](const Job& job, int64_t first, int64_t count) {
    const int64_t offset = first * job.group_len * size_of(job.dtype);
    kernels.fake_quantize(job.dtype, grid, advance(job.w, offset), advance(job.wq, offset), count,
                          job.group_len, eps);
  });
}

void fake_quantize_with_scales(const Kernels& kernels, const std::vector<Job>& jobs, Grid grid,
                               int threads) {
  for_jobs(jobs, make_size_of(jobs), threads, [&](const Job& job, int64_t first, int64_t count) {
    const int64_t offset = first * job.group_len * size_of(job.dtype);
    kernels.fake_quantize_with_scales(job.dtype, grid, advance(job.w, offset), job.scales + first,
                                      advance(job.wq, offset), count, job.group_len);
  });
}

void quantize(const Kernels& kernels, DType dtype, Grid grid, const void* w, int8_t* codes,
              float* scales, int64_t num_groups, int64_t group_len, float eps, int threads) {
  for_ranges(num_groups, group_len, threads, [&](int64_t first, int64_t count) {
    const int64_t element = first * group_len;
    kernels.quantize(dtype, grid, advance(w, element * size_of(dtype)), codes + element,
                     scales + first, count, group_len, eps);
  });
}

void abs_sums(const Kernels& kernels, DType dtype, const void* w, float* sums, int64_t num_groups,
              int64_t group_len, int threads) {
  for_ranges(num_groups, group_len, threads, [&](int64_t first, int64_t count) {
    kernels.abs_sums(dtype, advance(w, first * group_len * size_of(dtype)), sums + first, count,
                     group_len);
  });
}

int64_t pack2(const Kernels& kernels, const int8_t* codes, uint8_t* packed, int64_t rows,
              int64_t cols, int threads) {
  const int64_t row_bytes = count_pack_blocks(cols) * kPackBytes;
  FirstBadRow bad;
  for_ranges(rows, cols, threads, [&](int64_t first, int64_t count) {
    bad.add(first,
            kernels.pack2(codes + first * cols, packed + first * row_bytes, count, cols));
  });
  return bad.get();
}

int64_t unpack2(const Kernels& kernels, const uint8_t* packed, int8_t* codes, int64_t rows,
                int64_t cols, int threads) {
  const int64_t row_bytes = count_pack_blocks(cols) * kPackBytes;
  FirstBadRow bad;
  for_ranges(rows, cols, threads, [&](int64_t first, int64_t count) {
    bad.add(first,
            kernels.unpack2(packed + first * row_bytes, codes + first * cols, count, cols));
  });
  return bad.get();
}

void int8_per_token(const Kernels& kernels, DType dtype, const void* x, void* xq, int64_t rows,
                    int64_t cols, int threads) {
  for_ranges(rows, cols, threads, [&](int64_t first, int64_t count) {
    const int64_t offset = first * cols * size_of(dtype);
    kernels.int8_per_token(dtype, advance(x, offset), advance(xq, offset), count, cols);
  });
}

}  // namespace bitcpm
