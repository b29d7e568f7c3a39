// RMSNorm, rotation, SwiGLU and cross-entropy, a row at a time: for every set of instructions anew, see `kernels.cpp`.
//
// The formulas and their rounding are those of the plain PyTorch forms (`kernels/rms_norm.py` and so on). Sums over
// rows are made in blocks of kRows, whatever the number of threads: the result does not depend on it.

constexpr std::int64_t kRows = 64;
constexpr std::int64_t kSmall = 1 << 15;  // elements below which a second thread costs more than it brings

template <typename T>
void norm_forward(const NormCall<T>& call) {
#pragma omp parallel for schedule(static) if (call.rows * call.columns > kSmall)
  for (std::int64_t row = 0; row < call.rows; ++row) {
    const T* x = call.x + row * call.columns;
    if (call.residual != nullptr) {
      const T* residual = call.residual + row * call.columns;
      T* total = call.total + row * call.columns;
#pragma omp simd
      for (std::int64_t c = 0; c < call.columns; ++c) narrow(widen(x[c]) + widen(residual[c]), total[c]);
      x = total;
    }
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t c = 0; c < call.columns; ++c) squares += widen(x[c]) * widen(x[c]);
    const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(call.columns) + call.eps);
    call.rstd[row] = rstd;
    T* out = call.out + row * call.columns;
#pragma omp simd
    for (std::int64_t c = 0; c < call.columns; ++c) {
      narrow(rounded<T>(widen(x[c]) * rstd) * widen(call.weight[c]), out[c]);
    }
  }
}

// With n = x rstd and h = grad weight: dx = rstd (h - n mean(h n)) + what came for the sum itself; dweight = sum grad
// n.
template <typename T>
void norm_backward(const NormCall<T>& call) {
  const std::int64_t blocks = (call.rows + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) if (call.rows * call.columns > kSmall)
  for (std::int64_t block = 0; block < blocks; ++block) {
    float* grad_weight = call.grad_weight + block * call.columns;
    std::fill(grad_weight, grad_weight + call.columns, 0.0f);
    for (std::int64_t row = block * kRows; row < std::min(call.rows, (block + 1) * kRows); ++row) {
      const T *x = call.x + row * call.columns, *grad = call.grad + row * call.columns;
      const T* through = call.residual == nullptr ? nullptr : call.residual + row * call.columns;
      T* to = call.out + row * call.columns;
      const float rstd = call.rstd[row];
      float along = 0.0f;
#pragma omp simd reduction(+ : along)
      for (std::int64_t c = 0; c < call.columns; ++c) {
        const float product = widen(grad[c]) * (widen(x[c]) * rstd);
        grad_weight[c] += product;
        along += product * widen(call.weight[c]);
      }
      const float mean = along / static_cast<float>(call.columns);
      if (through == nullptr) {
#pragma omp simd
        for (std::int64_t c = 0; c < call.columns; ++c)
          narrow(rstd * (widen(grad[c]) * widen(call.weight[c]) - widen(x[c]) * rstd * mean), to[c]);
      } else {
#pragma omp simd
        for (std::int64_t c = 0; c < call.columns; ++c)
          narrow(rstd * (widen(grad[c]) * widen(call.weight[c]) - widen(x[c]) * rstd * mean) + widen(through[c]),
                 to[c]);
      }
    }
  }
}

// The first `rotated` elements of every head are turned by the angles, backwards where `sign` is -1.
template <typename T>
void rotate(const RotationCall<T>& call) {
  const std::int64_t half = call.rotated / 2;
#pragma omp parallel for schedule(static) if (call.length * call.batch * call.heads * call.dim > kSmall)
  for (std::int64_t s = 0; s < call.length; ++s) {
    for (std::int64_t b = 0; b < call.batch; ++b) {
      const float* cos = call.cos + s * call.table_row + b * call.table_step;
      const float* sin = call.sin + s * call.table_row + b * call.table_step;
      for (std::int64_t head = 0; head < call.heads; ++head) {
        const T* x = call.x.at(s, b, head);
        T* out = call.out.at(s, b, head);
#pragma omp simd
        for (std::int64_t d = 0; d < half; ++d) {
          const float first = widen(x[d]), second = widen(x[half + d]), turn = call.sign * sin[d];
          narrow(first * cos[d] - second * turn, out[d]);
          narrow(second * cos[d] + first * turn, out[half + d]);
        }
        for (std::int64_t d = call.rotated; d < call.dim; ++d) out[d] = x[d];
      }
    }
  }
}

