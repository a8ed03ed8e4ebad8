#include "polar/chain.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/floats.h"
#include "symm_gemm/formulas.cuh"

namespace steepest::polar {
namespace {

using symm_gemm::Majors;
using symm_gemm::Problem;
using symm_gemm::Scalar;
using symm_gemm::Shape;
using symm_gemm::Strides;

Scalar scalar(const Number& number, const Stack& stack) {
  if (number.column < 0) return {nullptr, 0, number.value};
  return {stack.numbers + number.column, stack.number_columns, 0};
}

// The entry of row i and column j of a factor whose memory runs along the one or the other.
int64_t place(const Strides& strides, bool along_columns, int64_t i, int64_t j) {
  return along_columns ? i * strides.row + j : j * strides.row + i;
}

float load(const void* at, Dtype dtype, int64_t index) {
  const uint16_t bits = static_cast<const uint16_t*>(at)[index];
  return dtype == Dtype::bf16 ? from_bf16(bits) : from_f16(bits);
}

void store(void* at, Dtype dtype, int64_t index, float value) {
  static_cast<uint16_t*>(at)[index] = dtype == Dtype::bf16 ? to_bf16(value) : to_f16(value);
}

float load_weight(const void* at, Dtype dtype, int64_t index) {
  return dtype == Dtype::f32 ? static_cast<const float*>(at)[index] : load(at, dtype, index);
}

void store_weight(void* at, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::f32)
    static_cast<float*>(at)[index] = value;
  else
    store(at, dtype, index, value);
}

float value_of(const Scalar& scalar, int64_t matrix) {
  return scalar.at != nullptr ? scalar.at[matrix * scalar.stride] : scalar.value;
}

void product_on_host(const Problem& problem, Dtype dtype, int64_t matrix) {
  const Shape& shape = problem.shape;
  const float alpha = value_of(problem.alpha, matrix), beta = value_of(problem.beta, matrix);
  const float gamma = value_of(problem.gamma, matrix);
  const symm_gemm::Update& update = problem.update;
  const float step = update.weights != nullptr ? symm_gemm::factor(alpha, value_of(update.eta, matrix)) : alpha;
  const bool a_along_k = shape.majors != Majors::mnmn, b_along_k = shape.majors == Majors::kk;
  const int64_t a = matrix * shape.a.matrix, b = matrix * shape.b.matrix, d = matrix * shape.d.matrix;
  for (int64_t i = 0; i < shape.m; ++i) {
    for (int64_t j = 0; j < (shape.symmetric ? i + 1 : shape.n); ++j) {
      float sum = 0;
      for (int64_t k = 0; k < shape.k; ++k)
        sum += load(problem.a, dtype, a + place(shape.a, a_along_k, i, k)) *
               load(problem.b, dtype, b + place(shape.b, !b_along_k, k, j));
      if (update.weights != nullptr) {
        void* const w = update.weights[matrix];
        const int64_t at = i * shape.d.row + j;
        store_weight(w, update.dtype, at, symm_gemm::moved(beta, load_weight(w, update.dtype, at), step, sum));
        continue;
      }
      float value = alpha * sum + (i == j ? gamma : 0.0f);
      if (problem.c != nullptr && beta != 0)
        value += beta * load(problem.c, dtype, matrix * shape.c.matrix + i * shape.c.row + j);
      store(problem.d, dtype, d + i * shape.d.row + j, value);
    }
  }
  for (int64_t i = 0; shape.symmetric && i < shape.m; ++i)
    for (int64_t j = 0; j < i; ++j)
      store(problem.d, dtype, d + j * shape.d.row + i, load(problem.d, dtype, d + i * shape.d.row + j));
}

void check_node(bool right, size_t i, const char* what, int64_t number) {
  if (!right) throw std::invalid_argument("node " + std::to_string(i) + what + std::to_string(number));
}

}  // namespace

std::vector<Node> nodes_of(const int64_t* ints, const double* floats, size_t count, int64_t columns) {
  std::vector<Node> nodes;
  for (size_t i = 0; i < count; ++i, ints += kNodeInts, floats += kNodeFloats) {
    const auto buffer = [&](int k) {
      check_node(ints[k] >= 0 && ints[k] < kBuffers, i, " names buffer ", ints[k]);
      return static_cast<int8_t>(ints[k]);
    };
    const auto number = [&](int64_t column, double plain) {
      check_node(column >= -1 && column < columns, i, " names a column that there is not: ", column);
      return Number{static_cast<int32_t>(column), static_cast<float>(plain)};
    };
    check_node(ints[0] >= 0 && ints[0] <= static_cast<int64_t>(Kind::apply), i, " is of kind ", ints[0]);
    nodes.push_back({static_cast<Kind>(ints[0]), buffer(1), buffer(2), buffer(3), buffer(4), number(ints[5], floats[0]),
                     number(ints[6], floats[1]), static_cast<float>(floats[2])});
    const Node& node = nodes.back();
    check_node(node.kind == Kind::sum || (node.out != node.a && node.out != node.b), i,
               " multiplies what it writes, buffer ", node.out);
  }
  return nodes;
}

