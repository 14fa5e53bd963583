// The passes of `norm_fc` over one tensor, for vectors of LANES floats and a network padded to HIDDEN units.
//
// norm_fc.cc includes this once for each pair of LANES and HIDDEN, inside a namespace of its own and under the target
// that has such vectors. Nothing of the standard library is used here: a function of it compiled for wide vectors
// could be the copy that the linker keeps for all.
//
// A tensor is [outer, a, inner, b] in memory, a and b its factored axes. Its rows, of b entries each, are numbered in
// memory order; numbers that are constant along b ("of rows") are then [rows], those constant along a ("of columns")
// [outer, inner, b]. Below two axes everything is one row.

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // at any address

INLINE Vec splat(float x) { return x - Vec{}; }

// n lanes at p, zeros in the others.
INLINE Vec load(const float* p, int n) {
  if (n == LANES) return *(const Loose*)p;
#if LANES == 16
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif LANES == 8
  return (Vec)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i*)(MASK + 8 - n)));
#else
  Vec x = {};
  for (int i = 0; i < n; i++) x[i] = p[i];
  return x;
#endif
}

INLINE void store(float* p, Vec x, int n) {
  if (n == LANES) {
    *(Loose*)p = x;
    return;
  }
#if LANES == 16
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#elif LANES == 8
  _mm256_maskstore_ps(p, _mm256_loadu_si256((const __m256i*)(MASK + 8 - n)), (__m256)x);
#else
  for (int i = 0; i < n; i++) p[i] = x[i];
#endif
}

// The first n lanes, zeros in the others.
INLINE Vec only(Vec x, int n) {
  if (n == LANES) return x;
#if LANES == 16
  return (Vec)_mm512_maskz_mov_ps((__mmask16)((1u << n) - 1), (__m512)x);
#elif LANES == 8
  return (Vec)_mm256_and_ps((__m256)x, _mm256_loadu_ps((const float*)(MASK + 8 - n)));
#else
  for (int i = n; i < LANES; i++) x[i] = 0;
  return x;
#endif
}

// The larger and the smaller of a bound and x. NaN in x stays: the instructions return their second operand then.
INLINE Vec at_least(float bound, Vec x) {
#if LANES == 16
  return (Vec)_mm512_max_ps((__m512)splat(bound), (__m512)x);
#elif LANES == 8
  return (Vec)_mm256_max_ps((__m256)splat(bound), (__m256)x);
#elif defined(__SSE2__)
  return (Vec)_mm_max_ps((__m128)splat(bound), (__m128)x);
#else
  return x < splat(bound) ? splat(bound) : x;
#endif
}

INLINE Vec at_most(float bound, Vec x) {
#if LANES == 16
  return (Vec)_mm512_min_ps((__m512)splat(bound), (__m512)x);
#elif LANES == 8
  return (Vec)_mm256_min_ps((__m256)splat(bound), (__m256)x);
#elif defined(__SSE2__)
  return (Vec)_mm_min_ps((__m128)splat(bound), (__m128)x);
#else
  return x > splat(bound) ? splat(bound) : x;
#endif
}

