// Builders of sample and blend indices, and the gathering of samples, for megalite/data.
//
// Arrays that lie unaligned in a token index (lengths, offsets) come in as raw bytes and are read with memcpy, so that
// a memory-mapped file is used as it is. Every number read from a file is checked before it is used as an address.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The blend must round as Megatron-LM's does on x86-64: a product and a subtraction, never one fused instruction.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace py = pybind11;

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

constexpr std::int64_t kPrefetchDistance = 32;  // documents: their lengths lie at random places of a large array

template <typename T>
T load(const std::uint8_t* bytes, std::int64_t index) {
  T value;
  std::memcpy(&value, bytes + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::out_of_range(message);
}

[[noreturn]] void bad_document(std::int64_t document, const char* what) {
  throw std::out_of_range("sequence " + std::to_string(document) + " " + what);
}

// Rows (position in document_index, token offset) at which the samples 0 .. samples begin. The stream of tokens is the
// documents in the order of document_index; sample k begins at its token k * seq_length, and a beginning that would lie
// behind the last token (of the end of a last, partial sample) is put on the last token.
template <typename Row>
void build_sample_index(const Bytes& lengths, const Array<std::int32_t>& document_index, std::int64_t seq_length,
                        Array<Row> rows) {
  const bool shaped = rows.ndim() == 2 && rows.shape(0) > 0 && rows.shape(1) == 2;
  require(seq_length > 0 && shaped, "rows must be [samples + 1, 2]");
  const std::uint8_t* length_bytes = lengths.data();
  const std::int32_t* documents = document_index.data();
  const std::int64_t sequences = lengths.size() / 4, count = document_index.size(), wanted = rows.shape(0);
  Row* out = rows.mutable_data();

  py::gil_scoped_release release;
  std::int64_t made = 0, next = 0, last_document = 0, last_offset = 0;
  for (std::int64_t position = 0; position < count && made < wanted; ++position) {
    if (position + kPrefetchDistance < count) {
      const std::int64_t ahead = documents[position + kPrefetchDistance];
      if (ahead >= 0 && ahead < sequences) __builtin_prefetch(length_bytes + 4 * ahead);
    }
    const std::int64_t document = documents[position];
    if (document < 0 || document >= sequences) bad_document(document, "does not exist");
    const std::int64_t length = load<std::int32_t>(length_bytes, document);
    if (length < 0) bad_document(document, "has a negative length");
    for (; next < length && made < wanted; next += seq_length, ++made) {
      out[2 * made] = static_cast<Row>(position);
      out[2 * made + 1] = static_cast<Row>(next);
    }
    next -= length;
    if (length > 0) {
      last_document = position;
      last_offset = length - 1;
    }
  }
  require(made >= wanted - 1, "the documents hold fewer tokens than the samples need");
  if (made < wanted) {
    out[2 * made] = static_cast<Row>(last_document);
    out[2 * made + 1] = static_cast<Row>(last_offset);
  }
}

// A blend in progress. In `weight` and `taken` (float64, as the comparison has them) the datasets are padded to whole
// blocks; one that is spent, or padding, has taken infinitely much.
constexpr std::int64_t kBlock = 4;
constexpr std::int64_t kWideFrom = 13;  // datasets from which on looking at four at a time was measured to be faster

struct Blend {
  std::vector<double> weight, taken;
  const std::int64_t* limit;
  std::int64_t* count;
  std::int64_t first, open;  // number of the first sample; datasets that are not spent
  std::int16_t* out_dataset;
  std::int64_t* out_sample;

  double position(std::int64_t k) const {
    require(open > 0, "the blend asks for more samples than its datasets hold");
    return static_cast<double>(std::max<std::int64_t>(first + k, 1));
  }

  // Sample k comes from dataset `chosen`; returns whether that is spent now.
  bool take(std::int64_t k, std::int64_t chosen) {
    out_dataset[k] = static_cast<std::int16_t>(chosen);
    out_sample[k] = count[chosen]++;
    return count[chosen] >= limit[chosen];
  }

  void close(std::int64_t chosen) {
    taken[chosen] = std::numeric_limits<double>::infinity();
    --open;
  }
};

void run_blend(Blend& blend, std::int64_t datasets, std::int64_t samples) {
  const double* weight = blend.weight.data();
  double* taken = blend.taken.data();
  for (std::int64_t k = 0; k < samples; ++k) {
    const double position = blend.position(k);
    std::int64_t chosen = 0;
    double behind = weight[0] * position - taken[0];
    for (std::int64_t i = 1; i < datasets; ++i) {
      const double error = weight[i] * position - taken[i];
      chosen = error > behind ? i : chosen;
      behind = error > behind ? error : behind;
    }
    taken[chosen] += 1.0;
    if (blend.take(k, chosen)) blend.close(chosen);
  }
}

#if defined(__x86_64__)
#define MEGALITE_WIDE_BLEND

// The same with four datasets at a time: first the largest error, then the first dataset that has it. Multiplication
// and subtraction stay apart (AVX2 without FMA), so that every error is that of `run_blend`, bit for bit.
__attribute__((target("avx2"))) void run_blend_wide(Blend& blend, std::int64_t samples) {
  alignas(32) static constexpr double kOneMore[kBlock][kBlock] = {
      {1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1}};
  const double* weight = blend.weight.data();
  double* taken = blend.taken.data();
  const std::int64_t padded = static_cast<std::int64_t>(blend.weight.size());
  std::vector<double> errors(padded);
  double* error = errors.data();
  for (std::int64_t k = 0; k < samples; ++k) {
    const __m256d position = _mm256_set1_pd(blend.position(k));
    __m256d most = _mm256_set1_pd(-std::numeric_limits<double>::infinity());
    for (std::int64_t i = 0; i < padded; i += kBlock) {
      const __m256d share = _mm256_mul_pd(_mm256_loadu_pd(weight + i), position);
      const __m256d behind = _mm256_sub_pd(share, _mm256_loadu_pd(taken + i));
      _mm256_storeu_pd(error + i, behind);
      most = _mm256_max_pd(most, behind);
    }
    most = _mm256_max_pd(most, _mm256_permute2f128_pd(most, most, 1));
    most = _mm256_max_pd(most, _mm256_permute_pd(most, 5));
    std::uint64_t found = 0;
    std::int64_t begin = -64;
    while (found == 0) {  // 64 datasets at a time, so that a usual blend needs no branch that depends on the data
      begin += 64;
      const std::int64_t end = std::min<std::int64_t>(64, padded - begin);
      for (std::int64_t i = 0; i < end; i += kBlock) {
        const __m256d equal = _mm256_cmp_pd(_mm256_loadu_pd(error + begin + i), most, _CMP_EQ_OQ);
        found |= static_cast<std::uint64_t>(_mm256_movemask_pd(equal)) << i;
      }
    }
    const std::int64_t chosen = begin + __builtin_ctzll(found);
    // the whole block is written, so that reading it for the next sample need not wait for the write
    double* block = taken + chosen / kBlock * kBlock;
    _mm256_storeu_pd(block, _mm256_add_pd(_mm256_loadu_pd(block), _mm256_load_pd(kOneMore[chosen % kBlock])));
    if (blend.take(k, chosen)) blend.close(chosen);
  }
}
#endif

// Which dataset each sample first, first + 1, ... of a blend comes from, and which of its samples it is: always the
// dataset that is furthest behind weight * samples so far, the first of equals; one that has given `limits` samples is
// left out. `counts` (samples already taken from each) is brought up to date, so that a blend can be continued.
void build_blend(const Array<double>& weights, const Array<std::int64_t>& limits, Array<std::int64_t> counts,
                 std::int64_t first, Array<std::int16_t> dataset_index, Array<std::int64_t> sample_index) {
  const std::int64_t datasets = weights.size(), samples = dataset_index.size();
  require(datasets > 0 && datasets < 32767, "a blend has between 1 and 32766 datasets");
  require(limits.size() == datasets && counts.size() == datasets && sample_index.size() == samples, "sizes differ");
  const std::size_t padded = (datasets + kBlock - 1) / kBlock * kBlock;
  Blend blend{std::vector<double>(weights.data(), weights.data() + datasets),
              std::vector<double>(datasets),
              limits.data(),
              counts.mutable_data(),
              first,
              0,
              dataset_index.mutable_data(),
              sample_index.mutable_data()};
  blend.weight.resize(padded, 0.0);
  blend.taken.resize(padded, std::numeric_limits<double>::infinity());
  for (std::int64_t i = 0; i < datasets; ++i) {
    ++blend.open;
    blend.taken[i] = static_cast<double>(blend.count[i]);
    if (blend.count[i] >= blend.limit[i]) blend.close(i);
  }

  py::gil_scoped_release release;
#ifdef MEGALITE_WIDE_BLEND
  if (datasets >= kWideFrom && __builtin_cpu_supports("avx2")) return run_blend_wide(blend, samples);
#endif
  run_blend(blend, datasets, samples);
}

// One open token file, its arrays kept alive by Python.
struct TokenFile {
  const std::uint8_t* tokens;
  std::int64_t token_bytes;
  const std::uint8_t* offsets;
  const std::uint8_t* lengths;
  std::int64_t sequences;
};

// Copies tokens [start, start + length) of a sequence as int64 and returns the largest, seen as unsigned: a negative id
// counts as larger than every vocabulary.
template <typename Token>
std::uint64_t copy_tokens(const TokenFile& file, std::int64_t byte, std::int64_t length, std::int64_t* out) {
  std::uint64_t largest = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    out[i] = static_cast<std::int64_t>(load<Token>(file.tokens + byte, i));
    largest = std::max(largest, static_cast<std::uint64_t>(out[i]));
  }
  return largest;
}

