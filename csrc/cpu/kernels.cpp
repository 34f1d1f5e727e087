// The entry points of kernels.h on the CPU: rows in parallel, each handled by the functions of rows.h.
#include "../kernels.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#include "rows.h"

namespace ptune {
namespace {

// A thread gets at least this much to do: below it, waking another costs more than it saves.
constexpr int64_t kBytesPerTask = 64 * 1024;
constexpr int64_t kRowsAtOnce = 8;  // of all heads, where these are side by side in memory

const cpu::RowFunctions& choose_rows() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const char* forced = std::getenv("PTUNE_CPU_ISA");
  const auto allowed = [&](const char* isa) { return !forced || !*forced || !std::strcmp(forced, isa); };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return cpu::rows_avx512;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return cpu::rows_avx2;
#endif
  return cpu::rows_plain;
}

const cpu::RowFunctions& rows() {
  static const cpu::RowFunctions& chosen = choose_rows();
  return chosen;
}

void store_fence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

char* at(const View& v, int64_t i, int64_t h, int64_t r, int64_t c = 0) {
  const int64_t offset = i * v.stride[0] + h * v.stride[1] + r * v.stride[2] + c * v.stride[3];
  return static_cast<char*>(v.data) + offset * size_of(v.dtype);
}

// Where one row of the batch takes its prompt from and puts it.
struct Spot {
  int64_t start, length, column;
};

Spot spot(const Placement& p, int64_t i) {
  if (!p.start.data) return {0, p.max_length, 0};
  return {p.start.data[i * p.start.stride], p.length.data[i * p.length.stride], p.column.data[i * p.column.stride]};
}

// Whether an output of so many bytes is better written past the caches: it does not stay in them until it is read. Rows of many
// heads, written all over it, stay there less.
bool streams(int64_t bytes, bool scattered = false) { return bytes >= int64_t{scattered ? 4 : 16} << 20; }

// `count` rows from `from` to `to`, converted; in one go where both lie without gaps.
void convert_rows(const View& to, char* to_at, const View& from, const char* from_at, int64_t count, int64_t width,
                  bool stream = false) {
  const int64_t to_step = to.stride[2] * size_of(to.dtype), from_step = from.stride[2] * size_of(from.dtype);
  if (stream && to.dtype == from.dtype && to.stride[3] == 1 && from.stride[3] == 1) {
    rows().stream(to_at, to_step, from_at, from_step, count, width * size_of(to.dtype));
    return;
  }
  const auto convert = rows().convert[static_cast<int>(from.dtype)][static_cast<int>(to.dtype)];
  const auto dense = [&](const View& v) { return v.stride[3] == 1 && v.stride[2] == width; };
  if (dense(to) && dense(from)) {
    convert(to_at, 1, from_at, 1, count * width);
    return;
  }
  for (int64_t r = 0; r < count; ++r) convert(to_at + r * to_step, to.stride[3], from_at + r * from_step, from.stride[3], width);
}

// Calls body(outer, first, last) for stretches of rows of each of `outer` × [0, inner), shared out among threads.
template <class Body>
void for_stretches(int64_t outer, int64_t inner, int64_t bytes_per_row, Body body) {
  if (outer == 0 || inner == 0) return;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_row));
  torch::stable::parallel_for(0, outer * inner, grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin / inner; begin < end; ++o) {
      const int64_t last = std::min(end, (o + 1) * inner);
      body(o, begin - o * inner, last - o * inner);
      begin = last;
    }
    store_fence();
  });
}

// Whether the rows of all heads are read in one go, and written far apart.
bool side_by_side(int64_t heads, const View& in) { return heads > 1 && in.stride[1] < in.stride[2]; }

// Calls body(i, h, first, last) for stretches of rows of each head. Where `in` has the heads of a row side by side, as attention
// is given them, a few rows of every head come before the next rows: memory is then read in its order.
template <class Body>
void for_heads(int64_t batch, int64_t heads, int64_t rows, int64_t bytes_per_row, const View& in, Body body) {
  if (!side_by_side(heads, in)) {
    for_stretches(batch * heads, rows, bytes_per_row,
                  [&](int64_t o, int64_t first, int64_t last) { body(o / heads, o % heads, first, last); });
    return;
  }
  for_stretches(batch, rows, heads * bytes_per_row, [&](int64_t i, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r += kRowsAtOnce)
      for (int64_t h = 0; h < heads; ++h) body(i, h, r, std::min(last, r + kRowsAtOnce));
  });
}

