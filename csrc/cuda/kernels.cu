// The entry points of kernels.h on CUDA. Each is one launch, in which the threads of a block share out rows: a few threads to
// a short row, the whole block to a long one. Addresses are int64. Nothing synchronises, so a placement or a token id out of
// range is no error: nothing is read through it, and the rows that depend on it become NaN (for `overwrite`, the first
// max_length rows of hidden[i]).
#include "../kernels.h"

#include <cmath>

#include "elements.cuh"
#include "launch.cuh"

namespace ptune {
namespace cuda {
namespace {

constexpr int kMaxParts = 3;

// Packs that a thread loads before it waits for the first. More would keep more bytes under way, but fewer threads.
template <class T, int N>
constexpr int kAhead = N == 1 ? 4 : 2 * kBytes / int(sizeof(Pack<T, N>));
// Blocks that an SM holds at once, which bounds the registers of a thread. On Hopper short rows need 12 to be as fast as a copy;
// for the newer architectures, whose compiler unrolls further, and for float64 that would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <class T>
constexpr int kBlocks = std::is_same_v<T, double> ? 8 : 12;
#else
template <class T>
constexpr int kBlocks = 8;
#endif
template <class T>
constexpr int kMixedBlocks = std::min(10, kBlocks<T>);  // with more ways to make a row, 12 would spill
// Elements of a row that a thread has at once: a short row goes to few threads, each of which loads ahead.
template <class T>
constexpr int kStep = kPack<T, T> * kAhead<T, kPack<T, T>>;
constexpr int kAddendsAhead = 8;  // the same for a sum, of which there are too few threads to fill a GPU anyway

// Sources of a row: `load` what the N elements from column c on are made of, and `made` of it, as `Out`. Apart, so that all loads
// of a thread are under way before it waits for one: with both in one branch, the compiler waits in each branch.

template <class Out>
struct Constant {
  Out constant;
  struct Nothing {};
  template <int N>
  using Loaded = Nothing;
  template <int N>
  PTUNE_BOTH Nothing load(int64_t) const {
    return {};
  }
  template <int N>
  PTUNE_BOTH Pack<Out, N> made(Nothing) const {
    Pack<Out, N> out;
    for (int k = 0; k < N; ++k) out.value[k] = constant;
    return out;
  }
};

template <class Out, class In>
struct Converted {
  const In* from;
  int64_t stride;
  template <int N>
  using Loaded = Pack<In, N>;
  template <int N>
  PTUNE_BOTH Pack<In, N> load(int64_t c) const {
    return cuda::load<N>(from + c * stride);
  }
  template <int N>
  PTUNE_BOTH Pack<Out, N> made(const Pack<In, N>& in) const {
    Pack<Out, N> out;
    for (int k = 0; k < N; ++k) out.value[k] = convert<Out>(in.value[k]);
    return out;
  }
};

template <class Out>
struct Scaled {
  const Out* from;
  int64_t stride;
  Wide<Out> scale;
  template <int N>
  using Loaded = Pack<Out, N>;
  template <int N>
  PTUNE_BOTH Pack<Out, N> load(int64_t c) const {
    return cuda::load<N>(from + c * stride);
  }
  template <int N>
  PTUNE_BOTH Pack<Out, N> made(Pack<Out, N> out) const {
    for (int k = 0; k < N; ++k) out.value[k] = convert<Out>(widen(out.value[k]) * scale);
    return out;
  }
};

template <class Out>
struct Added {
  const Out* from;
  int64_t stride;
  const Wide<Out>* prompt;
  int64_t prompt_stride;
  template <int N>
  using Loaded = Pack<Out, N>;  // added at once: to hold both would take the registers of other threads
  template <int N>
  PTUNE_BOTH Loaded<N> load(int64_t c) const {
    Pack<Out, N> out = cuda::load<N>(from + c * stride);
    const Pack<Wide<Out>, N> added = cuda::load<N>(prompt + c * prompt_stride);
    for (int k = 0; k < N; ++k) out.value[k] = convert<Out>(widen(out.value[k]) + added.value[k]);
    return out;
  }
  template <int N>
  PTUNE_BOTH Pack<Out, N> made(const Pack<Out, N>& out) const {
    return out;
  }
};

// The output row that some lanes write; `wide`: it and its sources are rows of wide views.
template <class Out>
struct Row {
  Out* data;
  int64_t stride, width;
  bool wide;
  Lanes lanes;
};

// Columns [begin, end) of the row at `to` in packs of N.
template <int N, class Index, class Out, class From>
PTUNE_BOTH void write_packs(Out* to, Index stride, Lanes lanes, Index begin, Index end, const From& from) {
  constexpr int ahead = kAhead<Out, N>;
  const Index step = Index(lanes.count) * N;
  for (Index first = begin + Index(lanes.lane) * N; first < end; first += ahead * step) {
    typename From::template Loaded<N> held[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k)
      if (first + k * step < end) held[k] = from.template load<N>(first + k * step);
#pragma unroll
    for (int k = 0; k < ahead; ++k)
      if (first + k * step < end) store(to + (first + k * step) * stride, from.template made<N>(held[k]));
  }
}

template <int N, class Out, class From>
PTUNE_BOTH void write(const Row<Out>& row, const From& from) {
  const int64_t packed = row.wide ? row.width / N * N : 0;
  if (packed) write_packs<N, int64_t>(row.data, row.stride, row.lanes, 0, packed, from);
  write_packs<1, int64_t>(row.data, row.stride, row.lanes, packed, row.width, from);
}

template <class Out>
PTUNE_BOTH void fill(const Row<Out>& row, float value) {
  write<kPack<Out, Out>>(row, Constant<Out>{convert<Out>(static_cast<Wide<Out>>(value))});
}

// Row (i, h, r) of `from`, converted.
template <class Out>
PTUNE_BOTH void copy(const Row<Out>& row, const View& from, int64_t i, int64_t h, int64_t r) {
  with_type<Out>(from.dtype, [&](auto element) {
    using In = decltype(element);
    write<kPack<Out, In>>(row, Converted<Out, In>{row_at<In>(from, i, h, r), from.stride[3]});
  });
}

template <class Out>
PTUNE_BOTH Row<Out> out_row(const View& out, int64_t i, int64_t h, int64_t r, int64_t width, bool wide, Lanes lanes) {
  return {row_at<Out>(out, i, h, r), out.stride[3], width, wide, lanes};
}

struct AssemblePart {
  Assemble a;
  bool wide;
  Tiling tiling;
};

PTUNE_BOTH int64_t token_id(const Ids& ids, int64_t i, int64_t r) {
  const int64_t where = i * ids.stride[0] + r * ids.stride[1];
  return ids.wide ? static_cast<const int64_t*>(ids.data)[where] : static_cast<const int32_t*>(ids.data)[where];
}

template <class Out>
struct AssembleRows {
  [[maybe_unused]] static constexpr int kBlocksPerSm = kMixedBlocks<Out>;
  AssemblePart parts[kMaxParts];