// y = silu(gate) up; with `grad`, the gradients of both instead.
template <typename T>
void swiglu(const GateCall<T>& call) {
#pragma omp parallel for schedule(static) if (call.rows * call.columns > kSmall)
  for (std::int64_t row = 0; row < call.rows; ++row) {
    const T *gate = call.gate_up + row * 2 * call.columns, *up = gate + call.columns;
    if (call.grad == nullptr) {
      T* out = call.out + row * call.columns;
#pragma omp simd
      for (std::int64_t c = 0; c < call.columns; ++c) {
        const float g = widen(gate[c]);
        narrow(rounded<T>(g / (1.0f + exponential(-g))) * widen(up[c]), out[c]);
      }
      continue;
    }
    const T* grad = call.grad + row * call.columns;
    T *grad_gate = call.out + row * 2 * call.columns, *grad_up = grad_gate + call.columns;
#pragma omp simd
    for (std::int64_t c = 0; c < call.columns; ++c) {
      const float g = widen(gate[c]), y = widen(grad[c]), sigmoid = 1.0f / (1.0f + exponential(-g));
      narrow(y * widen(up[c]) * (sigmoid * (1.0f + g * (1.0f - sigmoid))), grad_gate[c]);
      narrow(y * rounded<T>(g * sigmoid), grad_up[c]);
    }
  }
}

// Into stats: max, sum of exp(z - max), the target's logit; exponentials of the row into `scratch`.
template <typename T>
inline void row_stats(const LossCall<T>& call, std::int64_t row, float* scratch) {
  const T* z = call.logits + row * call.logits_row;
  float top = widen(z[0]), sum = 0.0f;
#pragma omp simd reduction(max : top)
  for (std::int64_t c = 0; c < call.valid; ++c) {
    const float value = widen(z[c]);
    top = value > top ? value : top;
  }
#pragma omp simd reduction(+ : sum)
  for (std::int64_t c = 0; c < call.valid; ++c) {
    scratch[c] = exponential(widen(z[c]) - top);
    sum += scratch[c];
  }
  const std::int64_t target = call.targets[row] - call.first_column;
  float* stats = call.stats + row * 3;
  stats[0] = top;
  stats[1] = sum;
  stats[2] = target >= 0 && target < call.valid ? widen(z[target]) : 0.0f;
}

// Over the logits of a row goes grad * dloss / dz, from the exponentials in `scratch` and the whole row's statistics.
template <typename T>
inline void row_gradient(const LossCall<T>& call, std::int64_t row, const float* scratch) {
  T* z = call.logits + row * call.logits_row;
  const float grad = call.grad[row], *stats = call.stats + row * 3;
  for (std::int64_t c = call.valid; c < call.columns; ++c) narrow(0.0f, z[c]);
  if (grad == 0.0f) {
    for (std::int64_t c = 0; c < call.valid; ++c) narrow(0.0f, z[c]);
    return;
  }
  const float log_sum = std::log(stats[1]) + stats[0];
  const float scale = grad * (1.0f + 2.0f * call.z_loss * log_sum) / stats[1];
  const std::int64_t target = call.targets[row] - call.first_column;
#pragma omp simd
  for (std::int64_t c = 0; c < call.valid; ++c) narrow(scratch[c] * scale, z[c]);
  if (target >= 0 && target < call.valid) {
    volatile const float product = scratch[target] * scale;  // rounded as the others are, not inside the difference
    narrow(product - grad, z[target]);
  }
}

template <typename T>
void cross_entropy(const LossCall<T>& call) {
#pragma omp parallel if (call.rows * call.columns > kSmall)
  {
    std::vector<float> scratch(static_cast<std::size_t>(call.valid));
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < call.rows; ++row) {
      if (call.make_stats) row_stats(call, row, scratch.data());
      if (call.grad == nullptr) continue;
      if (!call.make_stats && call.grad[row] != 0.0f) {
        const T* z = call.logits + row * call.logits_row;
        const float top = call.stats[row * 3];
#pragma omp simd
        for (std::int64_t c = 0; c < call.valid; ++c) scratch[c] = exponential(widen(z[c]) - top);
      }
      row_gradient(call, row, scratch.data());
    }
  }
}
