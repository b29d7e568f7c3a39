// Attention for training, forward and backward, in fp32: for every set of instructions anew, see `kernels.cpp`.
//
// A task is one kv head of one sequence with all query heads that read it. Keys and values are packed once, each also
// transposed, so that every product is of the one kind that `multiply` does: a few rows against a packed matrix, the
// sums in registers. The scores of a few queries against all keys that they see stay in the cache and are never
// written (Dao et al. 2022, "FlashAttention", section 3.1, with whole rows in the place of tiles); the backward makes
// them again from the log-sum-exp. Query i sees the keys [first[i], last[i]), without tables [0, i]: windows, documents
// and parts of a sequence are such ranges.

typedef float Vector __attribute__((vector_size(4 * LANES)));

constexpr std::int64_t kBlock = 16;         // queries at a time
constexpr std::int64_t kChunk = 2 * LANES;  // columns of one `multiply`
static_assert(kBlock % ROWS == 0, "blocks of queries are whole groups of rows");

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// c[i][n] (+)= sum over k of a[i * row + k * step] * b[k][n], for ROWS rows i and kChunk columns n.
template <bool kAdd>
inline void multiply(const float* a, std::int64_t row, std::int64_t step, const float* b, std::int64_t b_row,
                     std::int64_t depth, float* c, std::int64_t c_row) {
  Vector sums[ROWS][2];
  for (int i = 0; i < ROWS; ++i) {
    sums[i][0] = kAdd ? load(c + i * c_row) : Vector{};
    sums[i][1] = kAdd ? load(c + i * c_row + LANES) : Vector{};
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const Vector left = load(b + k * b_row), right = load(b + k * b_row + LANES);
    for (int i = 0; i < ROWS; ++i) {
      const float factor = a[i * row + k * step];
      sums[i][0] += factor * left;
      sums[i][1] += factor * right;
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    std::memcpy(c + i * c_row, &sums[i][0], sizeof(Vector));
    std::memcpy(c + i * c_row + LANES, &sums[i][1], sizeof(Vector));
  }
}

// What one thread works in. `width` is the head's, `keys` the sequence's extent, in whole chunks; rows of keys are one
// register longer, since rows a power of two apart would meet in the same lines of the cache.
struct AttentionScratch {
  std::int64_t width, keys;
  std::vector<float> k, v, grad_k, grad_v;  // [S, width]
  std::vector<float> k_t, v_t;              // [width, keys]
  std::vector<float> q, grad, grad_q, out;  // [kBlock, width]
  std::vector<float> scores, grad_p;        // [kBlock, keys]

  AttentionScratch(std::int64_t key_count, std::int64_t dim, bool backward)
      : width((dim + kChunk - 1) / kChunk * kChunk), keys((key_count + kChunk - 1) / kChunk * kChunk + LANES) {
    const auto matrix = static_cast<std::size_t>(keys * width), block = static_cast<std::size_t>(kBlock * width);
    const auto row = static_cast<std::size_t>(kBlock * keys);
    for (auto* one : {&k_t, &v}) one->resize(matrix);
    for (auto* one : {&q, &out}) one->resize(block);
    scores.resize(row);
    if (!backward) return;
    for (auto* one : {&k, &v_t, &grad_k, &grad_v}) one->resize(matrix);
    for (auto* one : {&grad, &grad_q}) one->resize(block);
    grad_p.resize(row);
  }
};

// A head's keys or values, as they are and transposed, either of which may be left out.
template <typename T>
inline void pack(const View<T>& x, std::int64_t b, std::int64_t head, std::int64_t length, std::int64_t dim,
                 const AttentionScratch& at, float* straight, float* transposed) {
  for (std::int64_t start = 0; start < length; start += LANES) {
    const std::int64_t stop = std::min<std::int64_t>(start + LANES, length);
    for (std::int64_t s = start; s < stop && straight != nullptr; ++s) {
      const T* from = x.at(s, b, head);
      for (std::int64_t d = 0; d < dim; ++d) straight[s * at.width + d] = widen(from[d]);
    }
    for (std::int64_t d = 0; d < dim && transposed != nullptr; ++d)
      for (std::int64_t s = start; s < stop; ++s) transposed[d * at.keys + s] = widen(x.at(s, b, head)[d]);
  }
}

// Rows [start, start + count) of a head into the block `to`; the rest of the block becomes 0.
template <typename T>
inline void pack_block(const View<T>& x, std::int64_t b, std::int64_t head, std::int64_t start, std::int64_t count,
                       std::int64_t dim, float factor, std::int64_t width, float* to) {
  for (std::int64_t i = 0; i < kBlock; ++i) {
    if (i >= count) {
      std::fill(to + i * width, to + (i + 1) * width, 0.0f);
      continue;
    }
    const T* from = x.at(start + i, b, head);
    for (std::int64_t d = 0; d < dim; ++d) to[i * width + d] = factor * widen(from[d]);
  }
}

// What a block of queries sees: keys [begin, end), whole chunks; `first` and `last` are the sequence's tables, or null.
struct Sight {
  std::int64_t start, count, begin, end, size;
  const std::int64_t *first, *last;

  Sight(std::int64_t start, std::int64_t queries, const std::int64_t* first, const std::int64_t* last)
      : start(start), first(first), last(last) {
    count = std::min(kBlock, queries - start);
    std::int64_t lowest = from(0), highest = to(0);
    for (std::int64_t i = 1; i < count; ++i) {
      lowest = std::min(lowest, from(i));
      highest = std::max(highest, to(i));
    }
    begin = lowest / kChunk * kChunk;
    end = std::max(begin, (highest + kChunk - 1) / kChunk * kChunk);
    size = (end - begin) & -kChunk;  // as it is; said so that the compiler makes no loop for a remainder
  }
  std::int64_t from(std::int64_t i) const { return first == nullptr ? 0 : first[start + i]; }
  std::int64_t to(std::int64_t i) const { return last == nullptr ? start + i + 1 : last[start + i]; }
  bool blind(std::int64_t i) const { return from(i) >= to(i); }
};

// The tables of a sequence.
template <typename T>
inline Sight sight_of(const AttentionCall<T>& call, std::int64_t b, std::int64_t start) {
  const std::int64_t skip = b * call.table_row;
  return Sight(start, call.queries, call.first == nullptr ? nullptr : call.first + skip,
               call.last == nullptr ? nullptr : call.last + skip);
}

// scores = block . matrix_t over the keys in sight, for all kBlock rows.
inline void scores_of(const float* block, const float* matrix_t, const Sight& sight, const AttentionScratch& at,
                      std::int64_t dim, float* scores) {
  for (std::int64_t key = sight.begin; key < sight.end; key += kChunk)
    for (std::int64_t i = 0; i < kBlock; i += ROWS)
      multiply<false>(block + i * at.width, at.width, 1, matrix_t + key, at.keys, dim, scores + i * at.keys + key,
                      at.keys);
}

// block = scores . matrix over the keys in sight.
inline void rows_of(const float* scores, const float* matrix, const Sight& sight, const AttentionScratch& at,
                    float* block) {
  for (std::int64_t d = 0; d < at.width; d += kChunk)
    for (std::int64_t i = 0; i < kBlock; i += ROWS)
      multiply<false>(scores + i * at.keys + sight.begin, at.keys, 1, matrix + sight.begin * at.width + d, at.width,
                      sight.end - sight.begin, block + i * at.width + d, at.width);
}

// matrix += scores^T . block over the keys in sight.
inline void add_columns(const float* scores, const float* block, const Sight& sight, const AttentionScratch& at,
                        float* matrix) {
  for (std::int64_t key = sight.begin; key < sight.end; key += ROWS)
    for (std::int64_t d = 0; d < at.width; d += kChunk)
      multiply<true>(scores + key, 1, at.keys, block + d, at.width, kBlock, matrix + key * at.width + d, at.width);
}

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Scores that query i of the block does not see, within the chunks in sight, become -inf, whose exponential is 0. The
// query sees some.
inline void hide(float* row, const Sight& sight, std::int64_t i) {
  std::fill(row + sight.begin, row + sight.from(i), kHidden);
  std::fill(row + sight.to(i), row + sight.end, kHidden);
}

template <typename T>
void attention_forward_task(const AttentionCall<T>& call, std::int64_t b, std::int64_t kv, AttentionScratch& at) {
  const std::int64_t group = call.heads / call.kv_heads;
  pack(call.k, b, kv, call.keys, call.dim, at, nullptr, at.k_t.data());
  pack(call.v, b, kv, call.keys, call.dim, at, at.v.data(), nullptr);
  for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head) {
    for (std::int64_t start = 0; start < call.queries; start += kBlock) {
      const Sight sight = sight_of(call, b, start);
      pack_block(call.q, b, head, start, sight.count, call.dim, call.scale, at.width, at.q.data());
      scores_of(at.q.data(), at.k_t.data(), sight, at, call.dim, at.scores.data());
      float scales[kBlock];
      for (std::int64_t i = 0; i < sight.count; ++i) {
        float* row = at.scores.data() + i * at.keys;
        float& lse = call.lse[(b * call.heads + head) * call.queries + start + i];
        if (sight.blind(i)) {
          std::fill(row + sight.begin, row + sight.end, 0.0f);
          lse = kHidden;
          scales[i] = 0.0f;
          continue;
        }
        hide(row, sight, i);
        float top = row[sight.from(i)], sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (std::int64_t j = 0; j < sight.size; ++j) top = row[sight.begin + j] > top ? row[sight.begin + j] : top;
#pragma omp simd reduction(+ : sum)
        for (std::int64_t j = 0; j < sight.size; ++j) {
          row[sight.begin + j] = exponential(row[sight.begin + j] - top);
          sum += row[sight.begin + j];
        }
        lse = top + std::log(sum);
        scales[i] = 1.0f / sum;
      }
      rows_of(at.scores.data(), at.v.data(), sight, at, at.out.data());
      for (std::int64_t i = 0; i < sight.count; ++i) {
        T* to = call.out.at(start + i, b, head);
        for (std::int64_t d = 0; d < call.dim; ++d) narrow(scales[i] * at.out[i * at.width + d], to[d]);
      }
    }
  }
}

