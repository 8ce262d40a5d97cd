// The door from XLA: takes buffers, shares rows among the threads of XLA's own pool.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "recurrence.h"
#include "xla/ffi/api/ffi.h"

namespace jlstm {

extern const Loops kPortable;
#ifdef JLSTM_X86
extern const Loops kAvx2, kAvx512;
#endif

namespace {

struct Block {
  void* data;
  size_t bytes;
};

constexpr size_t kMostKept = size_t{64} << 20;
std::mutex kept_mutex;
std::vector<Block> kept_blocks;
size_t kept_bytes = 0;

// So that blocks of nearly the same size stand in for each other.
size_t rounded(size_t bytes) { return (bytes + (1 << 14)) >> 14 << 14; }

}  // namespace

void* take(size_t bytes) {
  bytes = rounded(bytes);
  {
    std::lock_guard<std::mutex> lock(kept_mutex);
    for (Block& block : kept_blocks) {
      if (block.bytes != bytes) continue;
      void* data = block.data;
      block = kept_blocks.back();
      kept_blocks.pop_back();
      kept_bytes -= bytes;
      return data;
    }
  }
  void* data = std::aligned_alloc(64, bytes);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void give(void* data, size_t bytes) {
  bytes = rounded(bytes);
  std::lock_guard<std::mutex> lock(kept_mutex);
  kept_blocks.push_back({data, bytes});
  kept_bytes += bytes;
  // About the oldest go first.
  while (kept_bytes > kMostKept) {
    std::free(kept_blocks.front().data);
    kept_bytes -= kept_blocks.front().bytes;
    kept_blocks.erase(kept_blocks.begin());
  }
}

namespace {

namespace ffi = xla::ffi;

// Floats for as long as a call runs.
class Floats {
 public:
  explicit Floats(int64_t n) : size_(n), data_(static_cast<float*>(take(bytes()))) {}
  ~Floats() { give(data_, bytes()); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* data() const { return data_; }

 private:
  size_t bytes() const { return size_ * sizeof(float); }
  int64_t size_;
  float* data_;
};

// The best that the processor has, unless JLSTM_LOOPS names one.
const Loops& choose() {
  const char* name = std::getenv("JLSTM_LOOPS");
  const std::string named = name == nullptr ? "" : name;
#ifdef JLSTM_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f");
  if (avx512 && (named.empty() || named == "avx512")) return kAvx512;
  if (avx2 && (named.empty() || named == "avx2")) return kAvx2;
#endif
  return kPortable;
}

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

// Of so few rows a single step does not repay putting the weights in order.
constexpr int64_t kFewRows = 8;

// The threads of a call. Its parts, and the products of a loop, come every few
// microseconds: until the next a helper looks out for it instead of going to sleep, for
// to wake it would take longer than many a part. The caller takes tiles from the front
// and helpers from the back, so that a core finds most of its weights in its own cache;
// and a helper that comes late keeps nobody waiting.
class Team {
 public:
  // Runs f(0) .. f(count - 1) on so many hands, and on helpers of the call before. Returns
  // false if another call has the team, or if there are too many tiles. Helpers are kept
  // for what follows if more is said to.
  template <typename F>
  bool run(ffi::ThreadPool& pool, int64_t hands, int64_t count, const F& f, bool more) {
    if (count > kMost || busy_.test_and_set(std::memory_order_acquire)) return false;
    call_.store([](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); },
                std::memory_order_relaxed);
    context_.store(&f, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    more_.store(true);
    tiles_.store(++round_ << 32 | static_cast<uint64_t>(count));
    for (; helpers_.load() < hands - 1; ++helpers_) {
      pool.Schedule([this] { help(); });
    }
    while (take_tile(true)) continue;
    for (int64_t i = 0; done_.load(std::memory_order_acquire) < count; ++i) {
      // A helper that has lost its core may need this one.
      i < kSpins ? pause() : std::this_thread::yield();
    }
    if (!more) more_.store(false);
    busy_.clear(std::memory_order_release);
    return true;
  }

 private:
  static constexpr int64_t kMost = (1 << 16) - 1;
  static constexpr int64_t kSpins = 1000;
  static constexpr std::chrono::microseconds kPatience{50};

  static void pause() {
#ifdef JLSTM_X86
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  // Runs a tile; returns whether there was one. A word has the number of the round, the
  // first tile that is left and the end of those that are left, so that what is taken
  // belongs to the round whose function was read.
  bool take_tile(bool front) {
    uint64_t word = tiles_.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t first = word >> 16 & kMost, end = word & kMost;
      if (first == end) return false;
      const auto call = call_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      const uint64_t rest = front ? word + (1 << 16) : word - 1;
      if (tiles_.compare_exchange_weak(word, rest, std::memory_order_acq_rel)) {
        call(context, front ? first : end - 1);
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  void help() {
    using Clock = std::chrono::steady_clock;
    for (;;) {
      for (auto until = Clock::now() + kPatience; more_ && Clock::now() < until;) {
        bool worked = false;
        for (int i = 0; i < 16; ++i) {
          if (take_tile(false)) {
            worked = true;
          } else {
            pause();
          }
        }
        if (worked) until = Clock::now() + kPatience;
      }
      --helpers_;
      // Who came meanwhile may have counted on this helper.
      const uint64_t word = tiles_.load();
      if ((word >> 16 & kMost) == (word & kMost)) return;
      ++helpers_;
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  uint64_t round_ = 0;
  std::atomic<uint64_t> tiles_{0};
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> done_{0}, helpers_{0};
  std::atomic<bool> more_{false};
};

Team& team() {
  static Team& team = *new Team;  // its helpers may outlive static objects
  return team;
}

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

// The threads of a call. The devices of a CPU have one pool: a call that took threads
// from that beside it would wait for them.
struct Threads {
  ffi::ThreadPool& pool;
  int64_t count;

  Threads(ffi::ThreadPool& pool, int64_t devices)
      : pool(pool), count(std::max<int64_t>(1, pool.num_threads() / devices)) {}
};

// Runs f(0) .. f(count - 1) on up to so many threads. The caller takes part, so that it
// ends even if no other thread is free.
template <typename F>
void share(const Threads& threads, int64_t hands, int64_t count, const F& f,
           bool more = false) {
  ffi::ThreadPool& pool = threads.pool;
  hands = std::min({hands, count, threads.count});
  if (hands < 2) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  if (team().run(pool, hands, count, f, more)) return;
  // A call beside this one has the team.
  struct State {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable ended;
    int64_t done = 0;
  };
  auto state = std::make_shared<State>();
  auto work = [state, count, &f] {
    for (int64_t i; (i = state->next++) < count;) {
      f(i);
      std::lock_guard<std::mutex> lock(state->mutex);
      if (++state->done == count) state->ended.notify_all();
    }
  };
  for (int64_t i = 1; i < hands; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->ended.wait(lock, [&] { return state->done == count; });
}

// The rows that each thread takes, with about as many steps for each.
std::vector<std::vector<int64_t>> deal(const Shape& s, const bool* mask,
                                       int64_t threads) {
  std::vector<int64_t> rows(s.B), steps(s.B, s.T);
  std::iota(rows.begin(), rows.end(), 0);
  if (mask != nullptr) {
    for (int64_t b = 0; b < s.B; ++b) {
      steps[b] = std::count(mask + b * s.T, mask + (b + 1) * s.T, true);
    }
    std::stable_sort(rows.begin(), rows.end(),
                     [&](int64_t a, int64_t b) { return steps[a] > steps[b]; });
  }
  const int64_t hands = std::max<int64_t>(1, std::min(threads, s.B));
  std::vector<std::vector<int64_t>> dealt(hands);
  std::vector<int64_t> total(hands, 0);
  for (int64_t row : rows) {
    const auto least = std::min_element(total.begin(), total.end()) - total.begin();
    dealt[least].push_back(row);
    total[least] += steps[row];
  }
  // Rows without a step all go to one.
  dealt.erase(std::remove_if(dealt.begin(), dealt.end(),
                             [](const auto& rows) { return rows.empty(); }),
              dealt.end());
  return dealt;
}

using Buffer = ffi::Buffer<ffi::F32>;
using Booleans = ffi::Buffer<ffi::PRED>;
using Result = ffi::Result<Buffer>;

template <typename B>
auto data(B& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

// Asks for large pages under memory that is about to be written: XLA gets that of a
// large call anew each time, and to fetch it in small pages takes longer than to use it.
void in_large_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < kPage) return;
  // What is beside it is most often of the same call.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  madvise(reinterpret_cast<void*>(begin), (end - begin + kPage - 1) / kPage * kPage,
          MADV_HUGEPAGE);
#endif
}

Flags flags_of(Booleans& mask, Booleans& resets, bool reverse) {
  return {data(mask), data(resets), reverse};
}

// Puts weights in order.
void pack(const Threads& threads, int64_t hands, Cell cell, const Shape& s,
          bool backward, const float* w_ih, const float* w_hh, const Floats& packed) {
  const auto work = [&](int64_t panel) {
    loops().pack(cell, s, backward, w_ih, w_hh, panel, packed.data());
  };
  share(threads, hands, loops().panels(s, backward, w_ih == nullptr), work, true);
}

ffi::Error forward(ffi::ThreadPool pool, Buffer xs, Buffer w_ih, Buffer w_hh,
                   Buffer bias, Buffer bias_n, Buffer h0, Buffer c0, Buffer fresh_h,
                   Buffer fresh_c, Booleans mask, Booleans resets, Result ys, Result h,
                   Result c, Result gates, Result before_c, bool gru,
                   bool reverse, int64_t devices) {
  const Threads threads(pool, devices);
  const auto x = xs.dimensions();
  const Shape s{x[0], x[1], x[2], w_hh.dimensions()[0], x[1], x[1]};
  const Cell cell = gru ? Cell::kGru : Cell::kLstm;
  const bool projected = w_ih.element_count() == 0;
  const Forward io{data(xs),  projected,      data(bias),      data(bias_n),
                   data(h0),  data(c0),       data(fresh_h),   data(fresh_c),
                   data(*ys), data(*h),       data(*c),        data(*gates),
                   data(*before_c)};
  const Flags flags = flags_of(mask, resets, reverse);
  for (Result* result : {&ys, &gates, &before_c}) {
    in_large_pages((**result).untyped_data(), (**result).size_bytes());
  }
  if (s.T == 1 && s.B <= kFewRows && io.gates == nullptr && !projected) {
    share(threads, kAll, loops().step_panels(s), [&](int64_t panel) {
      loops().step(cell, s, flags, io, data(w_ih), data(w_hh), panel);
    });
    return ffi::Error::Success();
  }
  const Floats packed(loops().packed_size(cell, s, false, projected));
  const auto dealt = deal(s, flags.mask, threads.count);
  pack(threads, dealt.size(), cell, s, false, data(w_ih), data(w_hh), packed);
  share(threads, dealt.size(), dealt.size(), [&](int64_t i) {
    loops().forward(cell, s, flags, io, packed.data(), dealt[i].data(), dealt[i].size());
  });
  return ffi::Error::Success();
}

// Takes the gates and carries that the forward loop stored, or computes them again,
// `every` steps at a time, where there are none.
ffi::Error backward(ffi::ThreadPool pool, Buffer xs, Buffer w_ih, Buffer w_hh,
                    Buffer bias, Buffer bias_n, Buffer hs, Buffer cs, Buffer fresh_h,
                    Buffer fresh_c, Buffer ys, Buffer gates, Buffer before_c,
                    Buffer dys, Buffer dh, Buffer dc, Booleans mask, Booleans resets,
                    Result dxs, Result dw_ih, Result dw_hh, Result dbias, Result dh0,
                    Result dc0, Result dfresh_h, Result dfresh_c, Result again_ys,
                    Result again_gates, Result again_c, bool gru, bool reverse,
                    int64_t devices, int64_t every, bool inputs) {
  const Threads threads(pool, devices);
  const auto x = xs.dimensions();
  const bool projected = w_ih.element_count() == 0, again = ys.element_count() == 0;
  const int64_t B = x[0], T = x[1], H = w_hh.dimensions()[0], G = gru ? 3 : 4;
  const Shape s{B, T, projected ? 0 : x[2], H, T, every};
  const Cell cell = gru ? Cell::kGru : Cell::kLstm;
  const Flags flags = flags_of(mask, resets, reverse);
  const auto dealt = deal(s, flags.mask, threads.count);
  const int64_t hands = dealt.size();
  const float* const weights = projected ? nullptr : data(w_ih);
  const Floats packed(loops().packed_size(cell, s, true, !inputs));
  pack(threads, hands, cell, s, true, inputs ? weights : nullptr, data(w_hh), packed);
  const Floats ahead(again ? loops().packed_size(cell, s, false, projected) : 0);
  if (again) pack(threads, hands, cell, s, false, weights, data(w_hh), ahead);
  const Floats ends(again ? 2 * B * H : 0);  // of the carries of blocks

  // The first thread writes to the results, the others to sums of their own, which are
  // added in their order, so that a number of threads has one result.
  const int64_t sizes[] = {static_cast<int64_t>(dw_ih->element_count()),
                           static_cast<int64_t>(dw_hh->element_count()),
                           static_cast<int64_t>(dbias->element_count())};
  float* const results[] = {data(*dw_ih), data(*dw_hh), data(*dbias)};
  const int64_t others = hands - 1;
  const Floats own[] = {Floats(others * sizes[0]), Floats(others * sizes[1]),
                        Floats(others * sizes[2])};
  const auto sum = [&](int64_t thread, int i) {
    return thread ? own[i].data() + (thread - 1) * sizes[i] : results[i];
  };
  // Where rows are too few for the threads, they share the gradients of weights.
  const auto run = [](const void* on, int64_t count, void (*work)(void*, int64_t),
                      void* self) {
    share(*static_cast<const Threads*>(on), kAll, count,
          [&](int64_t i) { work(self, i); });
  };
  const Each each{&threads, hands < threads.count ? +run : nullptr};
  const auto work = [&](int64_t i) {
    const int64_t* const rows = dealt[i].data();
    const int64_t count = dealt[i].size(), blocks = (T + every - 1) / every;
    const int64_t width = projected ? G * H : x[2];
    for (int64_t nth = 0; nth < blocks; ++nth) {
      const int64_t k = reverse ? nth : blocks - 1 - nth, start = k * every;
      const Shape block{B, std::min(every, T - start), s.D, H, T, every};
      const auto from = [&](auto* all, int64_t step) {
        return all == nullptr ? nullptr : all + step;
      };
      const Flags now{from(flags.mask, start), from(flags.resets, start), reverse};
      const float* const h = from(data(hs), k * B * H);
      const float* const c = from(data(cs), k * B * H);
      const float* const x_now = from(data(xs), start * width);
      if (again) {
        const Forward io{x_now,          projected,          data(bias),
                         data(bias_n),   h,                  c,
                         data(fresh_h),  data(fresh_c),      data(*again_ys),
                         ends.data(),    ends.data() + B * H, data(*again_gates),
                         data(*again_c)};
        loops().forward(cell, block, now, io, ahead.data(), rows, count);
      }
      const Backward io{x_now,
                        again ? data(*again_ys) : data(ys),
                        h,
                        data(fresh_h),
                        again ? data(*again_gates) : data(gates),
                        again ? data(*again_c) : data(before_c),
                        from(data(dys), start * H),
                        nth ? data(*dh0) : data(dh),
                        nth ? data(*dc0) : data(dc),
                        inputs ? from(data(*dxs), start * x[2]) : nullptr,
                        inputs ? nullptr : from(data(*dxs), start * G * H),
                        data(*dh0),
                        data(*dc0),
                        data(*dfresh_h),
                        data(*dfresh_c)};
      const Sums to{sum(i, 0), sum(i, 1), sum(i, 2), nth > 0};
      loops().backward(cell, block, now, io, to, each, packed.data(), rows, count);
    }
  };
  share(threads, hands, hands, work, others > 0);
  if (others == 0) return ffi::Error::Success();
  constexpr int64_t kStretch = 1 << 16;
  int64_t stretches[] = {0, 0, 0};
  for (int i = 0; i < 3; ++i) stretches[i] = (sizes[i] + kStretch - 1) / kStretch;
  const int64_t all = stretches[0] + stretches[1] + stretches[2];
  share(threads, hands, all, [&](int64_t stretch) {
    int i = 0;
    for (; stretch >= stretches[i]; ++i) stretch -= stretches[i];
    const int64_t begin = stretch * kStretch;
    const int64_t end = std::min(sizes[i], begin + kStretch);
    for (int64_t thread = 1; thread <= others; ++thread) {
      const float* part = sum(thread, i);
      for (int64_t j = begin; j < end; ++j) results[i][j] += part[j];
    }
  });
  return ffi::Error::Success();
}

// Memory as it is, to be written by what follows.
ffi::Error memory(ffi::RemainingRets rets) {
  for (size_t i = 0; i < rets.size(); ++i) {
    ffi::AnyBuffer buffer = **rets.get<ffi::AnyBuffer>(i);
    in_large_pages(buffer.untyped_data(), buffer.size_bytes());
  }
  return ffi::Error::Success();
}

// Kinds of memory, as they are numbered in program.py.
enum Kind { kInput, kKept, kState, kRows, kSame, kOut, kWritten, kScratch };

ffi::Error pack_product(ffi::ThreadPool pool, Buffer weights, Result packed,
                        bool transposed, int64_t devices) {
  const Matrix m{data(weights), weights.dimensions()[0], weights.dimensions()[1],
                 transposed};
  const auto work = [&](int64_t panel) {
    loops().pack_product(m, panel, data(*packed));
  };
  share(Threads(pool, devices), kAll, loops().product_panels(m.columns()), work, true);
  return ffi::Error::Success();
}

// Of fewer operations one core is done before another has begun.
constexpr int64_t kFewOperations = 1 << 18;

ffi::Error product(ffi::ThreadPool pool, Buffer rows, Buffer weights, Buffer packed,
                   Result out, Result, bool transposed, int64_t devices) {
  const Matrix m{data(weights), weights.dimensions()[0], weights.dimensions()[1],
                 transposed};
  const int64_t B = rows.dimensions()[0], panels = loops().product_panels(m.columns());
  const bool few = B * m.height * m.width < kFewOperations;
  const Threads threads(pool, devices);
  const int64_t hands = few ? 1 : threads.count;
  // Where panels are few, rows are shared too.
  const int64_t parts = panels < 4 * hands ? std::min(hands, B) : 1;
  const auto work = [&](int64_t tile) {
    const int64_t panel = tile / parts, part = tile % parts;
    const int64_t first = part * B / parts, end = (part + 1) * B / parts;
    loops().product(m, data(packed), panel, data(rows) + first * m.inner(), end - first,
                    data(*out) + first * m.columns());
  };
  share(threads, hands, panels * parts, work, true);
  return ffi::Error::Success();
}

// Rows that run through a program together; their arrays stay in the cache.
constexpr int64_t kProgramRows = 32;

ffi::Error program(ffi::ThreadPool pool, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Span<const int64_t> table,
                   ffi::Span<const int64_t> links, ffi::Span<const int64_t> code,
                   ffi::Span<const int64_t> ends, ffi::Span<const float> constants,
                   ffi::Span<const int64_t> sizes, bool reverse, int64_t devices) {
  const auto arg = [&](int64_t i) { return (*args.get<Buffer>(i)).typed_data(); };
  const int64_t T = sizes[0], B = sizes[1];
  const int32_t* starts = args.get<ffi::Buffer<ffi::S32>>(0)->typed_data();
  std::vector<Memory> memory;
  for (size_t i = 0; i < table.size(); i += 4) {
    const int64_t kind = table[i], width = table[i + 1], at = table[i + 2];
    Memory m{nullptr, width, width, 0, nullptr, 0};
    if (at > 0) m.base = arg(at);
    if (at < 0) m.base = (**rets.get<Buffer>(-1 - at)).typed_data();
    if (kind == kSame) m.row = 0;
    if (kind == kInput || kind == kKept || kind == kOut || kind == kWritten) {
      m.step = width;
      m.row = table[i + 3] * width;
      m.ahead = reverse ? -width : width;
    }
    if (kind == kKept) m.base += starts[0] * width;
    if (kind == kWritten) m.base += starts[1] * width;
    memory.push_back(m);
  }
  std::vector<Link> products;
  for (size_t i = 0; i < links.size(); i += 5) {
    const Buffer weight = *args.get<Buffer>(links[i + 3]);
    const Matrix m{weight.typed_data(), weight.dimensions()[0], weight.dimensions()[1],
                   links[i + 4] != 0};
    products.push_back({links[i], links[i + 1], links[i + 2], m, arg(links[i + 3] + 1)});
  }
  std::vector<Instruction> instructions;
  for (size_t i = 0; i < code.size(); i += 5) {
    const auto at = [&](int k) { return static_cast<int32_t>(code[i + k]); };
    instructions.push_back({at(0), at(1), at(2), at(3), at(4)});
  }
  const Program p{T, B, sizes[2], reverse, instructions.data(), ends.begin(),
                  static_cast<int64_t>(ends.size()), memory.data(),
                  static_cast<int64_t>(memory.size()), products.data(),
                  static_cast<int64_t>(products.size()), constants.begin(),
                  static_cast<int64_t>(constants.size()), sizes[3]};
  const Threads threads(pool, devices);
  const int64_t hands = threads.count;
  const int64_t each = std::max(hands, (B + kProgramRows - 1) / kProgramRows);
  const int64_t groups = std::min(B, (each + hands - 1) / hands * hands);
  share(threads, hands, groups, [&](int64_t group) {
    const int64_t first = group * B / groups, end = (group + 1) * B / groups;
    loops().program(p, first, end - first);
  }, true);
  return ffi::Error::Success();
}

// Logits of so many bytes, or of so few rows, are kept until their gradients are made.
constexpr int64_t kLogits = 16 << 20;
constexpr int64_t kFewLogits = 256;

ffi::Error cross_entropy(ffi::ThreadPool pool, Buffer x, Buffer w, Buffer b,
                         ffi::Buffer<ffi::S32> labels, Booleans valid, Result loss,
                         Result dx, Result dw, Result db, float smoothing,
                         int64_t devices, bool gradients) {
  const int64_t N = labels.element_count(), D = w.dimensions()[0];
  const int64_t V = w.dimensions()[1];
  const CrossEntropy s{N,       D,       V,
                       data(x), data(w), data(b),
                       labels.typed_data(), valid.typed_data(), smoothing};
  const int64_t panels = loops().product_panels(V);
  // A number of threads has one result: each has panels of its own.
  const Threads threads(pool, devices);
  const int64_t parts = std::max<int64_t>(1, std::min(panels, threads.count));
  const int64_t most = std::max(kFewLogits, kLogits / (4 * V));
  const int64_t blocks = (N + most - 1) / most, size = (N + blocks - 1) / blocks;
  const Floats z(size * (V + 16)), log_sums(size), scores(size);
  const Floats sums(3 * parts * size), own((gradients ? parts - 1 : 0) * size * D);
  const auto sums_of = [&](int64_t part) {
    float* at = sums.data() + 3 * part * size;
    return LogitSums{at, at + size, at + 2 * size, scores.data()};
  };
  double total = 0;
  for (int64_t first = 0; first < N; first += size) {
    const int64_t rows = std::min(size, N - first);
    const auto make = [&](int64_t part) {
      loops().logits(s, first, rows, part * panels / parts,
                     (part + 1) * panels / parts, z.data(), sums_of(part));
    };
    share(threads, parts, parts, make, true);
    for (int64_t r = 0; r < rows; ++r) {
      double largest = sums_of(0).most[r], exponentials = 0, all = 0;
      for (int64_t part = 1; part < parts; ++part) {
        largest = std::max<double>(largest, sums_of(part).most[r]);
      }
      for (int64_t part = 0; part < parts; ++part) {
        const LogitSums of = sums_of(part);
        exponentials += of.exponentials[r] * std::exp(of.most[r] - largest);
        all += of.total[r];
      }
      const double log_sum = largest + std::log(exponentials);
      log_sums.data()[r] = static_cast<float>(log_sum);
      if (!s.valid[first + r]) continue;
      total += log_sum - (1.0 - smoothing) * scores.data()[r];
      if (smoothing) total -= smoothing * all / V;
    }
    if (!gradients) continue;
    float* const to = data(*dx) + first * D;
    const auto turn = [&](int64_t part) {
      loops().slopes(s, first, rows, part * panels / parts, (part + 1) * panels / parts,
                     z.data(), log_sums.data(), first == 0,
                     part ? own.data() + (part - 1) * size * D : to, data(*dw),
                     data(*db));
    };
    share(threads, parts, parts, turn, first + size < N);
    for (int64_t part = 1; part < parts; ++part) {
      const float* more = own.data() + (part - 1) * size * D;
      for (int64_t i = 0; i < rows * D; ++i) to[i] += more[i];
    }
  }
  *loss->typed_data() = static_cast<float>(total);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jlstm

XLA_FFI_DEFINE_HANDLER_SYMBOL(jlstm_cross_entropy, jlstm::cross_entropy,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jlstm::Buffer>()  // x
                                  .Arg<jlstm::Buffer>()  // w
                                  .Arg<jlstm::Buffer>()  // b
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // labels
                                  .Arg<jlstm::Booleans>()                  // valid
                                  .Ret<jlstm::Buffer>()  // loss
                                  .Ret<jlstm::Buffer>()  // dx
                                  .Ret<jlstm::Buffer>()  // dw
                                  .Ret<jlstm::Buffer>()  // db
                                  .Attr<float>("smoothing")
                                  .Attr<int64_t>("devices")
                                  .Attr<bool>("gradients"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jlstm_pack, jlstm::pack_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jlstm::Buffer>()  // weights
                                  .Ret<jlstm::Buffer>()  // packed
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("devices"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jlstm_product, jlstm::product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jlstm::Buffer>()  // rows
                                  .Arg<jlstm::Buffer>()  // weights
                                  .Arg<jlstm::Buffer>()  // packed
                                  .Ret<jlstm::Buffer>()  // out
                                  .Ret<jlstm::Buffer>()  // rows, as they are
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("devices"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jlstm_memory, jlstm::memory,
                              xla::ffi::Ffi::Bind().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jlstm_program, jlstm::program,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int64_t>>("table")
                                  .Attr<xla::ffi::Span<const int64_t>>("links")
                                  .Attr<xla::ffi::Span<const int64_t>>("code")
                                  .Attr<xla::ffi::Span<const int64_t>>("ends")
                                  .Attr<xla::ffi::Span<const float>>("constants")
                                  .Attr<xla::ffi::Span<const int64_t>>("sizes")
                                  .Attr<bool>("reverse")
                                  .Attr<int64_t>("devices"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jlstm_forward, jlstm::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jlstm::Buffer>()  // xs
                                  .Arg<jlstm::Buffer>()  // w_ih
                                  .Arg<jlstm::Buffer>()  // w_hh
                                  .Arg<jlstm::Buffer>()  // bias
                                  .Arg<jlstm::Buffer>()  // bias_n
                                  .Arg<jlstm::Buffer>()  // h0
                                  .Arg<jlstm::Buffer>()  // c0
                                  .Arg<jlstm::Buffer>()  // fresh_h
                                  .Arg<jlstm::Buffer>()  // fresh_c
                                  .Arg<jlstm::Booleans>()  // mask
                                  .Arg<jlstm::Booleans>()  // resets
                                  .Ret<jlstm::Buffer>()  // ys
                                  .Ret<jlstm::Buffer>()  // h
                                  .Ret<jlstm::Buffer>()  // c
                                  .Ret<jlstm::Buffer>()  // gates
                                  .Ret<jlstm::Buffer>()  // before_c
                                  .Attr<bool>("gru")
                                  .Attr<bool>("reverse")
                                  .Attr<int64_t>("devices"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jlstm_backward, jlstm::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jlstm::Buffer>()  // xs
                                  .Arg<jlstm::Buffer>()  // w_ih
                                  .Arg<jlstm::Buffer>()  // w_hh
                                  .Arg<jlstm::Buffer>()  // bias
                                  .Arg<jlstm::Buffer>()  // bias_n
                                  .Arg<jlstm::Buffer>()  // hs, before each block
                                  .Arg<jlstm::Buffer>()  // cs
                                  .Arg<jlstm::Buffer>()  // fresh_h
                                  .Arg<jlstm::Buffer>()  // fresh_c
                                  .Arg<jlstm::Buffer>()  // ys
                                  .Arg<jlstm::Buffer>()  // gates
                                  .Arg<jlstm::Buffer>()  // before_c
                                  .Arg<jlstm::Buffer>()  // dys
                                  .Arg<jlstm::Buffer>()  // dh
                                  .Arg<jlstm::Buffer>()  // dc
                                  .Arg<jlstm::Booleans>()  // mask
                                  .Arg<jlstm::Booleans>()  // resets
                                  .Ret<jlstm::Buffer>()  // dxs, or dz
                                  .Ret<jlstm::Buffer>()  // dw_ih
                                  .Ret<jlstm::Buffer>()  // dw_hh
                                  .Ret<jlstm::Buffer>()  // dbias
                                  .Ret<jlstm::Buffer>()  // dh0
                                  .Ret<jlstm::Buffer>()  // dc0
                                  .Ret<jlstm::Buffer>()  // dfresh_h
                                  .Ret<jlstm::Buffer>()  // dfresh_c
                                  .Ret<jlstm::Buffer>()  // ys of a block
                                  .Ret<jlstm::Buffer>()  // gates of a block
                                  .Ret<jlstm::Buffer>()  // before_c of a block
                                  .Attr<bool>("gru")
                                  .Attr<bool>("reverse")
                                  .Attr<int64_t>("devices")
                                  .Attr<int64_t>("every")
                                  .Attr<bool>("inputs"));
