// The ops at torch's boundary: check, allocate, fill the parameters, launch. Compiled once for each device library, with
// PTUNE_CUDA or without. Schemas and fakes are in ptune_kernels/schema.py; the meaning of each op is in kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <tuple>

#include "tensors.h"

#ifdef PTUNE_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace ptune::ops {
namespace {

using Optional = const std::optional<Tensor>&;

// Makes the tensor's device current, and hands the caller's stream to `entry`.
template <class Entry>
void launch(const Tensor& on, Entry entry) {
#ifdef PTUNE_CUDA
  const int32_t index = on.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  const int status = entry(stream);
  if (status != 0) fail<std::runtime_error>("CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
#else
  (void)on;
  entry(nullptr);
#endif
}

// The values of a placement and of ids are read here on the CPU alone: on a GPU that would synchronise, and its kernels read
// nothing out of range.
[[maybe_unused]] void check_range(const char* name, int64_t i, int64_t low, int64_t high, int64_t value) {
  if (value < low || value > high)
    fail<std::out_of_range>(name, '[', i, "]: expected ", low, " to ", high, ", got ", value);
}

void check_values(const Placement& p, int64_t batch, int64_t pool_rows, int64_t rows, bool prepended) {
#ifndef PTUNE_CUDA
  if (!p.start.data) return;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t length = p.length.data[i * p.length.stride];
    check_range("placement.length", i, 0, std::min(p.max_length, pool_rows), length);
    check_range("placement.start", i, 0, pool_rows - length, p.start.data[i * p.start.stride]);
    check_range("placement.column", i, 0, prepended ? rows : rows - length, p.column.data[i * p.column.stride]);
  }
#endif
}

void check_ids(const Ids& ids, int64_t batch, int64_t rows, int64_t vocabulary) {
#ifndef PTUNE_CUDA
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = i * ids.stride[0] + r * ids.stride[1];
      const int64_t id = ids.wide ? static_cast<const int64_t*>(ids.data)[at] : static_cast<const int32_t*>(ids.data)[at];
      check_range("input_ids", i, 0, vocabulary - 1, id);
    }
#endif
}

double rounded(double value, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return value;
    case ScalarType::Half: return c10::Half(static_cast<float>(value));
    case ScalarType::BFloat16: return c10::BFloat16(static_cast<float>(value));
    default: return static_cast<float>(value);
  }
}

Tensor embed_and_prepend(const Tensor& prompts, const Tensor& input_ids, const Tensor& embedding, Optional start,
                         Optional length, Optional column, int64_t max_length, double scale) {
  check_rank("prompts", prompts, 2);
  check_rank("input_ids", input_ids, 2);
  check_rank("embedding", embedding, 2);
  check_size("embedding", embedding, 1, prompts.size(1), "the width of prompts");
  const ScalarType id_dtype = input_ids.scalar_type();
  PTUNE_CHECK(id_dtype == ScalarType::Long || id_dtype == ScalarType::Int,
              "input_ids: expected torch.int64 or torch.int32, got ", name_of(id_dtype));
  check_prompt_dtype(prompts, "embedding", embedding);
  check_device("embedding", embedding, "prompts", prompts);
  check_device("input_ids", input_ids, "prompts", prompts);

  Assemble a{};
  a.batch = input_ids.size(0), a.heads = 1, a.text_rows = input_ids.size(1);
  a.pool_rows = prompts.size(0), a.width = prompts.size(1), a.vocabulary = embedding.size(0);
  a.placement = placement({start, length, column, max_length}, input_ids, a.pool_rows);
  a.ids = {input_ids.const_data_ptr(), id_dtype == ScalarType::Long, {input_ids.stride(0), input_ids.stride(1)}};
  a.scale = rounded(scale, embedding.scalar_type());
  check_values(a.placement, a.batch, a.pool_rows, a.text_rows, true);
  check_ids(a.ids, a.batch, a.text_rows, a.vocabulary);

  const Tensor out = empty(embedding, embedding.scalar_type(), {a.batch, a.placement.max_length + a.text_rows, a.width});
  a.out = view("out", out, true);
  a.prompts = pool_view("prompts", prompts);
  a.text = view("embedding", embedding);
  launch(out, [&](void* stream) { return assemble(&a, 1, stream); });
  return out;
}

