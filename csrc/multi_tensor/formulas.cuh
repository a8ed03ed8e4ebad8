// The mathematics of a step, element by element and number by number, one function per line of it.
//
// The same text runs in the CUDA kernels on the elements a thread holds and on the host on a few hundred at a time: R
// is float (double for fp64 tensors on the host), N how many elements. Switches over the program stand outside the
// loops over elements: they are the same for a whole block.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/floats.h"
#include "common/host_device.h"
#include "multi_tensor/params.h"

namespace steepest::multi_tensor {
inline namespace STEEPEST_ISA {

// ---- the numbers of a step: once for every parameter, in fp64 ------------------------------------------------------

// 1 - beta^t without cancellation; beta in [0, 1).
STEEPEST_HD inline double bias_correction(double beta, double t) { return beta == 0 ? 1.0 : -expm1(t * log(beta)); }

STEEPEST_HD inline double power_of(Program::Power power) {
  switch (power) {
    case Program::kQuarter:
      return 0.25;
    case Program::kHalf:
      return 0.5;
    case Program::kSixth:
      return 1.0 / 6;
    default:
      return 0;
  }
}

// sum of ratio^j for j = 0 .. t - 1; t = infinity where nobody counts.
STEEPEST_HD inline double geometric(double ratio, double t) {
  if (ratio < 1) return ratio <= 0 ? 1.0 : bias_correction(ratio, t) / (1 - ratio);
  return ratio == 1 ? t : expm1(t * log(ratio)) / (ratio - 1);
}

// A bound on |x| for the direction's input x = y / D, y the momentum as it is read.
//
// |y| is bounded by the largest entries of gradient and old momentum. Where a preconditioner divides, Cauchy and
// Schwarz bound it against v = sum_j u_j g_j^2 as well: for y = sum_j w_j g_j, |y| <= c sqrt(v) with c^2 = sum_j w_j^2
// / u_j, so that |x| = |y|^(1 - 2p) (|y| / sqrt(v))^(2p) where D = v^p. eps only lowers |x|, and bounds it by itself.
// Averages that begin with the first gradient have w_1 = beta1^(t - 1) and u_1 = beta2^(t - 1).
STEEPEST_HD inline double input_bound(const Program& program, const double* row, double momentum_max) {
  const double beta1 = row[kBeta1], weight = program.heavy_ball ? 1.0 : row[kOneMinusBeta1], g = row[kGradMax];
  const double m = beta1 * momentum_max + weight * g;
  const double read = row[kReadBeta1], fresh = program.heavy_ball ? 1.0 : fabs(row[kOneMinusReadBeta1]);
  const double y = (program.nesterov ? fresh * g + read * m : m) * row[kInverseCorrection1];
  const double slack = 1.02;  // the momentum is rounded to bf16 at worst, and v to fp32
  if (program.power == Program::kNone) return slack * y;
  const double beta2 = program.sum ? 1.0 : row[kBeta2], gain = program.sum ? 1.0 : row[kOneMinusBeta2];
  const bool counts = program.momentum_correction || program.second_correction || program.start_first;
  const double t = counts ? row[kStep] : INFINITY, ratio = beta1 * beta1 / beta2;
  double c;
  if (!program.start_first)
    c = weight * sqrt(geometric(ratio, t) / gain);
  else
    c = t == 1 ? 1.0 : sqrt(weight * weight * geometric(ratio, t - 1) / gain + pow(ratio, t - 1));
  if (program.nesterov) c = weight / sqrt(gain) + beta1 * c;
  const double p = power_of(program.power);
  // y <= c sqrt(v) and D^2 >= v^(2p) times its correction.
  const double by_history =
      slack * pow(y, 1 - 2 * p) * pow(c * row[kInverseCorrection1], 2 * p) / sqrt(row[kInverseCorrection2]);
  // D^2 >= eps as well.
  const double by_eps = slack * y / sqrt(row[kEps] * (program.eps_inside ? row[kInverseCorrection2] : 1));
  return by_history <= by_eps ? by_history : by_eps;  // with beta2 = 0 the history bounds nothing
}

// 2^k with bound 2^k <= 2^15, which fp16 holds; 1 where there is no bound. At most 2^127, the largest that fp32 holds:
// of an input all of whose entries are subnormal it makes multiples of 2^-22, which fp16 holds as well.
STEEPEST_HD inline double input_scale(double bound) {
  if (!(bound > 0 && bound < INFINITY)) return 1;
  int exponent;
  frexp(bound, &exponent);  // bound < 2^exponent
  exponent = exponent > 130 ? 130 : exponent < -112 ? -112 : exponent;
  return ldexp(1.0, 15 - exponent);
}

// The rest of a row that `measure` began but for the input's scale, from the step count before this gradient.
STEEPEST_HD inline void decide_numbers(double* row, const Program& program, const double* hyper, double step,
                                       double grad_scale) {
  const double scale = 1 / grad_scale;
  const bool begins = program.start_first && step == 0;
  const double beta1 = begins ? 0.0 : hyper[kHyperBeta1], beta2 = begins ? 0.0 : hyper[kHyperBeta2];
  row[kStep] = step + row[kFinite];
  row[kGradScale] = program.maximize ? -scale : scale;
  row[kBeta1] = beta1;
  row[kOneMinusBeta1] = 1 - beta1;
  row[kBeta2] = beta2;
  row[kOneMinusBeta2] = 1 - beta2;
  row[kReadBeta1] = program.interpolated ? hyper[kHyperBeta2] / hyper[kHyperBeta1] : hyper[kHyperBeta1];
  row[kOneMinusReadBeta1] = 1 - row[kReadBeta1];
  row[kEps] = hyper[kHyperEps];
  row[kInverseCorrection1] = program.momentum_correction ? 1 / bias_correction(hyper[kHyperBeta1], row[kStep]) : 1;
  row[kInverseCorrection2] = program.second_correction
                                 ? pow(bias_correction(hyper[kHyperBeta2], row[kStep]), -2 * power_of(program.power))
                                 : 1;
  row[kDecay] = (program.decay_independent ? 1.0 : hyper[kHyperLr]) * hyper[kHyperWeightDecay];
  row[kLr] = hyper[kHyperLr];
}

// And that scale, from the largest magnitude of the old momentum.
STEEPEST_HD inline void decide_row(double* row, const Program& program, const double* hyper, double step,
                                   double momentum_max, double grad_scale) {
  decide_numbers(row, program, hyper, step, grad_scale);
  row[kInputScale] = row[kFinite] != 0 ? input_scale(input_bound(program, row, momentum_max)) : 1;
}

STEEPEST_HD inline double value_of(const HyperValue& number) {
  if (number.at == nullptr) return number.value;
  return number.dtype == Dtype::f64 ? *static_cast<const double*>(number.at) : *static_cast<const float*>(number.at);
}

STEEPEST_HD inline double value_or_one(const float* at) { return at ? *at : 1.0; }

// The largest finite number.
template <class R>
STEEPEST_HD constexpr R most() {
  return sizeof(R) == sizeof(double) ? static_cast<R>(1.7976931348623157e308) : static_cast<R>(3.4028234663852886e38);
}

// What is measured, of a parameter's row: from its gradient's largest magnitude (infinite where an entry is not finite)
// and sum of squares. is_double: the arithmetic that follows is fp64. What the caller says of the row is left there.
STEEPEST_HD inline void measure(const Scaling& scaling, double grad_max, double grad_sq, bool is_double, double* row) {
  const double scale = 1 / value_or_one(scaling.grad_scale);
  const double largest_finite = is_double ? most<double>() : most<float>();
  const bool found_inf = scaling.found_inf != nullptr && *scaling.found_inf != 0;
  grad_max *= scale;
  row[kFinite] = !found_inf && grad_max <= (row[kLargestTaken] > 0 ? row[kLargestTaken] : largest_finite);
  row[kGradMax] = grad_max;
  row[kGradSq] = grad_sq * scale * scale;
}

// decide_row with what the owner says; counts its step. False where the step is not taken.
STEEPEST_HD inline bool decide(const Owner& owner, const float* grad_scale, double momentum_max, double* row) {
  double hyper[kHypers];
  for (int h = 0; h < kHypers; ++h) hyper[h] = value_of(owner.hyper[h]);
  decide_row(row, owner.program, hyper, owner.step ? *owner.step : 0.0, momentum_max, value_or_one(grad_scale));
  if (owner.step) *owner.step = static_cast<float>(row[kStep]);
  return row[kFinite] != 0;
}

// A row as the element formulas want it.
template <class R>
struct Numbers {
  R grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, read_beta1, one_minus_read_beta1;
  R eps, inverse_correction1, inverse_correction2;
  R keep, decay, step, input_scale;

  Numbers() = default;
  // ratio: the shape's; length: what the direction's length is multiplied by.
  STEEPEST_HD Numbers(const Program& program, const double* row, double ratio, double length)
      : Numbers(row, row[kDecay] * (program.decay_scaled ? ratio : 1.0), row[kLr] * (ratio * length)) {}

 private:
  STEEPEST_HD Numbers(const double* row, double decay, double step)
      : grad_scale(static_cast<R>(row[kGradScale])),
        beta1(static_cast<R>(row[kBeta1])),
        one_minus_beta1(static_cast<R>(row[kOneMinusBeta1])),
        beta2(static_cast<R>(row[kBeta2])),
        one_minus_beta2(static_cast<R>(row[kOneMinusBeta2])),
        read_beta1(static_cast<R>(row[kReadBeta1])),
        one_minus_read_beta1(static_cast<R>(row[kOneMinusReadBeta1])),
        eps(static_cast<R>(row[kEps])),
        inverse_correction1(static_cast<R>(row[kInverseCorrection1])),
        inverse_correction2(static_cast<R>(row[kInverseCorrection2])),
        keep(static_cast<R>(1 - decay)),
        decay(static_cast<R>(decay)),
        step(static_cast<R>(step)),
        input_scale(static_cast<R>(row[kInputScale])) {}
};

// ---- elements ------------------------------------------------------------------------------------------------------

// The same elements of an item's tensors; `p` as the fp32 number that parameter and mantissa make together.
template <class R, int N>
struct Tile {
  R g[N], m[N], v[N], d[N], p[N];
};

// Sums over a tile, in R over its few elements; the caller adds them up further.
template <class R>
struct Sums {
  R at[kSums];
};

STEEPEST_HD constexpr bool is_largest(int column) { return column == kInputMax || column == kMomentumMax; }

template <class R>
STEEPEST_HD inline R larger(R a, R b) {
  return a > b ? a : b;
}
STEEPEST_HD inline float square_root(float x) { return sqrtf(x); }
STEEPEST_HD inline double square_root(double x) { return sqrt(x); }
STEEPEST_HD inline float cube_root(float x) { return cbrtf(x); }
STEEPEST_HD inline double cube_root(double x) { return cbrt(x); }
STEEPEST_HD inline float magnitude(float x) { return fabsf(x); }
STEEPEST_HD inline double magnitude(double x) { return fabs(x); }
STEEPEST_HD inline float reciprocal_root(float x) {
#ifdef __CUDA_ARCH__
  return rsqrtf(x);
#else
  return 1.f / sqrtf(x);
#endif
}
STEEPEST_HD inline double reciprocal_root(double x) { return 1.0 / sqrt(x); }

// a + w (b - a), from the nearer end, as torch.lerp.
template <class R>
STEEPEST_HD inline R lerp(R a, R b, R w, R one_minus_w) {
  return w < R(0.5) ? a + w * (b - a) : b - (b - a) * one_minus_w;
}

#ifdef __CUDA_ARCH__
#define STEEPEST_EACH _Pragma("unroll") for (int j = 0; j < N; ++j)
#define STEEPEST_REDUCE(how) STEEPEST_EACH
#elif !defined(STEEPEST_VECTOR_CODE)
#define STEEPEST_EACH for (int j = 0; j < N; ++j)
#define STEEPEST_REDUCE(how) STEEPEST_EACH
#else
#define STEEPEST_EACH for (int j = 0; j < N; ++j)
// Lets the compiler keep several partial results in one register; -fopenmp-simd, no OpenMP at run time.
#define STEEPEST_PRAGMA(text) _Pragma(#text)
#define STEEPEST_REDUCE(how) STEEPEST_PRAGMA(omp simd reduction(how : result)) STEEPEST_EACH
#endif

template <class R, int N>
STEEPEST_HD inline R dot(const R (&a)[N], const R (&b)[N]) {
  R result = 0;
  STEEPEST_REDUCE(+) result += a[j] * b[j];
  return result;
}

template <class R, int N>
STEEPEST_HD inline R largest(const R (&a)[N]) {
  R result = 0;
  STEEPEST_REDUCE(max) result = larger(magnitude(a[j]), result);
  return result;
}

// D^2 = (v^(2p) + eps) / c  or  v^(2p) / c + eps
template <class R, int N>
STEEPEST_HD inline void squared_d(const Program& program, const Numbers<R>& n, const R (&v)[N], R (&squared)[N]) {
  switch (program.power) {
    case Program::kQuarter:
      STEEPEST_EACH squared[j] = square_root(v[j]);
      break;
    case Program::kSixth:
      STEEPEST_EACH squared[j] = cube_root(v[j]);
      break;
    default:
      STEEPEST_EACH squared[j] = v[j];
  }
  if (program.eps_inside) {
    STEEPEST_EACH squared[j] = (squared[j] + n.eps) * n.inverse_correction2;
  } else {
    STEEPEST_EACH squared[j] = squared[j] * n.inverse_correction2 + n.eps;
  }
}

// 1 / D, with 1 / 0 = 0.
template <class R, int N>
STEEPEST_HD inline void inverse_of_d(const Program& program, const Numbers<R>& n, const R (&v)[N], R (&inverse)[N]) {
  squared_d(program, n, v, inverse);
  STEEPEST_EACH inverse[j] = inverse[j] > R(0) ? reciprocal_root(inverse[j]) : R(0);
}

// W <- (1 - decay) W - step u; cautious: only where decay and update agree; decay after: (1 - decay) (W - step u).
// From tile.d, which is u, and tile.p.
template <class R, int N>
STEEPEST_HD inline void move(const Program& program, const Numbers<R>& n, Tile<R, N>& tile, Sums<R>& sums) {
  if (program.cautious) {
    STEEPEST_EACH {
      const R kept = tile.d[j] * tile.p[j] >= R(0) ? tile.p[j] : R(0);
      tile.p[j] = tile.p[j] - kept * n.decay - tile.d[j] * n.step;
    }
  } else if (program.decay_after) {
    STEEPEST_EACH tile.p[j] = (tile.p[j] - tile.d[j] * n.step) * n.keep;
  } else {
    STEEPEST_EACH tile.p[j] = tile.p[j] * n.keep - tile.d[j] * n.step;
  }
  sums.at[kUpdateSq] += dot(tile.d, tile.d) * (n.step * n.step);
  sums.at[kParamSq] += dot(tile.p, tile.p);
}

// Momentum and second moment take the gradient; tile.m is left as it was stored, in momentum's own type by `store`.
// Frozen ones stay as they are.
template <class R, int N, class Store>
STEEPEST_HD inline void observe(const Program& program, const Numbers<R>& n, Tile<R, N>& tile, const Store& store) {
  STEEPEST_EACH tile.g[j] *= n.grad_scale;
  if (program.frozen_moments) return;
  if (program.heavy_ball) {
    STEEPEST_EACH tile.m[j] = tile.m[j] * n.beta1 + tile.g[j];
  } else {
    STEEPEST_EACH tile.m[j] = lerp(tile.m[j], tile.g[j], n.one_minus_beta1, n.beta1);
  }
  store(tile.m);
  if (program.power == Program::kNone) return;
  if (program.sum) {
    STEEPEST_EACH tile.v[j] = tile.v[j] + tile.g[j] * tile.g[j];
  } else {
    STEEPEST_EACH tile.v[j] = tile.v[j] * n.beta2 + tile.g[j] * tile.g[j] * n.one_minus_beta2;
  }
}

// y, the momentum as it is read, into tile.d.
template <class R, int N>
STEEPEST_HD inline void read(const Program& program, const Numbers<R>& n, Tile<R, N>& tile, Sums<R>& sums) {
  if (!program.nesterov) {
    STEEPEST_EACH tile.d[j] = tile.m[j] * n.inverse_correction1;
  } else if (program.heavy_ball) {
    STEEPEST_EACH tile.d[j] = tile.g[j] + tile.m[j] * n.read_beta1;
  } else {
    STEEPEST_EACH tile.d[j] = lerp(tile.g[j], tile.m[j], n.read_beta1, n.one_minus_read_beta1);
  }
  sums.at[kGradDot] += dot(tile.g, tile.m);
  sums.at[kMomentumSq] += dot(tile.m, tile.m);
  sums.at[kMomentumMax] = larger(sums.at[kMomentumMax], largest(tile.m));
}

// Into the range of fp16; NaN stays NaN.
template <class R>
STEEPEST_HD inline R clamp_to_f16(R x) {
  return x < R(-65504) ? R(-65504) : x > R(65504) ? R(65504) : x;
}

// The whole step where the direction is x itself: u = x / D = y / D^2, with 0 / 0 = 0.
template <class R, int N>
STEEPEST_HD inline void step_along_itself(const Program& program, const Numbers<R>& n, Tile<R, N>& tile,
                                          Sums<R>& sums) {
  if (program.power != Program::kNone) {
    R squared[N];
    squared_d(program, n, tile.v, squared);
    STEEPEST_EACH tile.d[j] = squared[j] > R(0) ? tile.d[j] / squared[j] : R(0);
  }
  move(program, n, tile, sums);
}

// `update_moments`, and where no other op computes the direction the whole step.
template <class R, int N, class Store>
STEEPEST_HD inline void until_direction(const Program& program, const Numbers<R>& n, Tile<R, N>& tile, Sums<R>& sums,
                                        const Store& store) {
  observe(program, n, tile, store);
  read(program, n, tile, sums);
  if (program.direction == Program::kIdentity) return step_along_itself(program, n, tile, sums);
  const bool divides = program.power != Program::kNone;
  R inverse[N];
  if (divides) {
    inverse_of_d(program, n, tile.v, inverse);
    STEEPEST_EACH tile.d[j] *= inverse[j];
  }
  sums.at[kInputSq] += dot(tile.d, tile.d);
  sums.at[kInputMax] = larger(sums.at[kInputMax], largest(tile.d));
  if (program.direction == Program::kGiven) return;
  STEEPEST_EACH tile.d[j] = R(tile.d[j] > R(0)) - R(tile.d[j] < R(0));
  if (divides) STEEPEST_EACH tile.d[j] *= inverse[j];
  move(program, n, tile, sums);
}

template <class R, int N>
STEEPEST_HD inline void from_direction(const Program& program, const Numbers<R>& n, Tile<R, N>& tile, Sums<R>& sums) {
  if (program.power != Program::kNone) {
    R inverse[N];
    inverse_of_d(program, n, tile.v, inverse);
    STEEPEST_EACH tile.d[j] *= inverse[j];
  }
  move(program, n, tile, sums);
}

#undef STEEPEST_EACH
#undef STEEPEST_REDUCE

// ---- stochastic rounding -------------------------------------------------------------------------------------------

// The 32-bit integer hash lowbias32 (github.com/skeeto/hash-prospector).
STEEPEST_HD inline uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

// What tells the random bits of this step and this item from all others; steepest.parts.rounding has the same text.
STEEPEST_HD inline uint32_t seed(double step, const uint32_t (&place)[3]) {
  uint32_t s = scramble(static_cast<uint32_t>(static_cast<int64_t>(step)));
  for (uint32_t number : place) s = scramble(s + 0x9e3779b9u * (number + 1));
  return s;
}

// Sixteen uniform bits for an element.
STEEPEST_HD inline uint32_t noise(uint32_t seed, int64_t element) {
  return scramble(scramble(static_cast<uint32_t>(element)) ^ seed) >> 16;
}

}  // namespace STEEPEST_ISA
}  // namespace steepest::multi_tensor