// Asks for a row that may lie anywhere: for the beginnings of its pages, from where the processor goes on by itself.
void prefetch(const char* row, int64_t bytes) {
  for (int64_t page = 0; page < bytes; page += 4096)
    for (int64_t line = page; line < std::min<int64_t>(bytes, page + 512); line += 64) __builtin_prefetch(row + line);
}

void look_up_rows(const Assemble& a, char* to, int64_t i, int64_t first, int64_t last, bool stream) {
  const auto scale = rows().scale[static_cast<int>(a.out.dtype)];
  const int64_t bytes = a.width * size_of(a.out.dtype);
  const auto look_up = [&](int64_t r) {
    const int64_t where = i * a.ids.stride[0] + r * a.ids.stride[1];
    return at(a.text, 0, 0, a.ids.wide ? static_cast<const int64_t*>(a.ids.data)[where] : static_cast<const int32_t*>(a.ids.data)[where]);
  };
  for (int64_t r = first; r < last; ++r, to += bytes) {
    const char* from = look_up(r);
    if (r + 1 < last) prefetch(look_up(r + 1), bytes);
    if (a.scale == 1.0) {
      convert_rows(a.out, to, a.text, from, 1, a.width, stream);
    } else {
      scale(to, from, a.text.stride[3], a.scale, a.width);
    }
  }
}

// Output rows [first, last) of one (i, h): what falls into each of the four parts of Assemble.
void assemble_stretch(const Assemble& a, int64_t i, int64_t h, int64_t first, int64_t last) {
  const Spot s = spot(a.placement, i);
  const int64_t zeros = a.placement.max_length - s.length, prompt = zeros + s.column, rest = prompt + s.length;
  const int64_t rows = a.placement.max_length + a.text_rows;
  const bool stream = streams(a.batch * a.heads * rows * a.width * size_of(a.out.dtype), side_by_side(a.heads, a.text));
  const auto part = [&](int64_t begin, int64_t end, auto write) {
    const int64_t from = std::max(first, begin), to = std::min(last, end);
    if (from < to) write(at(a.out, i, h, from), from - begin, to - from);
  };
  const auto text = [&](int64_t offset) {
    return [&a, i, h, offset, stream](char* to, int64_t skip, int64_t count) {
      if (a.ids.data) {
        look_up_rows(a, to, i, offset + skip, offset + skip + count, stream);
      } else {
        convert_rows(a.out, to, a.text, at(a.text, i, h, offset + skip), count, a.width, stream);
      }
    };
  };
  part(0, zeros, [&](char* to, int64_t, int64_t count) { std::memset(to, 0, count * a.width * size_of(a.out.dtype)); });
  part(zeros, prompt, text(0));
  part(prompt, rest, [&](char* to, int64_t skip, int64_t count) {
    convert_rows(a.out, to, a.prompts, at(a.prompts, 0, h, s.start + skip), count, a.width);
  });
  part(rest, rows, text(s.column));
}

void sum_rows(const SumPrompts& p) {
  constexpr int64_t kChunk = 512;  // columns summed at once: the two running sums stay in the first-level cache
  const int64_t chunks = (p.width + kChunk - 1) / kChunk;
  const DType sum_dtype = p.grad.dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto accumulate = rows().accumulate[static_cast<int>(p.grad.dtype)];
  const auto accumulate_last = rows().accumulate[static_cast<int>(p.last.dtype)];
  const auto add = rows().add[static_cast<int>(sum_dtype)];
  const auto convert = rows().convert[static_cast<int>(sum_dtype)][static_cast<int>(p.out.dtype)];
  const int64_t bytes = p.batch * std::min(kChunk, p.width) * size_of(p.grad.dtype);
  for_stretches(p.heads * p.pool_rows, chunks, bytes, [&](int64_t o, int64_t first_chunk, int64_t last_chunk) {
    const int64_t h = o / p.pool_rows, j = o % p.pool_rows;
    for (int64_t c = first_chunk * kChunk; c < std::min(last_chunk * kChunk, p.width); c += kChunk) {
      const int64_t n = std::min(kChunk, p.width - c);
      alignas(64) double total[kChunk] = {}, lost[kChunk] = {};  // room for either dtype; zero has one pattern in both
      for (int64_t i = 0; i < p.batch; ++i) {
        const Spot s = spot(p.placement, i);
        if (j < s.start || j >= s.start + s.length) continue;
        const int64_t row = s.column + (p.prepended ? p.placement.max_length - s.length : 0) + j - s.start;
        accumulate(total, lost, at(p.grad, i, h, row, c), p.grad.stride[3], n);
      }
      if (p.last.data) accumulate_last(total, lost, at(p.last, 0, h, j, c), p.last.stride[3], n);
      add(total, 1, total, 1, lost, 1, n);
      convert(at(p.out, 0, h, j, c), 1, total, 1, n);
    }
  });
}

}  // namespace