INLINE Vec root(Vec x) {
#if LANES == 16
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif LANES == 8
  return (Vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Vec)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

INLINE Vec rsqrt(Vec x) { return splat(1.0f) / root(x); }
INLINE Vec relu(Vec x) { return at_least(0.0f, x); }
INLINE float sum(Vec x) {
  double total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return (float)total;
}

// The gradient within ±2^24; x - x is 0 for finite x and NaN for all others.
INLINE Vec gradient(const float* p, int n) {
  Vec x = load(p, n);
  return at_most(LARGEST_GRADIENT, at_least(-LARGEST_GRADIENT, x)) + (x - x);
}

// Sums of squares of n quantities. Floats add up PIECE entries at most, doubles the pieces.
struct Sums {
  Vec lanes[ENTRY_INPUTS + 1];
  double total[ENTRY_INPUTS + 1];
  long pending;
};

INLINE void clear(Sums& sums, int n) {
  for (int i = 0; i < n; i++) sums.lanes[i] = Vec{}, sums.total[i] = 0;
  sums.pending = 0;
}

INLINE void collect(Sums& sums, int n, long entries) {
  sums.pending += entries;
  if (sums.pending < PIECE) return;
  for (int i = 0; i < n; i++) sums.total[i] += sum(sums.lanes[i]), sums.lanes[i] = Vec{};
  sums.pending = 0;
}

INLINE double total(const Sums& sums, int i) { return sums.total[i] + sum(sums.lanes[i]); }

INLINE float normalizer(double squares, long count, float epsilon) {
  return 1.0f / __builtin_sqrtf(epsilon + (float)(squares / count));
}

// A weight as the products of pass 3 take it. AVX-512 reads one float into all lanes on the way; others would need an
// instruction for that.
#if LANES == 16
typedef float Weight;
INLINE Weight weight_of(float x) { return x; }
#else
typedef Vec Weight;
INLINE Weight weight_of(float x) { return splat(x); }
INLINE Vec splat(Weight x) { return x; }
#endif

// φ, padded with zeros to HIDDEN units: [inputs][units].
struct Network {
  Weight second[HIDDEN][HIDDEN], second_bias[HIDDEN], last[HIDDEN], last_bias;
  float entry[ENTRY_INPUTS][HIDDEN], along_row[6][HIDDEN], along_column[6][HIDDEN], first_bias[HIDDEN];
};

static void read_network(const Phi& phi, Network& net) {
  __builtin_memset(&net, 0, sizeof net);
  for (int h = 0; h < phi.hidden; h++) {
    for (int i = 0; i < 15; i++) net.entry[i][h] = phi.w0[i * phi.hidden + h];
    for (int i = 0; i < 3; i++) {
      net.along_row[i][h] = phi.w0[(15 + i) * phi.hidden + h];
      net.along_column[i][h] = phi.w0[(18 + i) * phi.hidden + h];
      net.along_row[3 + i][h] = phi.w0[(21 + i) * phi.hidden + h];
      net.along_column[3 + i][h] = phi.w0[(24 + i) * phi.hidden + h];
      net.entry[15 + i][h] = phi.w0[(27 + i) * phi.hidden + h];
    }
    for (int i = 0; i < phi.hidden; i++) net.second[i][h] = weight_of(phi.w1[i * phi.hidden + h]);
    net.first_bias[h] = phi.b0[h];
    net.second_bias[h] = weight_of(phi.b1[h]), net.last[h] = weight_of(phi.w2[h]);
  }
  net.last_bias = weight_of(phi.b2[0]);
}

// What the entries' pass reads along one axis: the share of the first layer's sums [HIDDEN, n], and factors [3, n].
struct Along {
  float *base, *factor;
};

INLINE void squares_of_moments(Sums& sums, const float* moment, long n, long i, int k) {
  UNROLL for (int d = 0; d < 3; d++) {
    Vec x = load(moment + d * n + i, k), y = rsqrt(x + splat(MOMENT_EPSILON));
    sums.lanes[d] += x * x, sums.lanes[3 + d] += only(y * y, k);
  }
  collect(sums, 6, LANES);
}

INLINE void project(const float (*weight)[HIDDEN], const float* bias, const float* moment, float* base, long n, long i,
                    int k) {
  Vec x[6];
  UNROLL for (int d = 0; d < 3; d++) x[d] = load(moment + d * n + i, k), x[3 + d] = rsqrt(x[d] + splat(MOMENT_EPSILON));
  UNROLL for (int h = 0; h < HIDDEN; h++) {
    Vec y = splat(bias[h]);
    UNROLL for (int d = 0; d < 6; d++) y += splat(weight[d][h]) * x[d];
    store(base + h * n + i, y, k);
  }
}

// A row or column moment and its inverse root, normalised and multiplied by their weights. moment: [3, n].
static void first_layer(const float (*weight)[HIDDEN], const float* bias, const float* moment, long n, float* base) {
  Sums sums;
  clear(sums, 6);
  long i = 0;
  for (; i + LANES <= n; i += LANES) squares_of_moments(sums, moment, n, i, LANES);
  if (i < n) squares_of_moments(sums, moment, n, i, (int)(n - i));
  float scaled[6][HIDDEN];
  for (int d = 0; d < 6; d++) {
    float by = normalizer(total(sums, d), n, NORMALIZE_EPSILON);
    for (int h = 0; h < HIDDEN; h++) scaled[d][h] = by * weight[d][h];
  }
  for (i = 0; i + LANES <= n; i += LANES) project(scaled, bias, moment, base, n, i, LANES);
  if (i < n) project(scaled, bias, moment, base, n, i, (int)(n - i));
}

// d·old + (1 − d)·(mean + 1e-30). sums: [n], of g².
static void average(const float* old, const float* sums, float count, float* moment, long n) {
  for (int d = 0; d < 3; d++)
    for (long i = 0; i < n; i++)
      moment[d * n + i] = DECAYS[d] * old[d * n + i] + GAINS[d] * (sums[i] / count + FACTORED_EPSILON);
}

INLINE float floored_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x < FACTOR_FLOOR ? FACTOR_FLOOR : x); }

