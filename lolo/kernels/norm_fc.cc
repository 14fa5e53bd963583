// `norm_fc` on a CPU: moments, normalisers, network and step of a list of tensors in one call, and AdamW of the others.
//
// The same function as lolo/optimizers/norm_fc.py, in four passes over a tensor: sums over rows and columns; moments
// and sums of squares; network; update. Newton-Schulz stays with the framework, between `lolo_norm_fc_step`, which then
// leaves the step, and `lolo_norm_fc_finish`. Compiled once for every width of vectors; the processor is asked at run
// time. Threads share the tensors of a step, never one tensor: results do not depend on how many there are. With
// LOLO_XLA the library holds handlers for XLA's FFI too.

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef LOLO_XLA
#include "xla/ffi/api/ffi.h"
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Kind : int64_t { ADAM = 0, VECTOR = 1, FACTORED = 2 };  // VECTOR: through the network, below two axes

constexpr int ENTRY_INPUTS = 18, MOST_UNITS = 16;
constexpr long PIECE = 4096;  // entries
constexpr int64_t ENTRIES_TO_SHARE = 1 << 17;  // of all tensors: a step of fewer ends before other threads have begun
constexpr float DECAYS[3] = {0.9f, 0.99f, 0.999f};  // of momenta and of factored moments; Python has them as doubles
constexpr float GAINS[3] = {(float)(1 - 0.9), (float)(1 - 0.99), (float)(1 - 0.999)};
constexpr float RMS_DECAY = 0.95f, RMS_GAIN = (float)(1 - 0.95), GRADIENT_CLIP = 0.1f, LARGEST_GRADIENT = 16777216.0f;
constexpr float NORMALIZE_EPSILON = 1e-9f, BASELINE_EPSILON = 1e-30f, MOMENT_EPSILON = 1e-8f, ADAM_EPSILON = 1e-8f;
constexpr float FACTORED_EPSILON = 1e-30f, FACTOR_MEAN_EPSILON = 1e-9f, FACTOR_FLOOR = 1e-9f;
alignas(64) constexpr int32_t MASK[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

// φ as it is stored: w0 [30, hidden], w1 [hidden, hidden], w2 [hidden, 1], row by row.
struct Phi {
  const float *w0, *b0, *w1, *b1, *w2, *b2;
  int64_t hidden;
};

struct Settings {
  float rate, adam_scale, adam_gain;  // adam_gain: 1 − decay of AdamW's second moment
};

// One tensor, [outer, a, inner, b] in memory; a and b are its factored axes. lolo/kernels/library.py has the same.
struct Tensor {
  const float *grad, *param, *momentum, *rms, *row, *column;  // momentum, row and column: [3, ...]; on AdamW [1, ...]
  float *new_momentum, *new_rms, *new_row, *new_column;       // may be the old ones
  float *step, *out;  // step: of the network, at first; may be `out` unless that is the parameter; null: `steps`
  int64_t kind, outer, a, inner, b, size;
  int64_t last_is_largest, baseline, unfinished, in_place;  // in_place: `out` gets the new parameter, not the update
  int64_t adam_sized;  // the step gets the root mean square of AdamW's, not 1
  int64_t count;       // gradients so far, this one included
  float decay;
};

}  // namespace

#define LANES 4
#define HIDDEN 8
namespace portable_8 {
#include "norm_fc_vector.h"
}
#undef HIDDEN
#define HIDDEN 16
namespace portable_16 {
#include "norm_fc_vector.h"
}
#undef HIDDEN
#undef LANES

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define HIDDEN 8
namespace avx2_8 {
#include "norm_fc_vector.h"
}
#undef HIDDEN
#define HIDDEN 16
namespace avx2_16 {
#include "norm_fc_vector.h"
}
#undef HIDDEN
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,prefer-vector-width=512")
#endif
#define LANES 16
#define HIDDEN 8
namespace avx512_8 {
#include "norm_fc_vector.h"
}
#undef HIDDEN
#define HIDDEN 16
namespace avx512_16 {
#include "norm_fc_vector.h"
}
#undef HIDDEN
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

// The forms, the narrowest first: what `lolo_norm_fc_widest` counts.
struct Form {
  void (*step)(Tensor*, long, const Phi&, const Settings&, float*);
  void (*step_wide)(Tensor*, long, const Phi&, const Settings&, float*);  // of a network of more than 8 units
  void (*finish)(Tensor*, long, const Settings&);
};

constexpr Form FORMS[] = {
    {portable_8::step_all, portable_16::step_all, portable_8::finish_all},
#if defined(__x86_64__)
    {avx2_8::step_all, avx2_16::step_all, avx2_8::finish_all},
    {avx512_8::step_all, avx512_16::step_all, avx512_8::finish_all},
#endif
};