  PTUNE_BOTH void operator()(const Thread& t) const {
    const AssemblePart& p = parts[t.block.z];
    const Assemble& a = p.a;
    p.tiling.with_row(t, [&](int64_t i, int64_t h, int64_t r, Lanes lanes) {
      const Span s = span(a.placement, i, a.pool_rows, a.text_rows, false);
      const Row<Out> row = out_row<Out>(a.out, i, h, r, a.width, p.wide, lanes);
      if (!s.valid) return fill(row, NAN);
      const Source source = assembled(s, a.placement.max_length, r);
      if (source.origin == Origin::zeros) return fill(row, 0);
      if (source.origin == Origin::prompt) return copy(row, a.prompts, 0, h, source.row);
      if (!a.ids.data) return copy(row, a.text, i, h, source.row);
      look_up(row, a, i, source.row);
    });
  }

  PTUNE_BOTH static void look_up(const Row<Out>& row, const Assemble& a, int64_t i, int64_t r) {
    const int64_t id = token_id(a.ids, i, r);
    if (id < 0 || id >= a.vocabulary) return fill(row, NAN);
    const Out* from = row_at<Out>(a.text, 0, 0, id);
    if (a.scale == 1.0) return write<kPack<Out, Out>>(row, Converted<Out, Out>{from, a.text.stride[3]});
    write<kPack<Out, Out>>(row, Scaled<Out>{from, a.text.stride[3], static_cast<Wide<Out>>(a.scale)});
  }
};

bool is_plain(const AssemblePart& p) {
  const DType out = p.a.out.dtype, wide = out == DType::f64 ? DType::f64 : DType::f32;
  return p.wide && std::max(p.tiling.rows, p.a.width) <= INT32_MAX && !p.a.placement.start.data &&
         (!p.a.ids.data || p.a.scale == 1.0) && p.a.text.dtype == out &&
         (p.a.prompts.dtype == out || p.a.prompts.dtype == wide);
}

// What AssembleRows does, as most callers have it: all wide, and so in whole packs, as the output has no gaps; texts of the
// output's dtype, no placement and no scale; rows and columns counted in 32 bits. Far less code, with which small outputs
// are written sooner. A launch hands over all parts that a kernel has room for, so that one part has a kernel of its own.
template <class Out, int kParts>
struct PlainRows {
  [[maybe_unused]] static constexpr int kBlocksPerSm = kBlocks<Out>;
  AssemblePart parts[kParts];