std::uint64_t copy_as(char kind, const TokenFile& file, std::int64_t byte, std::int64_t length, std::int64_t* out) {
  switch (kind) {
    case 'H': return copy_tokens<std::uint16_t>(file, byte, length, out);
    case 'i': return copy_tokens<std::int32_t>(file, byte, length, out);
    case 'q': return copy_tokens<std::int64_t>(file, byte, length, out);
    case 'B': return copy_tokens<std::uint8_t>(file, byte, length, out);
    case 'b': return copy_tokens<std::int8_t>(file, byte, length, out);
    case 'h': return copy_tokens<std::int16_t>(file, byte, length, out);
    default: throw std::out_of_range(std::string("unknown token type ") + kind);
  }
}

// Fills `out` with the tokens from (document position, offset) `begin` on, through as many documents as it takes, and
// returns how many there were (fewer than out.size() only at the end of document_index) and the largest id. Where
// `positions` and `documents` are not empty, they get each token's place in its document and its document's number,
// from 0, within this sample.
py::tuple gather(const Bytes& tokens, char kind, std::int64_t item_bytes, const Bytes& offsets, const Bytes& lengths,
                 const Array<std::int32_t>& document_index, std::int64_t begin_document, std::int64_t begin_offset,
                 Array<std::int64_t> out, Array<std::int64_t> positions, Array<std::int64_t> documents) {
  const TokenFile file{tokens.data(), tokens.size(), offsets.data(), lengths.data(), lengths.size() / 4};
  const std::int32_t* order = document_index.data();
  const std::int64_t order_size = document_index.size(), wanted = out.size();
  const bool with_documents = positions.size() > 0;
  require(!with_documents || (positions.size() == wanted && documents.size() == wanted), "sizes differ");
  std::int64_t* target = out.mutable_data();
  std::int64_t* place = with_documents ? positions.mutable_data() : nullptr;
  std::int64_t* number = with_documents ? documents.mutable_data() : nullptr;

  std::int64_t filled = 0, offset = begin_offset, segment = 0;
  std::uint64_t largest = 0;
  {
    py::gil_scoped_release release;
    for (std::int64_t position = begin_document; filled < wanted && position < order_size; ++position, offset = 0) {
      require(position >= 0, "a sample begins before the first document");
      const std::int64_t document = order[position];
      if (document < 0 || document >= file.sequences) bad_document(document, "does not exist");
      const std::int64_t available = load<std::int32_t>(file.lengths, document) - offset;
      const std::int64_t taken = std::min(available, wanted - filled);
      if (taken <= 0) continue;
      const std::int64_t begin = load<std::int64_t>(file.offsets, document);
      if (offset < 0 || begin < 0 || begin > file.token_bytes ||
          begin + (offset + taken) * item_bytes > file.token_bytes) {
        bad_document(document, "lies outside the file");
      }
      if (begin % item_bytes != 0) bad_document(document, "begins between two tokens");
      const std::int64_t byte = begin + offset * item_bytes;
      largest = std::max(largest, copy_as(kind, file, byte, taken, target + filled));
      for (std::int64_t i = 0; with_documents && i < taken; ++i) {
        place[filled + i] = i;
        number[filled + i] = segment;
      }
      filled += taken;
      ++segment;
    }
  }
  return py::make_tuple(filled, largest);
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Builders of sample and blend indices, and the gathering of samples";
  module.def("build_sample_index", &build_sample_index<std::int32_t>, py::arg("lengths").noconvert(),
             py::arg("document_index").noconvert(), py::arg("seq_length"), py::arg("rows").noconvert());
  module.def("build_sample_index", &build_sample_index<std::int64_t>, py::arg("lengths").noconvert(),
             py::arg("document_index").noconvert(), py::arg("seq_length"), py::arg("rows").noconvert());
  module.def("build_blend", &build_blend, py::arg("weights").noconvert(), py::arg("limits").noconvert(),
             py::arg("counts").noconvert(), py::arg("first"), py::arg("dataset_index").noconvert(),
             py::arg("sample_index").noconvert());
  module.def("gather", &gather, py::arg("tokens").noconvert(), py::arg("kind"), py::arg("item_bytes"),
             py::arg("offsets").noconvert(), py::arg("lengths").noconvert(), py::arg("document_index").noconvert(),
             py::arg("begin_document"), py::arg("begin_offset"), py::arg("out").noconvert(),
             py::arg("positions").noconvert(), py::arg("documents").noconvert());
}
