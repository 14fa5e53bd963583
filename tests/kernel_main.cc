// Drives the kernel over many shapes, its arrays in memory of exactly their size, for a build with sanitizers
// (tests/test_kernel_build.py). Prints the number of steps that it made.

#include "../lolo/kernels/norm_fc.cc"

#include <cstdio>
#include <vector>

namespace {

uint32_t seed = 1;
float draw() {
  seed = seed * 1664525u + 1013904223u;
  return (float)(seed >> 8) / (1 << 24) - 0.5f;
}

std::vector<float> array(int64_t size) {
  std::vector<float> x(size);
  for (float& each : x) each = draw();
  return x;
}

// One step of tensors of several kinds by so many threads. Returns: their new parameters.
std::vector<std::vector<float>> stepped(int64_t form, int64_t threads) {
  seed = 7;
  const int64_t hidden = 8, shapes[][3] = {{VECTOR, 1, 300}, {FACTORED, 300, 400}, {ADAM, 1, 5000}, {FACTORED, 64, 65}, {VECTOR, 1, 30000}};
  std::vector<std::vector<float>> held, params;
  auto keep = [&](int64_t size) {
    held.push_back(array(size));
    for (float& x : held.back()) x *= x;
    return held.back().data();
  };
  std::vector<Tensor> tensors;
  for (auto [kind, a, b] : shapes) {
    Tensor of = {};
    of.kind = kind, of.outer = of.inner = 1, of.a = a, of.b = b, of.size = a * b, of.count = 3;
    of.last_is_largest = of.baseline = of.in_place = 1, of.decay = 0.1f;
    of.grad = keep(of.size), of.momentum = of.new_momentum = keep(3 * of.size), of.rms = of.new_rms = keep(of.size);
    of.row = of.new_row = keep(3 * (kind == FACTORED ? a : of.size)), of.column = of.new_column = keep(3 * b);
    params.push_back(array(of.size));
    of.param = of.out = params.back().data();
    tensors.push_back(of);
  }
  const Phi phi = {keep(30 * hidden), keep(hidden), keep(hidden * hidden), keep(hidden), keep(hidden), keep(1), hidden};
  const Settings settings = {0.01f, 1.0f, 0.05f};
  const int64_t largest[] = {120000, 30000, 64 * 65, 300};
  int64_t floats = 0;
  for (int64_t t = 0; t < threads && t < 4; t++) floats += largest[t];
  if (lolo_norm_fc_step(form, tensors.data(), (int64_t)tensors.size(), &phi, &settings, keep(floats), threads)) params.clear();
  return params;
}

}  // namespace

int main(int count, char** words) {
  const bool broken = count > 1;  // one entry too few, to see that it is noticed
  (void)words;
  long steps = 0;
  for (int64_t form = 0; form <= lolo_norm_fc_widest(); form++)
    for (int64_t hidden : {1, 5, 8, 16})
      for (int64_t kind : {ADAM, VECTOR, FACTORED})
        for (int64_t outer : {1, 3})
          for (int64_t a : {1, 2, 33})
            for (int64_t inner : {1, 2})
              for (int64_t b : {1, 3, 8, 16, 17, 33, 4100}) {
                if ((kind != FACTORED && (outer > 1 || a > 1 || inner > 1)) || (b > 100 && a * outer > 3)) continue;
                const int64_t size = outer * a * inner * b, lanes = kind == ADAM ? 1 : 3;
                const int64_t rows = outer * a * inner, columns = outer * inner * b;
                for (int flags = 0; flags < 16; flags++) {
                  Tensor of = {};
                  of.kind = kind, of.outer = outer, of.a = a, of.inner = inner, of.b = b, of.size = size, of.count = 3;
                  of.last_is_largest = flags & 1, of.baseline = flags >> 1 & 1, of.unfinished = flags >> 2 & 1;
                  of.adam_sized = flags >> 3;
                  of.in_place = of.baseline, of.decay = of.unfinished ? 0.1f : 0.0f;
                  auto grad = array(size - (broken && size > 1)), param = array(size), momentum = array(lanes * size), rms = array(size);
                  const bool over_last = of.last_is_largest;
                  auto row = array(3 * (kind == VECTOR ? size : over_last ? rows : columns));
                  auto column = array(3 * (over_last ? columns : rows));
                  for (auto* moment : {&rms, &row, &column})
                    for (float& x : *moment) x *= x;
                  auto step = array(size), out = array(size);
                  of.grad = grad.data(), of.param = param.data(), of.step = step.data();
                  of.momentum = of.new_momentum = momentum.data(), of.rms = of.new_rms = rms.data();
                  of.row = of.new_row = row.data(), of.column = of.new_column = column.data();
                  of.out = of.in_place ? param.data() : out.data();
                  auto w0 = array(30 * hidden), b0 = array(hidden), w1 = array(hidden * hidden), b1 = array(hidden);
                  auto w2 = array(hidden), b2 = array(1);
                  const Phi phi = {w0.data(), b0.data(), w1.data(), b1.data(), w2.data(), b2.data(), hidden};
                  const Settings settings = {0.01f, 1.0f, 0.05f};
                  if (lolo_norm_fc_step(form, &of, 1, &phi, &settings, nullptr, 1)) return 1;
                  lolo_norm_fc_finish(form, &of, 1, &settings);
                  steps++;
                }
              }
  for (int64_t form = 0; form <= lolo_norm_fc_widest(); form++) {
    const auto alone = stepped(form, 1);
    for (int64_t threads : {2, 3, 9})
      if (alone.empty() || stepped(form, threads) != alone) return 2;
  }
  std::printf("%ld\n", steps);
  return 0;
}