int assemble(const Assemble* params, int count, void*) {
  for (const Assemble* a = params; a < params + count; ++a)
    for_heads(a->batch, a->heads, a->placement.max_length + a->text_rows, a->width * size_of(a->out.dtype), a->text,
              [&](int64_t i, int64_t h, int64_t first, int64_t last) { assemble_stretch(*a, i, h, first, last); });
  return 0;
}

int strip(const Strip& p, void*) {
  const bool stream = streams(p.batch * p.heads * p.text_rows * p.width * size_of(p.out.dtype));
  for_stretches(p.batch * p.heads, p.text_rows, p.width * size_of(p.out.dtype), [&](int64_t o, int64_t first, int64_t last) {
    const int64_t i = o / p.heads, h = o % p.heads;
    const Spot s = spot(p.placement, i);
    const int64_t split = std::clamp(s.column, first, last), zeros = p.placement.max_length - s.length;
    convert_rows(p.out, at(p.out, i, h, first), p.hidden, at(p.hidden, i, h, zeros + first), split - first, p.width,
                 stream);
    convert_rows(p.out, at(p.out, i, h, split), p.hidden, at(p.hidden, i, h, p.placement.max_length + split), last - split,
                 p.width, stream);
  });
  return 0;
}

int overwrite(const Overwrite& p, void*) {
  const bool in_place = p.out.data == p.hidden.data;
  const auto write = [&](int64_t i, const Spot& s, int64_t first, int64_t last) {  // rows first : last of the prompt
    if (!p.add) {
      convert_rows(p.out, at(p.out, i, 0, s.column + first), p.prompts, at(p.prompts, 0, 0, s.start + first), last - first, p.width);
      return;
    }
    const auto add = rows().add[static_cast<int>(p.hidden.dtype)];
    for (int64_t r = first; r < last; ++r)
      add(at(p.out, i, 0, s.column + r), p.out.stride[3], at(p.hidden, i, 0, s.column + r), p.hidden.stride[3],
          at(p.prompts, 0, 0, s.start + r), p.prompts.stride[3], p.width);
  };
  const int64_t bytes = p.width * size_of(p.out.dtype);
  if (in_place) {
    for_stretches(p.batch, p.placement.max_length, bytes, [&](int64_t i, int64_t first, int64_t last) {
      const Spot s = spot(p.placement, i);
      if (first < s.length) write(i, s, first, std::min(last, s.length));
    });
    return 0;
  }
  const bool stream = streams(p.batch * p.rows * bytes);
  for_stretches(p.batch, p.rows, bytes, [&](int64_t i, int64_t first, int64_t last) {
    const Spot s = spot(p.placement, i);
    const int64_t begin = std::clamp(s.column, first, last), end = std::clamp(s.column + s.length, first, last);
    convert_rows(p.out, at(p.out, i, 0, first), p.hidden, at(p.hidden, i, 0, first), begin - first, p.width, stream);
    if (begin < end) write(i, s, begin - s.column, end - s.column);
    convert_rows(p.out, at(p.out, i, 0, end), p.hidden, at(p.hidden, i, 0, end), last - end, p.width, stream);
  });
  return 0;
}

int sum_prompts(const SumPrompts* params, int count, void*) {
  for (const SumPrompts* p = params; p < params + count; ++p) sum_rows(*p);
  return 0;
}

int cast(const Cast* params, int count, void*) {
  for (const Cast* p = params; p < params + count; ++p)
    for_heads(p->batch, p->heads, p->rows, p->width * size_of(p->out.dtype), p->in,
              [&](int64_t i, int64_t h, int64_t first, int64_t last) {
                convert_rows(p->out, at(p->out, i, h, first), p->in, at(p->in, i, h, first), last - first, p->width);
              });
  return 0;
}

}  // namespace ptune

extern "C" const char* ptune_build() { return ptune::rows().isa; }