Tensor prepend(const Tensor& prompts, const Tensor& hidden, Optional start, Optional length, Optional column,
               int64_t max_length) {
  check_rank("prompts", prompts, 2);
  check_rank("hidden", hidden, 3);
  check_size("prompts", prompts, 1, hidden.size(2), "the width of hidden");
  check_prompt_dtype(prompts, "hidden", hidden);
  check_device("prompts", prompts, "hidden", hidden);

  Assemble a{};
  a.batch = hidden.size(0), a.heads = 1, a.text_rows = hidden.size(1);
  a.pool_rows = prompts.size(0), a.width = prompts.size(1);
  a.placement = placement({start, length, column, max_length}, hidden, a.pool_rows);
  check_values(a.placement, a.batch, a.pool_rows, a.text_rows, true);

  const Tensor out = empty(hidden, hidden.scalar_type(), {a.batch, a.placement.max_length + a.text_rows, a.width});
  a.out = view("out", out, true);
  a.prompts = pool_view("prompts", prompts);
  a.text = view("hidden", hidden);
  launch(out, [&](void* stream) { return assemble(&a, 1, stream); });
  return out;
}

Tensor strip(const Tensor& hidden, Optional start, Optional length, Optional column, int64_t max_length,
             std::optional<ScalarType> dtype) {
  check_rank("hidden", hidden, 3, 4);
  float_dtype("hidden", hidden.scalar_type());
  const ScalarType out_dtype = dtype.value_or(hidden.scalar_type());
  check_converts("dtype", out_dtype, hidden.scalar_type());
  const bool has_heads = hidden.dim() == 4;
  const int64_t rows = hidden.size(hidden.dim() - 2);
  PTUNE_CHECK(0 <= max_length && max_length <= rows, "max_length: expected 0 to ", rows, " (the rows of hidden), got ",
              max_length);

  Strip s{};
  s.batch = hidden.size(0), s.heads = has_heads ? hidden.size(1) : 1;
  s.text_rows = rows - max_length, s.width = hidden.size(hidden.dim() - 1);
  s.placement = placement({start, length, column, max_length}, hidden, max_length);
  // What the pool held does not matter here, so any start would do.
  check_values(s.placement, s.batch, int64_t{1} << 32, s.text_rows, true);

  const Tensor out = has_heads ? empty(hidden, out_dtype, {s.batch, s.heads, s.text_rows, s.width})
                               : empty(hidden, out_dtype, {s.batch, s.text_rows, s.width});
  s.out = view("out", out, true);
  s.hidden = view("hidden", hidden);
  launch(out, [&](void* stream) { return ptune::strip(s, stream); });
  return out;
}

void overwrite_into(const Tensor& out, const Tensor& hidden, const Tensor& prompts, Overwrite& o) {
  o.out = view("out", out, true);
  o.hidden = view("hidden", hidden);
  o.prompts = pool_view("prompts", prompts);
  launch(hidden, [&](void* stream) { return ptune::overwrite(o, stream); });
}

Overwrite check_overwrite(const Tensor& hidden, const Tensor& prompts, Optional start, Optional length, Optional column,
                          int64_t max_length, bool add) {
  check_rank("hidden", hidden, 3);
  check_rank("prompts", prompts, 2);
  check_size("prompts", prompts, 1, hidden.size(2), "the width of hidden");
  check_prompt_dtype(prompts, "hidden", hidden);
  check_device("prompts", prompts, "hidden", hidden);

  Overwrite o{};
  o.batch = hidden.size(0), o.rows = hidden.size(1), o.pool_rows = prompts.size(0), o.width = hidden.size(2);
  o.add = add;
  o.placement = placement({start, length, column, max_length}, hidden, o.pool_rows);
  if (!start)
    PTUNE_CHECK(o.pool_rows <= o.rows, "prompts: expected at most ", o.rows, " rows (the rows of hidden), got ", o.pool_rows);
  check_values(o.placement, o.batch, o.pool_rows, o.rows, false);
  return o;
}

