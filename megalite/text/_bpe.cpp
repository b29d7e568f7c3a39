// Byte-pair merges of words, with the ids that the `tokenizers` library gives, and a table of the words seen.
//
// The library spends most of a call on offsets and objects that nobody here reads. This is the merge alone: of all
// neighbours that the tokenizer knows as a pair, the pair learnt first is joined first, of equal ones the leftmost.
// Texts repeat their words, so most of them are found in the table.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

using Ids = py::array_t<std::int32_t, py::array::c_style>;

namespace {

class BytePairs {
 public:
  // byte_ids: int32 [256], the id of each byte. merges: int32 [M, 3], rows of left, right and joined id in the order in
  // which they were learnt; of a pair that stands twice the last row counts. whole: ids of words that are never merged.
  // capacity: bytes the words seen may take; when they take more, all are forgotten.
  BytePairs(const Ids& byte_ids, const Ids& merges, std::unordered_map<std::string, std::int32_t> whole,
            std::size_t capacity)
      : whole_(std::move(whole)), capacity_(capacity) {
    if (byte_ids.ndim() != 1 || byte_ids.shape(0) != 256) throw std::invalid_argument("byte_ids must be [256]");
    if (merges.ndim() != 2 || merges.shape(1) != 3) throw std::invalid_argument("merges must be [M, 3]");
    std::copy_n(byte_ids.data(), 256, byte_ids_);
    int bits = 1;
    while ((py::ssize_t{1} << bits) < 2 * merges.shape(0) + 2) ++bits;
    shift_ = 64 - bits;
    table_.resize(std::size_t{1} << bits);
    for (py::ssize_t row = 0; row < merges.shape(0); ++row) {
      const std::uint64_t key = pair(merges.at(row, 0), merges.at(row, 1));
      table_[slot(key)] = {key, static_cast<std::int32_t>(row), merges.at(row, 2)};
    }
    forget();
  }

  // The ids of all words, one after another, native int32.
  py::bytes encode(const py::list& words) {
    if (seen_.size() * sizeof(Seen) + text_.size() + ids_.size() * sizeof(std::int32_t) > capacity_) forget();
    out_.clear();
    for (const py::handle word : words) {
      py::ssize_t size = 0;
      const char* data = PyUnicode_AsUTF8AndSize(word.ptr(), &size);
      if (data == nullptr) throw py::error_already_set();
      const Seen& seen = look_up({data, static_cast<std::size_t>(size)});
      out_.insert(out_.end(), ids_.begin() + seen.ids, ids_.begin() + seen.ids + seen.count);
    }
    return py::bytes(reinterpret_cast<const char*>(out_.data()), out_.size() * sizeof(std::int32_t));
  }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};

  struct Entry {
    std::uint64_t key = kEmpty;
    std::int32_t rank = 0;
    std::int32_t id = 0;
  };
  struct Symbol {
    std::int32_t id;  // negative: joined to a symbol on its left
    std::size_t previous, next;
  };
  using Candidate = std::tuple<std::int32_t, std::size_t, std::int32_t, std::int32_t, std::int32_t>;

  static std::uint64_t pair(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }

  // A word seen: where its bytes and its ids lie in text_ and ids_.
  struct Seen {
    std::size_t hash = 0, text = 0, ids = 0;
    std::uint32_t size = 0, count = 0;  // count 0: a free place
  };

  void forget() {
    seen_.assign(std::size_t{1} << 12, {});
    known_ = 0;
    text_.clear();
    ids_.clear();
  }