  explicit PlainRows(const AssemblePart* from) { std::copy_n(from, kParts, parts); }

  PTUNE_BOTH void operator()(const Thread& t) const {
    const AssemblePart& p = parts[kParts == 1 ? 0 : t.block.z];
    const Assemble& a = p.a;
    p.tiling.with_row(t, [&](int64_t i, int64_t h, int64_t row, Lanes lanes) {
      const auto r = static_cast<uint32_t>(row), m = static_cast<uint32_t>(a.placement.max_length);
      const auto width = static_cast<uint32_t>(a.width);
      Out* to = row_at<Out>(a.out, i, h, r);
      const Out* from;  // one loop serves all rows of the output's dtype
      if (r < m) {
        if (a.prompts.dtype != a.out.dtype) return copy(to, row_at<Wide<Out>>(a.prompts, 0, h, r), width, lanes);
        from = row_at<Out>(a.prompts, 0, h, r);
      } else if (!a.ids.data) {
        from = row_at<Out>(a.text, i, h, r - m);
      } else {
        const int64_t id = token_id(a.ids, i, r - m);
        if (id < 0 || id >= a.vocabulary)
          return write_all<Out>(to, width, lanes, Constant<Out>{convert<Out>(static_cast<Wide<Out>>(NAN))});
        from = row_at<Out>(a.text, 0, 0, id);
      }
      copy(to, from, width, lanes);
    });
  }

  template <class In>
  PTUNE_BOTH static void copy(Out* to, const In* from, uint32_t width, Lanes lanes) {
    write_all<In>(to, width, lanes, Converted<Out, In>{from, 1});
  }

  template <class In, class From>
  PTUNE_BOTH static void write_all(Out* to, uint32_t width, Lanes lanes, const From& from) {
#ifdef __CUDA_ARCH__
    asm("" : "+l"(to));  // or it is computed anew at each store
#endif
    write_packs<kPack<Out, In>, uint32_t>(to, 1, lanes, 0, width, from);
  }
};

struct StripPart {
  Strip s;
  bool wide;
  Tiling tiling;
};

template <class Out>
struct StripRows {
  [[maybe_unused]] static constexpr int kBlocksPerSm = kBlocks<Out>;
  StripPart parts[kMaxParts];

  PTUNE_BOTH void operator()(const Thread& t) const {
    const StripPart& p = parts[t.block.z];
    const Strip& strip = p.s;
    p.tiling.with_row(t, [&](int64_t i, int64_t h, int64_t r, Lanes lanes) {
      // What the pool held does not matter here, so any start will do.
      const Span s = span(strip.placement, i, INT64_MAX, strip.text_rows, false);
      const Row<Out> row = out_row<Out>(strip.out, i, h, r, strip.width, p.wide, lanes);
      if (!s.valid) return fill(row, NAN);
      copy(row, strip.hidden, i, h, text_row(s, strip.placement.max_length, r));
    });
  }
};

template <class Out>
struct OverwriteRows {  // tiled over all rows, or in place over `max_length` of each i
  [[maybe_unused]] static constexpr int kBlocksPerSm = kMixedBlocks<Out>;
  Overwrite o;
  bool wide;
  Tiling tiling;

  PTUNE_BOTH void operator()(const Thread& t) const {
    const bool in_place = o.out.data == o.hidden.data;
    tiling.with_row(t, [&](int64_t i, int64_t, int64_t slot, Lanes lanes) {
      const Span s = span(o.placement, i, o.pool_rows, o.rows, true);
      const int64_t r = in_place ? s.column + slot : slot;
      if (r >= o.rows) return;
      const Row<Out> row = out_row<Out>(o.out, i, 0, r, o.width, wide, lanes);
      if (!s.valid && r < o.placement.max_length) return fill(row, NAN);
      if (r >= s.column && r < s.column + s.length) return write_prompt(row, i, r, s.start + r - s.column);
      if (!in_place) copy(row, o.hidden, i, 0, r);
    });
  }

