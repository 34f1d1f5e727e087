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

// `rows` rows of each of `groups` groups, in blocks of rows of one group. A thread has one row at most: a loop over rows would
// make the compiler keep in registers what each way of writing a row needs, and the GPU hold fewer threads.
struct Tiling {
  int64_t groups, rows;
  int64_t tiles;  // blocks for a group
  int lane_bits;

  // For rows of `width` elements, of which a thread handles `step` at once.
  static Tiling over(int64_t groups, int64_t rows, int64_t width, int64_t step) {
    if (width == 0) rows = 0;
    int bits = 0;
    while ((2 << bits) <= std::min<int64_t>(kThreads, width / step)) ++bits;
    const int64_t rows_per_block = kThreads >> bits;
    return {groups, rows, std::max<int64_t>(1, (rows + rows_per_block - 1) / rows_per_block), bits};
  }

  int64_t blocks() const { return rows == 0 ? 0 : groups * tiles; }

  // Calls f(group, row, lanes) if this thread has a row.
  template <class F>
  PTUNE_BOTH void with_row(const Thread& t, F f) const {
    // `launch` takes less than 2^31 blocks, so 32 bits will do, for the one division that a thread makes.
    const uint32_t group = t.block.x / static_cast<uint32_t>(tiles), tile = t.block.x % static_cast<uint32_t>(tiles);
    const int64_t row = int64_t(tile) * (kThreads >> lane_bits) + (t.index >> lane_bits);
    const int count = 1 << lane_bits;
    if (group < groups && row < rows) f(group, row, Lanes{t.index & (count - 1), count});
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