Tensor overwrite(const Tensor& hidden, const Tensor& prompts, Optional start, Optional length, Optional column,
                 int64_t max_length, bool add) {
  Overwrite o = check_overwrite(hidden, prompts, start, length, column, max_length, add);
  const Tensor out = empty(hidden, hidden.scalar_type(), {o.batch, o.rows, o.width});
  overwrite_into(out, hidden, prompts, o);
  return out;
}

void overwrite_(const Tensor& hidden, const Tensor& prompts, Optional start, Optional length, Optional column,
                int64_t max_length, bool add) {
  for (int64_t dim = 0; dim < hidden.dim(); ++dim)
    PTUNE_CHECK(hidden.stride(dim) != 0 || hidden.size(dim) <= 1,
                "hidden: expected every element to have its own memory, got dimension ", dim, " expanded");
  Overwrite o = check_overwrite(hidden, prompts, start, length, column, max_length, add);
  overwrite_into(hidden, hidden, prompts, o);
}

std::tuple<Tensor, Tensor> prepend_kv(const Tensor& prefix_k, const Tensor& prefix_v, const Tensor& key,
                                      const Tensor& value, Optional start, Optional length, Optional column,
                                      int64_t max_length, std::optional<ScalarType> dtype) {
  check_rank("prefix_k", prefix_k, 3);
  check_rank("prefix_v", prefix_v, 3);
  check_rank("key", key, 4);
  check_rank("value", value, 4);
  check_device("prefix_k", prefix_k, "key", key);
  check_device("prefix_v", prefix_v, "key", key);
  check_device("value", value, "key", key);
  float_dtype("key", key.scalar_type());
  check_dtype("value", value.scalar_type(), key.scalar_type());
  check_converts("prefix_k", prefix_k.scalar_type(), key.scalar_type());
  check_converts("prefix_v", prefix_v.scalar_type(), key.scalar_type());
  const ScalarType out_dtype = dtype.value_or(key.scalar_type());
  check_converts("dtype", out_dtype, key.scalar_type());
  check_size("value", value, 0, key.size(0), "the batch of key");
  check_size("value", value, 1, key.size(1), "the heads of key");
  check_size("value", value, 2, key.size(2), "the rows of key");
  check_size("prefix_k", prefix_k, 0, key.size(1), "the heads of key");
  check_size("prefix_v", prefix_v, 0, key.size(1), "the heads of key");
  check_size("prefix_v", prefix_v, 1, prefix_k.size(1), "the rows of prefix_k");
  check_size("prefix_k", prefix_k, 2, key.size(3), "the head width of key");
  check_size("prefix_v", prefix_v, 2, value.size(3), "the head width of value");

  Assemble k{};
  k.batch = key.size(0), k.heads = key.size(1), k.text_rows = key.size(2);
  k.pool_rows = prefix_k.size(1), k.width = key.size(3);
  k.placement = placement({start, length, column, max_length}, key, k.pool_rows);
  check_values(k.placement, k.batch, k.pool_rows, k.text_rows, true);
  Assemble v = k;
  v.width = value.size(3);

  const int64_t rows = k.placement.max_length + k.text_rows;
  const Tensor out_k = empty(key, out_dtype, {k.batch, k.heads, rows, k.width});
  const Tensor out_v = empty(key, out_dtype, {k.batch, k.heads, rows, v.width});
  k.out = view("out_k", out_k, true), k.prompts = pool_view("prefix_k", prefix_k), k.text = view("key", key);
  v.out = view("out_v", out_v, true), v.prompts = pool_view("prefix_v", prefix_v), v.text = view("value", value);
  const Assemble both[] = {k, v};
  launch(key, [&](void* stream) { return assemble(both, 2, stream); });
  return {out_k, out_v};
}

