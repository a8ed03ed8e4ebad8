// What the fused elementwise ops are told; no torch in here. Sizes and strides are in elements.
//
// An op works on items. An item is a run of equal matrices (a vector, or any parameter that is not read as matrices, is
// one matrix) whose elements lie in up to six tensors, the slots; an item says by its program what happens to them. The
// numbers of a step (learning rate, averages' weights, whether the gradient was finite) are rows of a table in device
// memory, one for every parameter: `grad_stats` and `decide_steps` write them, `update_moments` and `apply_update` read
// them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/scratch.h"
#include "multi_tensor/layout.h"

namespace steepest::multi_tensor {

// What an item's tensors are.
enum Slot : int {
  kGrad,
  kMomentum,
  kSecond,     // second moment
  kDirection,  // the direction's input in `update_moments`, the direction in `apply_update`; 16 bits wide as a rule
  kParam,
  kMantissa,  // what bf16 leaves of an fp32 weight
  kSlots
};

// The formulas of an item, unpacked from the integer that python/steepest/ops/program.py packs.
struct Program {
  enum Power : uint8_t { kNone, kQuarter, kHalf, kSixth };
  enum Kind : uint8_t { kGiven, kIdentity, kSign };  // who computes the direction: another op, or the element itself
  enum Rounding : uint8_t { kNearest, kStochastic, kMantissa };

  bool heavy_ball, nesterov, momentum_correction;
  Power power;
  bool sum, second_correction, eps_inside;
  Kind direction;
  bool cautious;
  Rounding rounding;
  bool maximize;
  bool start_first;        // averages begin with the first gradient
  bool decay_after;        // of what the update leaves
  bool decay_scaled;       // by the item's ratio
  bool frozen_moments;     // momentum and second moment are read as they are stored, and not written
  bool decay_independent;  // of the learning rate
  bool interpolated;       // Nesterov's momentum reads with beta2 / beta1, and no power divides it

  static constexpr int kBits = 20;