// Floats that `step` needs: for each row and column of a tensor the first layer's sums and three factors.
int64_t scratch_size(const Tensor* tensors, int64_t count) {
  int64_t most = 0;
  for (int64_t t = 0; t < count; t++) {
    const Tensor& of = tensors[t];
    int64_t along = of.kind == FACTORED ? of.outer * of.inner * (of.a + of.b) : of.kind == VECTOR ? 1 + of.size : 0;
    if (along > most) most = along;
  }
  return most * (MOST_UNITS + 3);
}

bool needs_step(const Tensor& of) { return of.kind != ADAM && !of.step; }

// One step of the network. Held by every thread that takes part: one may begin when all is done.
struct Work {
  int64_t form, floats;
  Tensor* tensors;
  const Phi* phi;
  const Settings* settings;
  float* steps;                // for tensors without a place for their step
  std::vector<int64_t> order;  // of tensors, the largest first
  size_t next = 0, done = 0;
  std::mutex mutex;
  std::condition_variable changed;
};

void run(int64_t form, Tensor* tensors, int64_t count, const Phi& phi, const Settings& settings, float* scratch) {
  (phi.hidden > 8 ? FORMS[form].step_wide : FORMS[form].step)(tensors, count, phi, settings, scratch);
}

// Take tensors until there are none.
void take_part(Work& work, float* scratch) {
  float* step = nullptr;
  std::unique_lock<std::mutex> lock(work.mutex);
  while (work.next < work.order.size()) {
    Tensor& of = work.tensors[work.order[work.next++]];
    // The first one is this thread's largest: what holds its step holds those of all that follow.
    if (needs_step(of) && !step) step = work.steps, work.steps += of.size;
    if (needs_step(of)) of.step = step;
    lock.unlock();
    run(work.form, &of, 1, *work.phi, *work.settings, scratch);
    lock.lock();
    if (++work.done == work.order.size()) work.changed.notify_all();
  }
}

int64_t helpers_of(const Tensor* tensors, int64_t count, int64_t threads) {
  int64_t entries = 0;
  for (int64_t t = 0; t < count; t++) entries += tensors[t].size;
  return entries < ENTRIES_TO_SHARE ? 0 : std::max<int64_t>(0, std::min(threads, count) - 1);
}

// start: has a function called by another thread, now, later, or never. Returns 0, or 1 where there is no memory.
template <class Start>
int64_t step_shared(int64_t form, Tensor* tensors, int64_t count, const Phi& phi, const Settings& settings, float* steps,
                    int64_t helpers, Start start) {
  const int64_t floats = scratch_size(tensors, count);
  float* scratch = floats ? (float*)malloc(floats * sizeof(float)) : nullptr;
  if (floats && !scratch) return 1;
  if (helpers) {
    auto work = std::make_shared<Work>();
    work->form = form, work->floats = floats, work->tensors = tensors, work->phi = &phi, work->settings = &settings;
    work->steps = steps;
    for (int64_t t = 0; t < count; t++) work->order.push_back(t);
    std::stable_sort(work->order.begin(), work->order.end(),
                     [&](int64_t a, int64_t b) { return tensors[a].size > tensors[b].size; });
    for (int64_t i = 0; i < helpers; i++)
      start([work] {
        float* own = work->floats ? (float*)malloc(work->floats * sizeof(float)) : nullptr;
        if (own || !work->floats) take_part(*work, own);
        free(own);
      });
    take_part(*work, scratch);
    std::unique_lock<std::mutex> lock(work->mutex);
    work->changed.wait(lock, [&] { return work->done == work->order.size(); });
  } else {
    for (int64_t t = 0; t < count; t++)
      if (needs_step(tensors[t])) tensors[t].step = steps;
    run(form, tensors, count, phi, settings, scratch);
  }
  free(scratch);
  return 0;
}

}  // namespace

// What lolo/kernels/library.py calls VERSION.
EXPORT int64_t lolo_kernel_version() { return 4; }

// The number of the widest form that this processor runs: 0 portable, 1 AVX2, 2 AVX-512.
EXPORT int64_t lolo_norm_fc_widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// steps: as many floats as the `threads` largest of the tensors without a place for their step have entries. Returns 0,
// or 1 where there is no memory.
EXPORT int64_t lolo_norm_fc_step(int64_t form, Tensor* tensors, int64_t count, const Phi* phi, const Settings* settings,
                                 float* steps, int64_t threads) {
  std::vector<std::thread> others;
  auto start = [&](auto function) {
    try {
      others.emplace_back(function);
    } catch (const std::system_error&) {  // the system has no more threads: the others do what there is
    }
  };
  const int64_t helpers = helpers_of(tensors, count, threads);
  const int64_t failed = step_shared(form, tensors, count, *phi, *settings, steps, helpers, start);
  for (std::thread& other : others) other.join();
  return failed;
}

EXPORT void lolo_norm_fc_finish(int64_t form, Tensor* tensors, int64_t count, const Settings* settings) {
  FORMS[form].finish(tensors, count, *settings);
}

#ifdef LOLO_XLA

namespace ffi = xla::ffi;