// Rows of all heads, one after the other: [b·rows, heads, width] as [b, heads, rows, width].
View by_text(const char* name, const Tensor& t, int64_t rows, bool written = false) {
  View v = view(name, t, written);
  const int64_t row = t.stride(0), head = t.stride(1);
  v.stride[0] = rows * row, v.stride[1] = head, v.stride[2] = row;
  return v;
}

std::tuple<Tensor, Tensor> spread_kv(const Tensor& key, const Tensor& value, int64_t num_prompts, int64_t batch_size,
                                     std::optional<ScalarType> dtype) {
  const Tensor* packed[] = {&key, &value};
  const char* names[] = {"key", "value"};
  for (int k = 0; k < 2; ++k) {
    check_rank(names[k], *packed[k], 4);
    check_size(names[k], *packed[k], 0, 1, "one sequence");
  }
  const ScalarType out_dtype = dtype.value_or(key.scalar_type());
  check_device("value", value, "key", key);
  float_dtype("key", key.scalar_type());
  check_dtype("value", value.scalar_type(), key.scalar_type());
  check_converts("dtype", out_dtype, key.scalar_type());
  check_size("value", value, 1, key.size(1), "the heads of key");
  check_size("value", value, 2, key.size(2), "the rows of key");
  const int64_t text_rows = key.size(2) - num_prompts;
  PTUNE_CHECK(0 <= num_prompts && text_rows >= 0, "num_prompts: expected 0 to ", key.size(2), " (the rows of key), got ",
              num_prompts);
  PTUNE_CHECK(batch_size >= 1 && text_rows % batch_size == 0, "batch_size: expected a divisor of ", text_rows,
              " rows of text, got ", batch_size);

  const int64_t length = text_rows / batch_size, rows = num_prompts + length;
  Tensor outs[2];
  Assemble parts[2];
  for (int k = 0; k < 2; ++k) {
    const Tensor& t = *packed[k];
    Assemble a{};
    a.batch = batch_size, a.heads = t.size(1), a.text_rows = length, a.pool_rows = num_prompts, a.width = t.size(3);
    a.placement.max_length = num_prompts;
    outs[k] = empty(t, out_dtype, {batch_size * rows, a.heads, a.width});
    a.out = by_text("out", outs[k], rows, true);
    a.prompts = a.text = view(names[k], t);
    a.text.data = after(a.text, num_prompts * a.text.stride[2]);
    a.text.stride[0] = length * a.text.stride[2];
    parts[k] = a;
  }
  launch(key, [&](void* stream) { return assemble(parts, 2, stream); });
  return {outs[0], outs[1]};
}