// 1/x as the plain path has it: of a mean plus epsilon.
INLINE float reciprocal(float mean) {
  float x = 1.0f / (mean + FACTOR_MEAN_EPSILON);
  return x > 2.0f / FACTOR_MEAN_EPSILON ? 2.0f / FACTOR_MEAN_EPSILON : x;
}

// Factors of the moment over the largest axis: relative to its mean over the second largest, which has `count` entries
// `stride` apart in each of the groups. moment: [3, n].
static void relative_factors(const float* moment, float* factor, long n, long outer, long count, long stride) {
  for (int d = 0; d < 3; d++)
    for (long o = 0; o < outer; o++)
      for (long s = 0; s < stride; s++) {
        long start = d * n + o * count * stride + s;
        double all = 0;
        for (long i = 0; i < count; i++) all += moment[start + i * stride];
        float scale = reciprocal((float)(all / count));
        for (long i = 0; i < count; i++)
          factor[start + i * stride] = floored_rsqrt(moment[start + i * stride] * scale);
      }
}

static void plain_factors(const float* moment, float epsilon, float* factor, long n) {
  for (long i = 0; i < 3 * n; i++) factor[i] = floored_rsqrt(moment[i] + epsilon);
}

INLINE void add_squares(const float* grad, float* columns, Vec& row, int n) {
  Vec g = gradient(grad, n);
  row += g * g;
  store(columns, load(columns, n) + g * g, n);
}

// Pass 1: sums of g² of each row and of each column. part: [inner, b], of a few rows only, so that floats suffice.
static void sum_squares(const Tensor& of, float* rows, float* columns, float* part) {
  const long width = of.inner * of.b;
  for (long o = 0, row = 0; o < of.outer; o++) {
    float* total = columns + o * width;
    for (long i = 0; i < width; i++) total[i] = part[i] = 0;
    for (long a = 0; a < of.a; a++) {
      for (long m = 0; m < of.inner; m++, row++) {
        double all = 0;
        for (long start = 0; start < of.b; start += PIECE) {
          long end = start + PIECE < of.b ? start + PIECE : of.b, j = start;
          const float* grad = of.grad + row * of.b;
          Vec here = {};
          for (; j + LANES <= end; j += LANES) add_squares(grad + j, part + m * of.b + j, here, LANES);
          if (j < end) add_squares(grad + j, part + m * of.b + j, here, (int)(end - j));
          all += sum(here);
        }
        rows[row] = (float)all;
      }
      if (a % 32 == 31 || a == of.a - 1)
        for (long i = 0; i < width; i++) total[i] += part[i], part[i] = 0;
    }
  }
}

// What the entries of a row read beside their own numbers: factors [3] and sums [HIDDEN], `rows` and `columns` apart.
struct Row {
  const float *factor, *base, *column_factor, *column_base;
  long rows, columns;
};

// The pointer, of which the compiler knows nothing any more: it would copy all weights to the stack for every row.
template <class T>
INLINE T* unknown(T* pointer) {
  __asm__("" : "+r"(pointer));
  return pointer;
}

// The inputs of n entries that differ from entry to entry, not normalised, and Nesterov momentum behind them.
INLINE void entry_inputs(Vec g, Vec p, const Vec* m, Vec v, const Row& at, long j, int n, Vec* x) {
  Vec inverse = rsqrt(v + splat(MOMENT_EPSILON));
  x[0] = g, x[1] = at_most(GRADIENT_CLIP, at_least(-GRADIENT_CLIP, g)), x[2] = p;
  x[6] = v, x[10] = inverse, x[14] = g * inverse;
  UNROLL for (int d = 0; d < 3; d++) {
    Vec factor = splat(at.factor[d * at.rows]) * load(at.column_factor + d * at.columns + j, n);
    x[3 + d] = m[d], x[7 + d] = m[d] * inverse, x[11 + d] = g * factor, x[15 + d] = m[d] * factor;
  }
  x[ENTRY_INPUTS] = splat(GAINS[0]) * g + splat(DECAYS[0]) * m[0];
}

