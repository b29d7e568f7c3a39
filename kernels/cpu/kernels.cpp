// The operations of a training step on a CPU, fp32 and bf16, each in one pass over memory: `megalite.kernels._cpu`.
//
// The bodies (`common.h`, `rows.h`, `attention.h`) are compiled once for every set of instructions in `VARIANTS` below,
// in a namespace and a submodule of its own; `kernels/native.py` takes the best that this processor has. Threads are
// OpenMP's, of the same runtime as torch's own, so `torch.set_num_threads` holds here too. Tensors come in as addresses
// and sizes, checked in `kernels/native.py`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

struct Bf16 {
  std::uint16_t bits;
};

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Place = std::array<std::int64_t, 4>;  // of a tensor: address, and strides of its first three dimensions

// A tensor [S, B, N, D] whose last dimension is contiguous; strides count elements.
template <typename T>
struct View {
  T* data;
  std::int64_t s, b, n;

  explicit View(const Place& place)
      : data(pointer<T>(static_cast<std::uintptr_t>(place[0]))), s(place[1]), b(place[2]), n(place[3]) {}
  T* at(std::int64_t place, std::int64_t sequence, std::int64_t head) const {
    return data + place * s + sequence * b + head * n;
  }
};

template <typename T>
struct NormCall {  // x, residual, total, grad and out are [rows, columns]; grad_weight is [blocks of 64 rows, columns]
  const T *x, *residual, *weight, *grad;
  T *total, *out;
  float *rstd, *grad_weight;
  std::int64_t rows, columns;
  float eps;
};

template <typename T>
struct RotationCall {  // cos and sin: [length, batch, at least rotated / 2], by `table_row` and `table_step`
  View<T> x, out;
  const float *cos, *sin;
  std::int64_t table_row, table_step, length, batch, heads, dim, rotated;
  float sign;
};

template <typename T>
struct GateCall {  // gate_up [rows, 2 columns]; grad is null in the forward
  const T *gate_up, *grad;
  T* out;
  std::int64_t rows, columns;
};

template <typename T>
struct LossCall {  // logits [rows, columns] by `logits_row`, `valid` of them true; grad is null for statistics alone
  T* logits;
  std::int64_t logits_row, rows, columns, valid;
  const std::int64_t* targets;
  float* stats;
  const float* grad;
  std::int64_t first_column;
  float z_loss;
  bool make_stats;
};

template <typename T>
struct AttentionCall {  // q, out and theirs [queries, batch, heads, dim], k, v and theirs [keys, batch, kv_heads, dim];
                        // lse [batch, heads, queries]; first and last [queries] by `table_row`; grads null forward
  View<T> q, k, v, out, grad, grad_q, grad_k, grad_v;
  float* lse;
  const std::int64_t *first, *last;
  std::int64_t table_row, queries, keys, batch, heads, kv_heads, dim;
  float scale;
};

namespace base {
#define LANES 4
#define ROWS 4
#include "bodies.h"
#undef LANES
#undef ROWS
}  // namespace base

// GCC alone compiles parts of a file for other instructions this way.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDER 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
namespace avx2 {
#define LANES 8
#define ROWS 4
#include "bodies.h"
#undef LANES
#undef ROWS
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi2,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#define ROWS 8
#include "bodies.h"
#undef LANES
#undef ROWS
}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The operations of a training step on a CPU; one submodule for each set of instructions.";
  py::list usable;
  base::add_to(module.def_submodule("base"));
#if defined(WIDER)
  avx2::add_to(module.def_submodule("avx2"));
  avx512::add_to(module.def_submodule("avx512"));
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    usable.append("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    usable.append("avx2");
#endif
  usable.append("base");
  module.attr("usable") = usable;  // by this processor, the best first
}