  const Seen& look_up(std::string_view word) {
    const std::size_t hash = std::hash<std::string_view>{}(word);
    std::size_t at = hash & (seen_.size() - 1);
    for (; seen_[at].count != 0; at = (at + 1) & (seen_.size() - 1)) {
      const Seen& seen = seen_[at];
      if (seen.hash == hash && seen.size == word.size() &&
          std::memcmp(text_.data() + seen.text, word.data(), word.size()) == 0) {
        return seen;
      }
    }
    if (word.empty()) return seen_[at];  // no ids, and nothing to remember
    if (2 * ++known_ > seen_.size()) at = grow(hash);
    seen_[at] = {hash, text_.size(), ids_.size(), static_cast<std::uint32_t>(word.size()), 0};
    text_.insert(text_.end(), word.begin(), word.end());
    append_ids(word);
    seen_[at].count = static_cast<std::uint32_t>(ids_.size() - seen_[at].ids);
    return seen_[at];
  }

  // Double the table; returns the free place for a hash.
  std::size_t grow(std::size_t hash) {
    std::vector<Seen> old(2 * seen_.size());
    old.swap(seen_);
    for (const Seen& seen : old) {
      if (seen.count != 0) seen_[free_place(seen.hash)] = seen;
    }
    return free_place(hash);
  }

  std::size_t free_place(std::size_t hash) const {
    std::size_t at = hash & (seen_.size() - 1);
    while (seen_[at].count != 0) at = (at + 1) & (seen_.size() - 1);
    return at;
  }

  void append_ids(std::string_view word) {
    if (!whole_.empty()) {
      if (const auto found = whole_.find(std::string(word)); found != whole_.end()) {
        ids_.push_back(found->second);
        return;
      }
    }
    merge(word);
    for (std::size_t at = 0; at < symbols_.size(); at = symbols_[at].next) ids_.push_back(symbols_[at].id);
  }

  // The place of a key in the table, or the free one where it belongs.
  std::size_t slot(std::uint64_t key) const {
    std::size_t at = key * 0x9E3779B97F4A7C15u >> shift_;
    while (table_[at].key != kEmpty && table_[at].key != key) at = (at + 1) & (table_.size() - 1);
    return at;
  }

  void propose(std::size_t at) {
    const std::size_t next = symbols_[at].next;
    if (next >= symbols_.size()) return;
    const Entry& entry = table_[slot(pair(symbols_[at].id, symbols_[next].id))];
    if (entry.key == kEmpty) return;
    candidates_.emplace(entry.rank, at, symbols_[at].id, symbols_[next].id, entry.id);
  }

  void merge(std::string_view word) {
    symbols_.clear();
    for (std::size_t at = 0; at < word.size(); ++at) {
      symbols_.push_back({byte_ids_[static_cast<unsigned char>(word[at])], at - 1, at + 1});
    }
    for (std::size_t at = 0; at < word.size(); ++at) propose(at);
    while (!candidates_.empty()) {
      const auto [rank, at, left, right, joined] = candidates_.top();
      candidates_.pop();
      Symbol& symbol = symbols_[at];
      // what was proposed may have been joined to others meanwhile
      if (symbol.id != left || symbol.next >= symbols_.size() || symbols_[symbol.next].id != right) continue;
      symbols_[symbol.next].id = -1;
      symbol.id = joined;
      symbol.next = symbols_[symbol.next].next;
      if (symbol.next < symbols_.size()) symbols_[symbol.next].previous = at;
      if (symbol.previous < symbols_.size()) propose(symbol.previous);
      propose(at);
    }
  }

  std::int32_t byte_ids_[256];
  std::unordered_map<std::string, std::int32_t> whole_;
  std::vector<Entry> table_;
  int shift_;
  std::size_t capacity_;
  std::vector<Seen> seen_;  // open addressing, at most half full
  std::size_t known_ = 0;
  std::vector<char> text_;
  std::vector<std::int32_t> ids_;
  // of the call or word at hand; members, so that their memory is kept
  std::vector<std::int32_t> out_;
  std::vector<Symbol> symbols_;
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<Candidate>> candidates_;
};

}  // namespace

PYBIND11_MODULE(_bpe, module) {
  py::class_<BytePairs>(module, "BytePairs")
      .def(py::init<const Ids&, const Ids&, std::unordered_map<std::string, std::int32_t>, std::size_t>())
      .def("encode", &BytePairs::encode);
}