INLINE void accumulate(const Tensor& of, const Row& at, long start, long j, int n, Vec* squares) {
  const long i = start + j;
  Vec m[3], x[ENTRY_INPUTS + 1], g = gradient(of.grad + i, n), p = load(of.param + i, n);
  UNROLL for (int d = 0; d < 3; d++) {
    m[d] = splat(DECAYS[d]) * load(of.momentum + d * of.size + i, n) + splat(GAINS[d]) * g;
    store(of.new_momentum + d * of.size + i, m[d], n);
  }
  Vec v = splat(RMS_DECAY) * load(of.rms + i, n) + splat(RMS_GAIN) * (g * g);
  store(of.new_rms + i, v, n);
  entry_inputs(g, p, m, v, at, j, n, x);
  x[10] = only(x[10], n);
  UNROLL for (int k = 0; k <= ENTRY_INPUTS; k++) squares[k] += x[k] * x[k];
}

// The step of n entries, stored, and its squares. Entries that never had a gradient get none.
INLINE void move(const Tensor& of, const Row& at, const Weight* weights, const Network& network, float baseline,
                 long start, long j, int n, Vec* squares) {
  const long i = start + j;
  const Weight* weight = unknown(weights);  // [ENTRY_INPUTS, HIDDEN]
  const Network& net = *unknown(&network);
  Vec m[3], x[ENTRY_INPUTS + 1], v = load(of.new_rms + i, n), first[HIDDEN], second[HIDDEN];
  UNROLL for (int d = 0; d < 3; d++) m[d] = load(of.new_momentum + d * of.size + i, n);
  entry_inputs(gradient(of.grad + i, n), load(of.param + i, n), m, v, at, j, n, x);
  UNROLL for (int h = 0; h < HIDDEN; h++) first[h] = splat(at.base[h * at.rows]) + load(at.column_base + h * at.columns + j, n);
  UNROLL for (int k = 0; k < ENTRY_INPUTS; k++)
    UNROLL for (int h = 0; h < HIDDEN; h++) first[h] += splat(weight[k * HIDDEN + h]) * x[k];
  UNROLL for (int h = 0; h < HIDDEN; h++) first[h] = relu(first[h]), second[h] = splat(net.second_bias[h]);
  UNROLL for (int k = 0; k < HIDDEN; k++)
    UNROLL for (int h = 0; h < HIDDEN; h++) second[h] += splat(net.second[k][h]) * first[k];
  Vec out[2] = {splat(net.last_bias), Vec{}};
  UNROLL for (int h = 0; h < HIDDEN; h++) out[h % 2] += splat(net.last[h]) * relu(second[h]);
  Vec step = out[0] + out[1];
  if (of.baseline) step += splat(baseline) * x[ENTRY_INPUTS];
  // Not "where v > 0": v of NaN is no entry that never had a gradient, and must show. Newton-Schulz sees all entries.
  if (!of.unfinished) step = v == splat(0.0f) ? Vec{} : step;
  store(of.step + i, step, n);
  squares[0] += only(step * step, n);
}

// Passes 2 and 3 walk over rows in pieces; `body` is what is done to up to LANES entries.
#define WALK(sums, count, body)                                                                          \
  for (long o = 0, row = 0; o < of.outer; o++)                                                           \
    for (long a = 0; a < of.a; a++)                                                                      \
      for (long inner = 0; inner < of.inner; inner++, row++) {                                           \
        const long column = (o * of.inner + inner) * of.b;                                               \
        const Row at = {along_row.factor + row,       along_row.base + row,       along_column.factor + column, \
                        along_column.base + column, rows, columns};                                     \
        const long start = row * of.b;                                                                   \
        for (long from = 0; from < of.b; from += PIECE) {                                                \
          const long end = from + PIECE < of.b ? from + PIECE : of.b;                                    \
          long j = from;                                                                                 \
          for (int n = LANES; j + LANES <= end; j += LANES) body;                                        \
          if (const int n = (int)(end - j)) body;                                                        \
          collect(sums, count, end - from);                                                              \
        }                                                                                                \
      }

