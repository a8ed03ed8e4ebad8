// A kernel as the parser leaves it: decoded instructions, symbols, sizes.
#pragma once
#include <memory>

#include "types.h"

namespace ptxsim {
struct Operand {
  enum Kind : u8 { Nil, Reg, Imm, Special, Vec, Mem, Sym, Sink } kind = Nil;
  bool neg = false;  // a predicate's
  int reg = -1, sym = -1;
  u64 imm = 0;
  int special = 0;
  s64 offset = 0;
  vector<Operand> parts;  // of a vector, or the coordinates of a tensor
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32);

enum Flow : u8 { kPlain, kBranch, kBrx, kExit, kTrap };

struct Instruction {
  Handler run = nullptr;
  Flow flow = kPlain;
  bool whole = false;   // all lanes of the warp (or of its mask operand) take part
  bool ftz = false;     // subnormal numbers are zero
  bool yields = false;  // another warp may go on after it
  Type t = NONE, t2 = NONE;
  int pred = -1;
  bool pred_neg = false;
  vector<Operand> ops;
  vector<string> mods;
  int a = 0, b = 0, c = 0;  // what the handler decoded
  int target = -1;
  vector<int> targets;
  string text;
  int line = 0, scope = 0;
};

enum Space : u8 { kShared, kGlobal, kLocal, kParam, kCall };
struct Symbol {
  string name;
  Space space;
  size_t offset = 0, size = 0, align = 1;
  bool dynamic = false;
  vector<u8> init;
  int reg = -1;  // of a call's parameter
};

struct Kernel {
  string name;
  vector<Instruction> code;
  vector<Symbol> symbols;
  vector<size_t> param_sizes, param_offsets;
  size_t param_bytes = 0, shared_bytes = 0, dynamic_align = 16, local_bytes = 0;
  int registers = 0;
  int cluster = 0;
  int most_threads = 1024;
  size_t allowed_dynamic = 48 << 10;
};

struct Module {
  std::map<string, std::unique_ptr<Kernel>> kernels;
};

// Reads a module of PTX; throws what it does not understand.
Module read_module(const string& text);
}  // namespace ptxsim