Tensor sum_prompts(const Tensor& grad, int64_t num_prompts, Optional start, Optional length, Optional column,
                   int64_t max_length, bool prepended, ScalarType dtype) {
  check_rank("grad", grad, 3, 4);
  float_dtype("grad", grad.scalar_type());
  check_converts("dtype", dtype, grad.scalar_type());
  PTUNE_CHECK(num_prompts >= 0, "num_prompts: expected at least 0, got ", num_prompts);
  const bool has_heads = grad.dim() == 4;

  SumPrompts s{};
  s.batch = grad.size(0), s.heads = has_heads ? grad.size(1) : 1;
  s.rows = grad.size(grad.dim() - 2), s.pool_rows = num_prompts, s.width = grad.size(grad.dim() - 1);
  s.prepended = prepended;
  s.placement = placement({start, length, column, max_length}, grad, num_prompts);
  if (!start)
    PTUNE_CHECK(num_prompts <= s.rows, "num_prompts: expected at most ", s.rows, " (the rows of grad), got ", num_prompts);
  check_values(s.placement, s.batch, s.pool_rows, prepended ? s.rows - s.placement.max_length : s.rows, prepended);

  const Tensor out =
      has_heads ? empty(grad, dtype, {s.heads, num_prompts, s.width}) : empty(grad, dtype, {num_prompts, s.width});
  s.out = pool_view("out", out);
  s.grad = view("grad", grad);
  launch(out, [&](void* stream) { return ptune::sum_prompts(&s, 1, stream); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> cast_qkv(const Tensor& query, const Tensor& key, const Tensor& value,
                                            ScalarType dtype) {
  const Tensor* in[] = {&query, &key, &value};
  const char* names[] = {"query", "key", "value"};
  for (int i = 0; i < 3; ++i) {
    check_rank(names[i], *in[i], 4);
    check_device(names[i], *in[i], "query", query);
    float_dtype(names[i], in[i]->scalar_type());
    check_converts("dtype", dtype, in[i]->scalar_type());
  }
  Tensor outs[3];
  Cast casts[3];
  for (int i = 0; i < 3; ++i) {
    const Tensor& t = *in[i];
    outs[i] = empty(t, dtype, {t.size(0), t.size(1), t.size(2), t.size(3)});
    casts[i] = {view("out", outs[i], true), view(names[i], t), t.size(0), t.size(1), t.size(2), t.size(3)};
  }
  launch(query, [&](void* stream) { return cast(casts, 3, stream); });
  return {outs[0], outs[1], outs[2]};
}

// One gradient of a packed sequence from those of its parts: [1, heads, m + b·n, width], rows first in memory.
struct Join {
  Tensor out;
  Cast text;
  SumPrompts prompt;
};

// `text` [b, heads, n, width] is copied; the first rows of each of `summed` are added up.
Join join(const Tensor& like, ScalarType dtype, const View& text, const View& summed, int64_t num_prompts, int64_t batch,
          int64_t rows, int64_t heads, int64_t width) {
  const int64_t packed = num_prompts + batch * rows, strides[] = {packed * heads * width, width, heads * width, 1};
  Join j{empty_strided(like, dtype, {1, heads, packed, width}, strides), {}, {}};
  View out = view("out", j.out, true);
  out.stride[0] = rows * heads * width;
  j.prompt.out = out, j.prompt.grad = summed;
  j.prompt.placement.max_length = num_prompts, j.prompt.prepended = true;
  j.prompt.batch = batch, j.prompt.heads = heads, j.prompt.rows = num_prompts + rows;
  j.prompt.pool_rows = num_prompts, j.prompt.width = width;
  out.data = after(out, num_prompts * heads * width);
  j.text = {out, text, batch, heads, rows, width};
  return j;
}

template <int N>
void launch_joins(const Tensor& on, const Join (&joins)[N]) {
  Cast casts[N];
  SumPrompts sums[N];
  for (int k = 0; k < N; ++k) casts[k] = joins[k].text, sums[k] = joins[k].prompt;
  launch(on, [&](void* stream) {
    const int status = cast(casts, N, stream);
    return status != 0 ? status : ptune::sum_prompts(sums, N, stream);
  });
}

std::tuple<Tensor, Tensor> unspread_kv(const Tensor& key, const Tensor& value, int64_t num_prompts, int64_t batch_size,
                                       ScalarType dtype) {
  const Tensor* grads[] = {&key, &value};
  const char* names[] = {"key", "value"};
  for (int k = 0; k < 2; ++k) check_rank(names[k], *grads[k], 3);
  check_device("value", value, "key", key);
  check_dtype("value", value.scalar_type(), key.scalar_type());
  check_converts("dtype", dtype, key.scalar_type());
  check_size("value", value, 0, key.size(0), "the rows of key");
  PTUNE_CHECK(batch_size >= 1 && key.size(0) % batch_size == 0, "batch_size: expected a divisor of ", key.size(0), " rows, got ",
              batch_size);
  const int64_t rows = key.size(0) / batch_size;
  PTUNE_CHECK(0 <= num_prompts && num_prompts <= rows, "num_prompts: expected 0 to ", rows, " (the rows of a text), got ",
              num_prompts);
  Join joins[2];
  for (int k = 0; k < 2; ++k) {
    const Tensor& t = *grads[k];
    const View grad = by_text(names[k], t, rows);
    View text = grad;
    text.data = after(text, num_prompts * text.stride[2]);
    joins[k] = join(t, dtype, text, grad, num_prompts, batch_size, rows - num_prompts, t.size(1), t.size(2));
  }
  launch_joins(key, joins);
  return {joins[0].out, joins[1].out};
}

std::tuple<Tensor, Tensor, Tensor> join_qkv(const Tensor& query, const Tensor& key, const Tensor& value,
                                            Optional prompt_query, Optional prompt_key, Optional prompt_value,
                                            int64_t num_prompts, ScalarType dtype) {
  const Tensor* texts[] = {&query, &key, &value};
  const std::optional<Tensor>* prompts[] = {&prompt_query, &prompt_key, &prompt_value};
  const char* names[] = {"query", "key", "value", "prompt_query", "prompt_key", "prompt_value"};
  PTUNE_CHECK(num_prompts >= 0, "num_prompts: expected at least 0, got ", num_prompts);
  for (int k = 0; k < 3; ++k) {
    const Tensor& t = *texts[k];
    check_rank(names[k], t, 4);
    check_device(names[k], t, "query", query);
    float_dtype(names[k], t.scalar_type());
    check_converts("dtype", dtype, t.scalar_type());
    check_size(names[k], t, 0, query.size(0), "the batch of query");
    if (k > 0) check_size(names[k], t, 2, num_prompts + query.size(2), "num_prompts and the rows of query");
    if (!*prompts[k]) continue;
    const Tensor& prompt = **prompts[k];
    const char* name = names[3 + k];
    check_rank(name, prompt, 4);
    check_device(name, prompt, "query", query);
    float_dtype(name, prompt.scalar_type());
    check_converts(name, prompt.scalar_type(), t.scalar_type());
    check_size(name, prompt, 0, 1, "one prompt");
    check_size(name, prompt, 1, t.size(1), "the heads of its text");
    check_size(name, prompt, 2, num_prompts, "num_prompts");
    check_size(name, prompt, 3, t.size(3), "the head width of its text");
  }
  check_dtype("value", value.scalar_type(), key.scalar_type());

  Join joins[3];
  for (int k = 0; k < 3; ++k) {
    const Tensor& t = *texts[k];
    const View grad = view(names[k], t);
    View text = grad;
    if (k > 0) text.data = after(text, num_prompts * text.stride[2]);
    // No text has a gradient for the prompt's query, and all that are summed in one launch are of one dtype.
    joins[k] = join(t, dtype, text, k == 0 ? view("key", key) : grad, num_prompts, query.size(0), query.size(2), t.size(1), t.size(3));
    if (k == 0) joins[k].prompt.batch = 0;
    if (*prompts[k]) joins[k].prompt.last = view(names[3 + k], **prompts[k]);
  }
  launch_joins(query, joins);
  return {joins[0].out, joins[1].out, joins[2].out};
}

}  // namespace
}  // namespace ptune::ops

#ifdef PTUNE_CUDA
STABLE_TORCH_LIBRARY_IMPL(ptune_native, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ptune_native, CPU, m) {
#endif
  m.impl("embed_and_prepend", TORCH_BOX(&ptune::ops::embed_and_prepend));
  m.impl("prepend", TORCH_BOX(&ptune::ops::prepend));
  m.impl("strip", TORCH_BOX(&ptune::ops::strip));
  m.impl("overwrite", TORCH_BOX(&ptune::ops::overwrite));
  m.impl("overwrite_", TORCH_BOX(&ptune::ops::overwrite_));
  m.impl("prepend_kv", TORCH_BOX(&ptune::ops::prepend_kv));
  m.impl("sum_prompts", TORCH_BOX(&ptune::ops::sum_prompts));
  m.impl("cast_qkv", TORCH_BOX(&ptune::ops::cast_qkv));
  m.impl("spread_kv", TORCH_BOX(&ptune::ops::spread_kv));
  m.impl("unspread_kv", TORCH_BOX(&ptune::ops::unspread_kv));
  m.impl("join_qkv", TORCH_BOX(&ptune::ops::join_qkv));
}