// Passes 1 to 3 of a tensor for the network: moments, then its step, and the mean of the step's squares.
static double learn(const Tensor& of, const Network& net, float* scratch) {
  const bool factored = of.kind == FACTORED;
  const long rows = factored ? of.outer * of.a * of.inner : 1, columns = factored ? of.outer * of.inner * of.b : of.size;
  const Along along_row = {scratch, scratch + HIDDEN * rows};
  scratch += (HIDDEN + 3) * rows;
  const Along along_column = {scratch, scratch + HIDDEN * columns};
  if (factored) {
    float *row_sums = along_row.base, *column_sums = along_column.base;  // overwritten below
    sum_squares(of, row_sums, column_sums, scratch + columns);
    // Means over b lie along rows. They are the state's `row` where b is the largest axis, else its `column`.
    const float *old_rows = of.last_is_largest ? of.row : of.column, *old_columns = of.last_is_largest ? of.column : of.row;
    float *new_rows = of.last_is_largest ? of.new_row : of.new_column;
    float *new_columns = of.last_is_largest ? of.new_column : of.new_row;
    average(old_rows, row_sums, (float)of.b, new_rows, rows);
    average(old_columns, column_sums, (float)of.a, new_columns, columns);
    if (of.last_is_largest) {
      relative_factors(new_rows, along_row.factor, rows, of.outer, of.a, of.inner);
      plain_factors(new_columns, 0.0f, along_column.factor, columns);
    } else {
      relative_factors(new_columns, along_column.factor, columns, of.outer * of.inner, of.b, 1);
      plain_factors(new_rows, 0.0f, along_row.factor, rows);
    }
    const float zero[HIDDEN] = {};
    first_layer(of.last_is_largest ? net.along_row : net.along_column, net.first_bias, new_rows, rows, along_row.base);
    first_layer(of.last_is_largest ? net.along_column : net.along_row, zero, new_columns, columns, along_column.base);
  } else {
    for (long i = 0; i < columns; i++) {
      float g = of.grad[i];
      g = (g > LARGEST_GRADIENT ? LARGEST_GRADIENT : g < -LARGEST_GRADIENT ? -LARGEST_GRADIENT : g) + (g - g);
      along_column.base[i] = g * g;
    }
    average(of.row, along_column.base, 1.0f, of.new_row, columns);
    plain_factors(of.new_row, FACTOR_MEAN_EPSILON, along_column.factor, columns);
    __builtin_memset(along_column.base, 0, HIDDEN * columns * sizeof(float));
    for (int d = 0; d < 3; d++) along_row.factor[d] = 1.0f;
    for (int h = 0; h < HIDDEN; h++) along_row.base[h] = net.first_bias[h];
  }

  Sums inputs;
  clear(inputs, ENTRY_INPUTS + 1);
  WALK(inputs, ENTRY_INPUTS + 1, accumulate(of, at, start, j, n, inputs.lanes))
  Weight weight[ENTRY_INPUTS][HIDDEN];
  for (int k = 0; k < ENTRY_INPUTS; k++) {
    // Below two axes there are no factored momenta.
    const float by = factored || k < 15 ? normalizer(total(inputs, k), of.size, NORMALIZE_EPSILON) : 0.0f;
    for (int h = 0; h < HIDDEN; h++) weight[k][h] = weight_of(by * net.entry[k][h]);
  }
  const float baseline = normalizer(total(inputs, ENTRY_INPUTS), of.size, BASELINE_EPSILON);
  Sums steps;
  clear(steps, 1);
  WALK(steps, 1, move(of, at, weight[0], net, baseline, start, j, n, steps.lanes))
  return total(steps, 0);
}
#undef WALK

// AdamW's step before learning rate and decay, bias-corrected by these factors.
INLINE Vec adam_step(Vec m, Vec v, float mean_scale, float square_scale) {
  return splat(mean_scale) * m / (root(splat(square_scale) * v) + splat(ADAM_EPSILON));
}

// What an average is multiplied by that began at zero. gain: 1 − its decay.
INLINE float correction(float gain, const Tensor& of) {
  return (float)(-1.0 / __builtin_expm1((double)of.count * __builtin_log1p(-(double)gain)));
}

INLINE void add_adam(const Tensor& of, float mean_scale, float square_scale, long i, int n, Vec& squares) {
  Vec step = adam_step(load(of.new_momentum + i, n), load(of.new_rms + i, n), mean_scale, square_scale);
  squares += step * step;
}