namespace {

constexpr int64_t WORDS = 9;  // of the attribute `tensors`, per tensor: kind, outer, a, inner, b, ...

// Pointers to operand and result buffers, one batch element after the other: every buffer has the batch's axes first.
struct Reader {
  ffi::RemainingArgs args;
  ffi::RemainingRets rets;
  int64_t batch, lane;
  size_t next_arg = 0, next_ret = 0;

  const float* arg() {
    ffi::AnyBuffer x = *args.get<ffi::AnyBuffer>(next_arg++);
    return (const float*)x.untyped_data() + lane * ((int64_t)x.element_count() / batch);
  }
  float* ret() {
    ffi::Result<ffi::AnyBuffer> x = *rets.get<ffi::AnyBuffer>(next_ret++);
    return (float*)x->untyped_data() + lane * ((int64_t)x->element_count() / batch);
  }
};

Tensor shaped(const int64_t* words, float decay, int64_t count) {
  Tensor of = {};
  of.kind = words[0], of.outer = words[1], of.a = words[2], of.inner = words[3], of.b = words[4];
  of.last_is_largest = words[5], of.baseline = words[6], of.unfinished = words[7], of.adam_sized = words[8];
  of.size = of.outer * of.a * of.inner * of.b, of.decay = decay, of.count = count;
  return of;
}

// Operands: gradients so far; [rate, adam_scale, adam_gain]; decays [T]; φ; of each tensor gradient, parameter, momenta,
// rms, and with the network row, and column where there is one. Results: of each tensor the update, or the step if it is
// to be orthogonalised, and the new moments.
ffi::Error step_xla(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                    ffi::Span<const int64_t> words, int64_t hidden, int64_t form) {
  const int64_t count = (int64_t)words.size() / WORDS;
  const int64_t batch = (int64_t)args.get<ffi::AnyBuffer>(0)->element_count();
  std::vector<Tensor> tensors(count);
  for (int64_t lane = 0; lane < batch; lane++) {
    Reader read{args, rets, batch, lane};
    const int64_t done = *(const int32_t*)read.arg();
    const float *numbers = read.arg(), *decays = read.arg();
    Phi phi = {};
    phi.w0 = read.arg(), phi.b0 = read.arg(), phi.w1 = read.arg(), phi.b1 = read.arg(), phi.w2 = read.arg();
    phi.b2 = read.arg(), phi.hidden = hidden;
    for (int64_t t = 0; t < count; t++) {
      Tensor& of = tensors[t] = shaped(words.begin() + t * WORDS, decays[t], done + 1);
      of.grad = read.arg(), of.param = read.arg(), of.momentum = read.arg(), of.rms = read.arg();
      of.out = of.step = read.ret(), of.new_momentum = read.ret(), of.new_rms = read.ret();
      if (of.kind != ADAM) of.row = read.arg(), of.new_row = read.ret();
      if (of.kind == FACTORED) of.column = read.arg(), of.new_column = read.ret();
    }
    const Settings settings = {numbers[0], numbers[1], numbers[2]};
    // In XLA's own pool, whose threads may all be busy: then this one does what there is.
    const int64_t helpers = helpers_of(tensors.data(), count, pool.num_threads());
    auto start = [&](auto function) { pool.Schedule(std::move(function)); };
    if (step_shared(form, tensors.data(), count, phi, settings, nullptr, helpers, start))
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "norm_fc: no memory");
  }
  return ffi::Error::Success();
}

// Operands: gradients so far; [rate, adam_scale, adam_gain]; decays [T]; of each tensor the orthogonalised step, rms and
// parameter, and the momenta where AdamW's step decides the size, all after the gradient. Results: updates.
ffi::Error finish_xla(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> words, int64_t form) {
  const int64_t count = (int64_t)words.size() / WORDS;
  const int64_t batch = (int64_t)args.get<ffi::AnyBuffer>(0)->element_count();
  std::vector<Tensor> tensors(count);
  for (int64_t lane = 0; lane < batch; lane++) {
    Reader read{args, rets, batch, lane};
    const int64_t done = *(const int32_t*)read.arg();
    const float *numbers = read.arg(), *decays = read.arg();
    for (int64_t t = 0; t < count; t++) {
      Tensor& of = tensors[t] = shaped(words.begin() + t * WORDS, decays[t], done + 1);
      of.step = const_cast<float*>(read.arg()), of.new_rms = const_cast<float*>(read.arg());
      of.param = read.arg(), of.out = read.ret();
      if (of.adam_sized) of.new_momentum = const_cast<float*>(read.arg());
    }
    const Settings settings = {numbers[0], numbers[1], numbers[2]};
    lolo_norm_fc_finish(form, tensors.data(), count, &settings);
  }
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(lolo_norm_fc_step_xla, step_xla,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("tensors")
                                  .Attr<int64_t>("hidden")
                                  .Attr<int64_t>("form"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(lolo_norm_fc_finish_xla, finish_xla,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("tensors")
                                  .Attr<int64_t>("form"));
#pragma GCC visibility pop

#endif  // LOLO_XLA