  PTUNE_BOTH void write_prompt(const Row<Out>& row, int64_t i, int64_t r, int64_t j) const {
    if (!o.add) return copy(row, o.prompts, 0, 0, j);
    write<kPack<Out, Wide<Out>>>(row, Added<Out>{row_at<Out>(o.hidden, i, 0, r), o.hidden.stride[3],
                                                 row_at<Wide<Out>>(o.prompts, 0, 0, j), o.prompts.stride[3]});
  }
};

struct SumPart {
  SumPrompts p;
  bool wide;
  Tiling tiling;
};

template <class In>
struct SumRows {
  [[maybe_unused]] static constexpr int kBlocksPerSm = 4;
  SumPart parts[kMaxParts];

  PTUNE_BOTH void operator()(const Thread& t) const {
    const SumPart& part = parts[t.block.z];
    const SumPrompts& p = part.p;
    part.tiling.with_row(t, [&](int64_t, int64_t h, int64_t j, Lanes lanes) {
      const int64_t slot = int64_t(t.block.y) * lanes.count + lanes.lane;
      constexpr int N = kPack<In, In>;
      if (part.wide && (slot + 1) * N <= p.width) return sum<N>(p, h, j, slot * N);
      const int64_t step = part.wide ? N : 1;
      for (int64_t c = slot * step; c < (slot + 1) * step && c < p.width; ++c) sum<1>(p, h, j, c);
    });
  }

  template <int N>
  PTUNE_BOTH static void sum(const SumPrompts& p, int64_t h, int64_t j, int64_t c) {
    p.placement.start.data ? sum<N, true>(p, h, j, c) : sum<N, false>(p, h, j, c);
  }

  // The N elements of pool row j from column c on, summed over the batch. Without a placement all rows of the batch have them in
  // the same place: to find it for each would take longer than to load from it.
  template <int N, bool kPlaced>
  PTUNE_BOTH static void sum(const SumPrompts& p, int64_t h, int64_t j, int64_t c) {
    const int64_t max_length = p.placement.max_length;
    const In* column = row_at<In>(p.grad, 0, h, 0) + c * p.grad.stride[3];
    Wide<In> total[N] = {}, lost[N] = {};
    bool poisoned = false;
    for (int64_t first = 0; first < p.batch; first += kAddendsAhead) {
      Pack<In, N> held[kAddendsAhead];
      bool has[kAddendsAhead];
#pragma unroll
      for (int k = 0; k < kAddendsAhead; ++k) {
        const int64_t i = first + k;
        int64_t r = j;
        has[k] = i < p.batch;
        if (kPlaced && has[k]) {
          const Span s = span(p.placement, i, p.pool_rows, p.prepended ? p.rows - max_length : p.rows, !p.prepended);
          r += s.column + (p.prepended ? max_length - s.length : 0) - s.start;
          poisoned |= !s.valid;
          has[k] = j >= s.start && j < s.start + s.length;
        }
        if (has[k]) held[k] = load<N>(column + i * p.grad.stride[0] + r * p.grad.stride[2]);
      }
#pragma unroll
      for (int k = 0; k < kAddendsAhead; ++k)
        if (has[k])
          for (int e = 0; e < N; ++e) add(total[e], lost[e], widen(held[k].value[e]));
    }
    if (p.last.data)
      with_type<In>(p.last.dtype, [&](auto element) {
        using Last = decltype(element);
        const Pack<Last, N> held = load<N>(row_at<Last>(p.last, 0, h, j) + c * p.last.stride[3]);
        for (int e = 0; e < N; ++e) add(total[e], lost[e], widen(held.value[e]));
      });
    with_type<In>(p.out.dtype, [&](auto element) {
      using Out = decltype(element);
      Pack<Out, N> out;
      for (int e = 0; e < N; ++e) out.value[e] = convert<Out>(poisoned ? Wide<In>(NAN) : total[e] + lost[e]);
      store(row_at<Out>(p.out, 0, h, j) + c, out);
    });
  }

  // Knuth's TwoSum: the exact error of the addition is kept apart. Additions alone, so there is nothing for the compiler to fuse.
  template <class T>
  PTUNE_BOTH static void add(T& total, T& lost, T value) {
    const T raised = total + value;
    const T added = raised - total;
    const T error = (total - (raised - added)) + (value - added);
    if (error == error) lost += error;  // inf - inf: an infinite sum stays infinite
    total = raised;
  }
};

// Calls f with an element of the type that `dtype` names.
template <class F>
int with_any_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f16: return f(__half{});
    case DType::bf16: return f(__nv_bfloat16{});
    case DType::f64: return f(double{});
    default: return f(float{});
  }
}

// The outs of one call have one dtype.
int launch_strips(const Strip* params, int count, void* stream) {
  return with_any_type(params[0].out.dtype, [&](auto element) {
    using Out = decltype(element);
    StripRows<Out> kernel{};
    int64_t blocks = 0;
    for (int k = 0; k < count; ++k) {
      const Strip& s = params[k];
      const Tiling tiling = Tiling::over(s.batch, s.heads, s.text_rows, s.width, kStep<Out>);
      kernel.parts[k] = {s, is_wide(s.out) && is_wide(s.hidden), tiling};
      blocks = std::max(blocks, tiling.blocks());
    }
    return launch(kernel, stream, blocks, 1, count);
  });
}

}  // namespace
}  // namespace cuda