// The root mean square of AdamW's step, from the new moments.
static float adam_rms(const Tensor& of) {
  const float mean_scale = correction(GAINS[0], of), square_scale = correction(RMS_GAIN, of);
  Sums sums;
  clear(sums, 1);
  long i = 0;
  for (; i + LANES <= of.size; i += LANES)
    add_adam(of, mean_scale, square_scale, i, LANES, sums.lanes[0]), collect(sums, 1, LANES);
  if (i < of.size) add_adam(of, mean_scale, square_scale, i, (int)(of.size - i), sums.lanes[0]);
  return __builtin_sqrtf((float)(total(sums, 0) / of.size));
}

INLINE void scaled(const Tensor& of, const Settings& settings, float scale, bool masked, long i, int n) {
  Vec step = splat(scale) * load(of.step + i, n);
  if (masked) step = load(of.new_rms + i, n) == splat(0.0f) ? Vec{} : step;
  if (of.decay != 0.0f || of.in_place) {
    Vec p = load(of.param + i, n);
    step = splat(-settings.rate) * (step + splat(of.decay) * p);
    store(of.out + i, of.in_place ? p + step : step, n);
  } else {
    store(of.out + i, splat(-settings.rate) * step, n);
  }
}

// Pass 4: the update, from the step and the sum of its squares. masked: entries without a gradient are not 0 yet.
static void finish(const Tensor& of, const Settings& settings, double squares, bool masked) {
  const float unit = normalizer(squares, of.size, NORMALIZE_EPSILON), scale = of.adam_sized ? unit * adam_rms(of) : unit;
  long i = 0;
  for (; i + LANES <= of.size; i += LANES) scaled(of, settings, scale, masked, i, LANES);
  if (i < of.size) scaled(of, settings, scale, masked, i, (int)(of.size - i));
}

INLINE void add_masked(const Tensor& of, long i, int n, Vec& squares) {
  Vec step = load(of.step + i, n);
  step = load(of.new_rms + i, n) == splat(0.0f) ? Vec{} : step;
  squares += only(step * step, n);
}

// The update of a tensor whose step was orthogonalised.
static void finish_orthogonal(const Tensor& of, const Settings& settings) {
  Sums sums;
  clear(sums, 1);
  long i = 0;
  for (; i + LANES <= of.size; i += LANES) add_masked(of, i, LANES, sums.lanes[0]), collect(sums, 1, LANES);
  if (i < of.size) add_masked(of, i, (int)(of.size - i), sums.lanes[0]);
  finish(of, settings, total(sums, 0), true);
}

INLINE void adam(const Tensor& of, const Settings& settings, float mean_scale, float square_scale, long i, int n) {
  Vec g = gradient(of.grad + i, n), p = load(of.param + i, n);
  Vec m = splat(DECAYS[0]) * load(of.momentum + i, n) + splat(GAINS[0]) * g;
  Vec v = splat(1.0f - settings.adam_gain) * load(of.rms + i, n) + splat(settings.adam_gain) * (g * g);
  store(of.new_momentum + i, m, n), store(of.new_rms + i, v, n);
  Vec step = splat(settings.adam_scale) * adam_step(m, v, mean_scale, square_scale);
  Vec change = splat(-settings.rate) * (step + splat(of.decay) * p);
  store(of.out + i, of.in_place ? p + change : change, n);
}

// AdamW's update, bias-corrected after `of.count` gradients.
static void finish_adam(const Tensor& of, const Settings& settings) {
  const float mean_scale = correction(GAINS[0], of), square_scale = correction(settings.adam_gain, of);
  long i = 0;
  for (; i + LANES <= of.size; i += LANES) adam(of, settings, mean_scale, square_scale, i, LANES);
  if (i < of.size) adam(of, settings, mean_scale, square_scale, i, (int)(of.size - i));
}

static void step_all(Tensor* tensors, long count, const Phi& phi, const Settings& settings, float* scratch) {
  alignas(64) Network net;
  read_network(phi, net);
  for (long t = 0; t < count; t++) {
    const Tensor& of = tensors[t];
    if (of.size == 0) continue;
    if (of.kind == ADAM) {
      finish_adam(of, settings);
    } else {
      double squares = learn(of, net, scratch);
      if (!of.unfinished) finish(of, settings, squares, false);
    }
  }
}

[[maybe_unused]] static void finish_all(Tensor* tensors, long count, const Settings& settings) {
  for (long t = 0; t < count; t++)
    if (tensors[t].size) finish_orthogonal(tensors[t], settings);
}