// With P = exp(S - lse) and D = sum over d of grad out (Dao et al., section 3.1 and appendix B.2):
//   dV += P^T grad,  dS = P (grad V^T - D),  dQ = scale dS K,  dK += dS^T (scale Q)
// Where the keys are a part of those that the queries see, log-sum-exp and out are those of all of them.
template <typename T>
void attention_backward_task(const AttentionCall<T>& call, std::int64_t b, std::int64_t kv, AttentionScratch& at) {
  const std::int64_t group = call.heads / call.kv_heads;
  pack(call.k, b, kv, call.keys, call.dim, at, at.k.data(), at.k_t.data());
  pack(call.v, b, kv, call.keys, call.dim, at, nullptr, at.v_t.data());
  std::fill(at.grad_k.begin(), at.grad_k.end(), 0.0f);
  std::fill(at.grad_v.begin(), at.grad_v.end(), 0.0f);
  for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head) {
    for (std::int64_t start = 0; start < call.queries; start += kBlock) {
      const Sight sight = sight_of(call, b, start);
      pack_block(call.q, b, head, start, sight.count, call.dim, call.scale, at.width, at.q.data());
      pack_block(call.grad, b, head, start, sight.count, call.dim, 1.0f, at.width, at.grad.data());
      scores_of(at.q.data(), at.k_t.data(), sight, at, call.dim, at.scores.data());
      scores_of(at.grad.data(), at.v_t.data(), sight, at, call.dim, at.grad_p.data());
      for (std::int64_t i = 0; i < kBlock; ++i) {
        float* row = at.scores.data() + i * at.keys;
        if (i >= sight.count || sight.blind(i)) {
          std::fill(row + sight.begin, row + sight.end, 0.0f);
          continue;
        }
        hide(row, sight, i);
        const float lse = call.lse[(b * call.heads + head) * call.queries + start + i];
#pragma omp simd
        for (std::int64_t j = 0; j < sight.size; ++j) row[sight.begin + j] = exponential(row[sight.begin + j] - lse);
      }
      add_columns(at.scores.data(), at.grad.data(), sight, at, at.grad_v.data());
      for (std::int64_t i = 0; i < sight.count; ++i) {
        const T* out = call.out.at(start + i, b, head);
        float along = 0.0f;
        for (std::int64_t d = 0; d < call.dim; ++d) along += at.grad[i * at.width + d] * widen(out[d]);
        float* row = at.scores.data() + i * at.keys;
        const float* grad_p = at.grad_p.data() + i * at.keys;
#pragma omp simd
        for (std::int64_t j = 0; j < sight.size; ++j) row[sight.begin + j] *= grad_p[sight.begin + j] - along;
      }
      add_columns(at.scores.data(), at.q.data(), sight, at, at.grad_k.data());
      rows_of(at.scores.data(), at.k.data(), sight, at, at.grad_q.data());
      for (std::int64_t i = 0; i < sight.count; ++i) {
        T* to = call.grad_q.at(start + i, b, head);
        for (std::int64_t d = 0; d < call.dim; ++d) narrow(call.scale * at.grad_q[i * at.width + d], to[d]);
      }
    }
  }
  for (std::int64_t s = 0; s < call.keys; ++s) {
    T *to_k = call.grad_k.at(s, b, kv), *to_v = call.grad_v.at(s, b, kv);
    for (std::int64_t d = 0; d < call.dim; ++d) {
      narrow(at.grad_k[s * at.width + d], to_k[d]);
      narrow(at.grad_v[s * at.width + d], to_v[d]);
    }
  }
}

template <typename T>
void attention(const AttentionCall<T>& call) {
  const bool backward = call.grad.data != nullptr;
#pragma omp parallel
  {
    AttentionScratch at(call.keys, call.dim, backward);
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < call.batch * call.kv_heads; ++task) {
      const std::int64_t b = task / call.kv_heads, kv = task % call.kv_heads;
      backward ? attention_backward_task(call, b, kv, at) : attention_forward_task(call, b, kv, at);
    }
  }
}