  explicit Program(int64_t bits) {
    const auto take = [&bits](int width) {
      const int64_t value = bits & ((1 << width) - 1);
      bits >>= width;
      return value;
    };
    heavy_ball = take(1), nesterov = take(1), momentum_correction = take(1);
    power = static_cast<Power>(take(2));
    sum = take(1), second_correction = take(1), eps_inside = take(1);
    direction = static_cast<Kind>(take(2));
    cautious = take(1);
    rounding = static_cast<Rounding>(take(2));
    maximize = take(1);
    start_first = take(1), decay_after = take(1), decay_scaled = take(1), frozen_moments = take(1);
    decay_independent = take(1), interpolated = take(1);
  }
  Program() : Program(0) {}
};

// Columns of a parameter's row. STEP is t, counted from 1; G_* describe the gradient that is minimised, unscaled.
enum Column : int {
  kFinite,     // 1 where the step is taken, else 0; this and the next two are what is measured
  kGradSq,     // sum of squares
  kGradMax,    // largest magnitude
  kStep,       // t after this gradient
  kGradScale,  // multiplies the stored gradient: sign of ascent over the gradient scale
  kBeta1,      // of the averages: 0, as is beta2, where they begin with this gradient
  kOneMinusBeta1,
  kBeta2,
  kOneMinusBeta2,
  kReadBeta1,  // of what Nesterov's momentum reads
  kOneMinusReadBeta1,
  kEps,
  kInverseCorrection1,  // 1 / (1 - beta1^t), or 1
  kInverseCorrection2,  // 1 / (1 - beta2^t)^(2 power), or 1
  kDecay,               // lr weight_decay, before any ratio, or weight_decay
  kLr,
  kInputScale,    // power of two that brings the direction's input into the range of fp16
  kLargestTaken,  // the caller's: a gradient with a larger magnitude is no step; 0: any that is finite is one
  kColumns
};

// Columns of a matrix' line of sums. The first five are `update_moments`'s, the last two `apply_update`'s.
enum Sum : int {
  kInputSq,      // sum of squares of the direction's input, before the power of two; 0 where the input is the direction
  kInputMax,     // its largest magnitude
  kGradDot,      // <g, m>, m the new momentum
  kMomentumSq,   // sum of squares of the new momentum
  kMomentumMax,  // its largest magnitude: bounds the next input
  kUpdateSq,     // sum of squares of the update, step length included and weight decay not
  kParamSq,      // sum of squares of the new parameter
  kSums
};

struct Item {
  void* at[kSlots];  // nullptr: the item has no such tensor
  Dtype dtype[kSlots];
  int64_t matrices;
  int64_t size;       // elements of a matrix
  int32_t row;        // of the table of numbers
  int64_t first_sum;  // line of its first matrix in the table of sums
  Program program;
  double ratio;           // on the learning rate, for the shape
  uint32_t place[3];      // group, parameter, piece: tells its random bits from another's
  const double* lengths;  // nullptr, or one factor on the step for each matrix
  const void* factors;    // nullptr, or one on the direction for each row: f32, or on the host f64
  Dtype factor_dtype;
  int64_t columns;  // elements of such a row
  bool flat;        // see layout.h; otherwise `walk` says where the elements are
  Walk walk;
};

// A number of a group: `at` (fp32 or fp64, on the device) where it is not null, else `value`.
struct HyperValue {
  const void* at;
  double value;
  Dtype dtype;
};
enum Hyper : int { kHyperLr, kHyperWeightDecay, kHyperBeta1, kHyperBeta2, kHyperEps, kHypers };

// What a parameter's row is made of beside its gradient.
struct Owner {
  float* step;  // t, counted up where the gradient is finite; nullptr where nobody counts
  Program program;
  HyperValue hyper[kHypers];
  int64_t first_sum, end_sum;  // lines of its matrices in the table of sums
};

struct Gradient {
  const void* at;
  Dtype dtype;
  int64_t size;
  Owner owner;
  bool flat;
  Walk walk;
};

// torch.amp.GradScaler's word, on the device.
struct Scaling {
  const float* found_inf;   // nullptr, or not 0 where no step is to be taken
  const float* grad_scale;  // nullptr, or what the gradients were multiplied by
};

// Of scratch, a counter belongs to a row or a line of sums, and a chunk's partials are kSums.
struct GradStatsParams {
  std::vector<Gradient> gradients;  // the i-th belongs to row i
  Scaling scaling;
  double* rows;  // (gradients, kColumns)
  const double* sums;
  int64_t* skipped;  // counts steps not taken
  Scratch scratch;
  bool decide;  // whether the whole row is filled, and steps are counted; else what is measured alone
};

// The rest of the rows, from what was measured.
struct DecideStepsParams {
  std::vector<Owner> owners;  // the i-th belongs to row i
  const float* grad_scale;    // as in Scaling
  double* rows;
  const double* sums;
  int64_t* skipped;
};

struct ItemsParams {
  std::vector<Item> items;
  const double* rows;
  double* sums;
  Scratch scratch;
};

// Elements of a chunk, the work of one block; a multiple of the 8 elements a thread takes at once.
constexpr int64_t kChunk = 16384;

enum class Stage { update_moments, apply_update };

// Whether a stage knows this sum: `update_moments` those of its input, `apply_update` those of the new parameter, and
// `update_moments` both where it takes the whole step.
STEEPEST_HD constexpr bool writes_sum(bool is_update, bool whole, int column) {
  const bool of_update = column >= kUpdateSq;
  return is_update ? of_update : whole || !of_update;
}

// `stream` is a cudaStream_t on the current device. Throw when a launch fails. On the host: in parallel over chunks.
void grad_stats_on_device(const GradStatsParams& params, void* stream);
void decide_steps_on_device(const DecideStepsParams& params, void* stream);
void run_on_device(Stage stage, const ItemsParams& params, void* stream);
void grad_stats_on_host(const GradStatsParams& params);
void decide_steps_on_host(const DecideStepsParams& params);
void run_on_host(Stage stage, const ItemsParams& params);

}  // namespace steepest::multi_tensor