int assemble(const Assemble* params, int count, void* stream) {
  using namespace cuda;
  return with_any_type(params[0].out.dtype, [&](auto element) {
    using Out = decltype(element);
    AssembleRows<Out> kernel{};
    bool plain = true;
    int64_t blocks = 0;
    for (int k = 0; k < count; ++k) {
      const Assemble& a = params[k];
      const int64_t rows = a.placement.max_length + a.text_rows;
      const Tiling tiling = Tiling::over(a.batch, a.heads, rows, a.width, kStep<Out>);
      kernel.parts[k] = {a, is_wide(a.out) && is_wide(a.prompts) && is_wide(a.text), tiling};
      plain = plain && is_plain(kernel.parts[k]);
      blocks = std::max(blocks, tiling.blocks());
    }
    if (!plain) return launch(kernel, stream, blocks, 1, count);
    if (count == 1) return launch(PlainRows<Out, 1>(kernel.parts), stream, blocks);
    return launch(PlainRows<Out, kMaxParts>(kernel.parts), stream, blocks, 1, count);
  });
}

int strip(const Strip& params, void* stream) { return cuda::launch_strips(&params, 1, stream); }

// A cast is a strip of no rows.
int cast(const Cast* params, int count, void* stream) {
  Strip strips[cuda::kMaxParts];
  for (int k = 0; k < count; ++k) {
    const Cast& c = params[k];
    strips[k] = {c.out, c.in, Placement{}, c.batch, c.heads, c.rows, c.width};
  }
  return cuda::launch_strips(strips, count, stream);
}

int overwrite(const Overwrite& params, void* stream) {
  using namespace cuda;
  const bool in_place = params.out.data == params.hidden.data;
  const int64_t m = params.placement.max_length;
  if (!in_place && !params.add && !params.placement.start.data) {  // prompts before the other rows
    Assemble a{params.out, params.prompts, params.hidden};
    a.text.data = after(a.text, m * a.text.stride[2]);
    a.placement = params.placement;
    a.batch = params.batch, a.heads = 1, a.text_rows = params.rows - m, a.pool_rows = m, a.width = params.width;
    return assemble(&a, 1, stream);
  }
  return with_any_type(params.out.dtype, [&](auto element) {
    using Out = decltype(element);
    const int64_t rows = in_place ? m : params.rows;
    const Tiling tiling = Tiling::over(params.batch, 1, rows, params.width, kStep<Out>);
    const bool wide = is_wide(params.out) && is_wide(params.hidden) && is_wide(params.prompts);
    return launch(OverwriteRows<Out>{params, wide, tiling}, stream, tiling.blocks());
  });
}

int sum_prompts(const SumPrompts* params, int count, void* stream) {
  using namespace cuda;
  return with_any_type(params[0].grad.dtype, [&](auto element) {
    using In = decltype(element);
    SumRows<In> kernel{};
    int64_t blocks = 0, across = 0;
    for (int k = 0; k < count; ++k) {
      const SumPrompts& p = params[k];
      const bool wide = is_wide(p.out) && is_wide(p.grad) && (!p.last.data || is_wide(p.last));
      const int64_t step = wide ? kPack<In, In> : 1;
      const Tiling tiling = Tiling::over(1, p.heads, p.pool_rows, p.width, step);
      kernel.parts[k] = {p, wide, tiling};
      blocks = std::max(blocks, tiling.blocks());
      // Few rows are written here, so a row is spread over as many blocks as it fills.
      const int64_t columns = step << tiling.lane_bits;
      across = std::max(across, (p.width + columns - 1) / columns);
    }
    return launch(kernel, stream, blocks, across, count);
  });
}

}  // namespace ptune

extern "C" const char* ptune_build() { return PTUNE_ARCHITECTURES; }

#ifndef PTUNE_ON_HOST
// A CUDA runtime, one of which is linked in here, runs on drivers of its own major version and of later ones alone.
extern "C" __attribute__((visibility("default"))) int ptune_driver_is_old() {
  int driver = 0, runtime = 0;
  const bool known = cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess;
  return known && driver > 0 && driver / 1000 < runtime / 1000;
}
#endif
