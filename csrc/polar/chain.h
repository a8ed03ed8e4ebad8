// A chain of products (steepest/linalg/chain.py) on stacks of matrices; no torch in here.
//
// Every stack has its own shape, and all go through the chain together: a node of it is one list of products, whatever
// the shapes. Matrices are contiguous rows, fp16 or bf16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "polar/params.h"
#include "symm_gemm/params.h"

namespace steepest::polar {

enum class Kind : int8_t {
  gram,     // out = A A^T, or A^T A of a tall A
  product,  // out = alpha A B + beta C, symmetric
  sum,      // out = alpha A + beta C + gamma I
  apply,    // out = alpha A B + beta B of A square, or alpha B A + beta B of a tall B
};
enum Buffer : int8_t { kX, kY, kGram, kZ, kT, kQ, kP, kBuffers };  // X and Y have the matrix' shape

// The value where column < 0, else every matrix' own number.
struct Number {
  int32_t column;
  float value;
};

struct Node {
  Kind kind;
  int8_t out, a, b, c;
  Number alpha, beta;
  float gamma;
};

// Nodes as they are handed over: of each its kind, out, a, b, c and the columns of alpha and beta or -1; and alpha,
// beta and gamma. columns: how many of numbers there are. Throws for what is no node.
constexpr size_t kNodeInts = 7, kNodeFloats = 3;
std::vector<Node> nodes_of(const int64_t* ints, const double* floats, size_t count, int64_t columns);

// Numbers as they are handed over: constants table by table, and the least slack of every table but the last. Throws
// for more than there is room for, or what is no power.
Numbering numbering_of(const std::vector<double>& constants, const std::vector<int64_t>& powers,
                       const std::vector<double>& least, bool tight, double eps);

struct Stack {
  int64_t matrices, rows, columns;
  void* at[kBuffers];
  float* numbers;  // (matrices, number_columns)
  int64_t number_columns;
  float* slack;              // (matrices,)
  Scratch scratch;           // of the numbers
  symm_gemm::Update update;  // with weights, the last node writes nothing but them
  symm_gemm::Scalar update_beta;

  int64_t side() const { return rows < columns ? rows : columns; }
  bool tall() const { return rows > columns; }
};

// What a node that multiplies asks for, a product for every stack.
std::vector<symm_gemm::Problem> products_of(const Node& node, const std::vector<Stack>& stacks);

// W[i] <- beta[i] W[i] + eta[i] (what the last node makes of X[i]), in place of a product that is stored.
std::vector<symm_gemm::Problem> updates_of(const Node& last, const std::vector<Stack>& stacks);

// The first Gram product, which the numbers follow from.
std::vector<symm_gemm::Problem> first_gram(const std::vector<Stack>& stacks);

// What the numbers of a stack's matrices follow from.
NumbersParams numbers_params(const Stack& stack, Dtype dtype, const Numbering& numbering);

// A node that does not.
void sum_on_host(const Node& node, const Stack& stack, Dtype dtype);
void sum_on_device(const Node& node, const Stack& stack, Dtype dtype, void* stream);

// The reference: one matrix and one entry after another, summed in fp32 along k, rounded once.
void products_on_host(const std::vector<symm_gemm::Problem>& problems, Dtype dtype);

}  // namespace steepest::polar
