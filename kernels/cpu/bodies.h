// Everything that is compiled for one set of instructions: LANES floats in a register, ROWS of a product at a time.

#include "common.h"
#include "rows.h"
#include "attention.h"

template <typename T>
void bind(py::module_& module, const char* suffix) {
  using std::int64_t;
  using std::uintptr_t;
  const auto define = [&module, suffix](const char* operation, auto function) {
    module.def((std::string(operation) + suffix).c_str(), function, py::call_guard<py::gil_scoped_release>());
  };
  define("norm_forward_", [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t total, uintptr_t out,
                             uintptr_t rstd, int64_t rows, int64_t columns, float eps) {
    norm_forward(NormCall<T>{pointer<T>(x), pointer<T>(residual), pointer<T>(weight), nullptr, pointer<T>(total),
                             pointer<T>(out), pointer<float>(rstd), nullptr, rows, columns, eps});
  });
  define("norm_backward_", [](uintptr_t x, uintptr_t through, uintptr_t weight, uintptr_t grad, uintptr_t grad_x,
                              uintptr_t rstd, uintptr_t grad_weight, int64_t rows, int64_t columns) {
    norm_backward(NormCall<T>{pointer<T>(x), pointer<T>(through), pointer<T>(weight), pointer<T>(grad), nullptr,
                              pointer<T>(grad_x), pointer<float>(rstd), pointer<float>(grad_weight), rows, columns,
                              0.0f});
  });
  define("rotate_", [](Place x, Place out, uintptr_t cos, uintptr_t sin, int64_t table_row, int64_t table_step,
                       int64_t length, int64_t batch, int64_t heads, int64_t dim, int64_t rotated, float sign) {
    rotate(RotationCall<T>{View<T>(x), View<T>(out), pointer<float>(cos), pointer<float>(sin), table_row, table_step,
                           length, batch, heads, dim, rotated, sign});
  });
  define("swiglu_", [](uintptr_t gate_up, uintptr_t grad, uintptr_t out, int64_t rows, int64_t columns) {
    swiglu(GateCall<T>{pointer<T>(gate_up), pointer<T>(grad), pointer<T>(out), rows, columns});
  });
  define("cross_entropy_", [](uintptr_t logits, int64_t logits_row, int64_t rows, int64_t columns, int64_t valid,
                              uintptr_t targets, uintptr_t stats, uintptr_t grad, int64_t first_column,
                              float z_loss, bool make_stats) {
    cross_entropy(LossCall<T>{pointer<T>(logits), logits_row, rows, columns, valid, pointer<int64_t>(targets),
                              pointer<float>(stats), pointer<float>(grad), first_column, z_loss, make_stats});
  });
  define("attention_", [](const std::array<Place, 8>& tensors, uintptr_t lse, uintptr_t first, uintptr_t last,
                          int64_t table_row, int64_t queries, int64_t keys, int64_t batch, int64_t heads,
                          int64_t kv_heads, int64_t dim, float scale) {
    const auto view = [&tensors](std::size_t index) { return View<T>(tensors[index]); };
    attention(AttentionCall<T>{view(0), view(1), view(2), view(3), view(4), view(5), view(6), view(7),
                               pointer<float>(lse), pointer<int64_t>(first), pointer<int64_t>(last), table_row,
                               queries, keys, batch, heads, kv_heads, dim, scale});
  });
}

inline void add_to(py::module_ module) {
  bind<float>(module, "float32");
  bind<Bf16>(module, "bfloat16");
}