Numbering numbering_of(const std::vector<double>& constants, const std::vector<int64_t>& powers,
                       const std::vector<double>& least, bool tight, double eps) {
  const size_t tables = least.size() + 1, columns = powers.size();
  if (tables > kMostTables || constants.size() != tables * columns || constants.size() > kMostNumbers)
    throw std::runtime_error("constants has " + std::to_string(constants.size()) + " elements; wanted are " +
                             std::to_string(tables) + " tables of " + std::to_string(columns) + ", at most " +
                             std::to_string(kMostTables) + " tables and " + std::to_string(kMostNumbers) + " elements");
  for (const int64_t power : powers)
    if (power < 0 || power >= 1 << 15) throw std::runtime_error("powers has " + std::to_string(power));
  Numbering numbering{};
  numbering.tables = static_cast<int32_t>(tables), numbering.columns = static_cast<int32_t>(columns);
  numbering.tight = tight, numbering.eps = eps;
  std::copy(least.begin(), least.end(), numbering.least);
  std::copy(constants.begin(), constants.end(), numbering.constants);
  std::copy(powers.begin(), powers.end(), numbering.powers);
  return numbering;
}

std::vector<Problem> products_of(const Node& node, const std::vector<Stack>& stacks) {
  std::vector<Problem> problems;
  for (const Stack& stack : stacks) {
    const int64_t side = stack.side(), size = stack.rows * stack.columns;
    const Strides square{side, side * side}, whole{stack.columns, size};
    Problem problem{};
    Shape& shape = problem.shape;
    shape.batch = stack.matrices;
    shape.symmetric = node.kind != Kind::apply;
    problem.d = stack.at[node.out];
    problem.alpha = scalar(node.alpha, stack), problem.beta = scalar(node.beta, stack);
    problem.c = node.beta.column < 0 && node.beta.value == 0 ? nullptr : stack.at[node.c];
    if (node.kind == Kind::gram) {
      shape.m = shape.n = side, shape.k = size / side;
      shape.majors = stack.tall() ? Majors::mnmn : Majors::kk;
      shape.a = shape.b = whole, shape.c = shape.d = square;
      problem.a = problem.b = stack.at[node.a];
    } else if (node.kind == Kind::product) {
      shape.m = shape.n = shape.k = side;
      shape.majors = Majors::kk;  // B^T = B
      shape.a = shape.b = shape.c = shape.d = square;
      problem.a = stack.at[node.a], problem.b = stack.at[node.b];
    } else {
      shape.m = stack.rows, shape.n = stack.columns, shape.k = side;
      shape.majors = stack.tall() ? Majors::kk : Majors::kmn;
      shape.a = stack.tall() ? whole : square, shape.b = stack.tall() ? square : whole;
      shape.c = shape.d = whole;
      problem.a = stack.at[stack.tall() ? node.b : node.a], problem.b = stack.at[stack.tall() ? node.a : node.b];
    }
    shape.has_c = problem.c != nullptr;
    problems.push_back(problem);
  }
  return problems;
}

NumbersParams numbers_params(const Stack& stack, Dtype dtype, const Numbering& numbering) {
  return {stack.at[kGram], dtype, stack.matrices, stack.side(), numbering, stack.numbers, stack.slack, stack.scratch};
}

std::vector<Problem> updates_of(const Node& last, const std::vector<Stack>& stacks) {
  std::vector<Problem> problems = products_of(last, stacks);
  for (size_t i = 0; i < stacks.size(); ++i) {
    problems[i].update = stacks[i].update, problems[i].beta = stacks[i].update_beta, problems[i].d = nullptr;
  }
  return problems;
}

std::vector<Problem> first_gram(const std::vector<Stack>& stacks) {
  return products_of({Kind::gram, kGram, kX, kX, kX, {-1, 1}, {-1, 0}, 0}, stacks);
}

void products_on_host(const std::vector<Problem>& problems, Dtype dtype) {
  for (const Problem& problem : problems)
    for (int64_t matrix = 0; matrix < problem.shape.batch; ++matrix) product_on_host(problem, dtype, matrix);
}

}  // namespace steepest::polar
