// How the rows of an output are shared out among the threads of a launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "layout.cuh"

namespace ptune::cuda {

constexpr int kThreads = 128;

struct Thread {
  uint3 block;
  int index;  // in the block
};

// The threads that share a row: thread `lane` of `count`.
struct Lanes {
  int lane, count;
};

// n / by for n < 2^31, as a multiplication (Granlund and Montgomery 1994): a division takes a GPU some twenty instructions, each
// waiting for the last, before a thread knows what it is to load.
struct Divider {
  uint32_t by, factor;
  int shift;  // 2^shift >= by

  static Divider over(int64_t n) {
    const auto by = static_cast<uint32_t>(std::clamp<int64_t>(n, 1, int64_t{1} << 31));
    int shift = 0;
    while ((uint64_t{1} << shift) < by) ++shift;
    return {by, static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1), shift};
  }

  PTUNE_BOTH uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * factor >> 32) + n) >> shift;
  }
};

// `rows` rows of each of `heads` heads of a batch, in blocks of rows of one head. A thread has one row at most: a loop over rows
// would make the compiler keep in registers what each way of writing a row needs, and the GPU hold fewer threads.
struct Tiling {
  int64_t groups, rows;  // batch * heads, and the rows of each
  Divider heads, tiles;  // tiles: blocks for a group
  int lane_bits;

  // For rows of `width` elements, of which a thread handles `step` at once.
  static Tiling over(int64_t batch, int64_t heads, int64_t rows, int64_t width, int64_t step) {
    if (width == 0) rows = 0;
    int bits = 0;
    while ((2 << bits) <= std::min<int64_t>(kThreads, width / step)) ++bits;
    const int64_t rows_per_block = kThreads >> bits;
    const int64_t tiles = (rows + rows_per_block - 1) / rows_per_block;
    return {batch * heads, rows, Divider::over(heads), Divider::over(tiles), bits};
  }

  // `launch` takes less than 2^31.
  int64_t blocks() const { return rows == 0 ? 0 : groups * tiles.by; }

  // Calls f(i, head, row, lanes) if this thread has a row.
  template <class F>
  PTUNE_BOTH void with_row(const Thread& t, F f) const {
    const uint32_t group = tiles.divide(t.block.x), i = heads.divide(group);
    const uint32_t tile = t.block.x - group * tiles.by, head = group - i * heads.by;
    const int64_t row = uint64_t{tile} * (uint32_t{kThreads} >> lane_bits) + (uint32_t(t.index) >> lane_bits);
    const int count = 1 << lane_bits;
    if (group < groups && row < rows) f(i, head, row, Lanes{t.index & (count - 1), count});
  }
};

// Kernel::kBlocksPerSm blocks at once bound the registers of a thread.
template <class Kernel>
__global__ void __launch_bounds__(kThreads, Kernel::kBlocksPerSm) run(const __grid_constant__ Kernel kernel) {
  kernel(Thread{blockIdx, int(threadIdx.x)});
}

// Launches kernel(Thread) and returns the launch's status. No kernel here has its threads meet, so that with PTUNE_ON_HOST, for
// tests where there is no GPU, they run on the CPU one after the other.
template <class Kernel>
int launch(const Kernel& kernel, void* stream, int64_t x, int64_t y = 1, int64_t z = 1) {
  if (x == 0 || y == 0 || z == 0) return cudaSuccess;
  if (x > INT32_MAX || y > UINT16_MAX || z > UINT16_MAX) return cudaErrorInvalidConfiguration;
  const dim3 size(x, y, z);
#ifdef PTUNE_ON_HOST
  for (unsigned c = 0; c < size.z; ++c)
    for (unsigned b = 0; b < size.y; ++b)
      for (unsigned a = 0; a < size.x; ++a)
        for (int index = 0; index < kThreads; ++index) kernel(Thread{{a, b, c}, index});
  return cudaSuccess;
#else
  run<<<size, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(kernel);
  return cudaGetLastError();
#endif
}

}  // namespace ptune::cuda
