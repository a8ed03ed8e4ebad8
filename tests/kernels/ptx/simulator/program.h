// A kernel as the parser leaves it: decoded instructions, symbols, sizes.
#pragma once
#include <map>
#include <memory>

#include "types.h"

namespace ptxsim {
// Immediates, special registers and addresses of symbols are registers too, filled when a warp starts (Constant).
struct Operand {
  enum Kind : u8 { None, Register, Vector, Memory } kind = None;
  bool negated = false;  // of a predicate
  int reg = -1;          // of a memory operand: its base
  int symbol = -1;       // a memory operand's base, if it is one
  s64 offset = 0;
  vector<Operand> parts;  // of a vector; the coordinates in a tensor
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp& w, const Instruction& in, u32 mask);

enum Flow : u8 { kPlain, kBranch, kBranchTable, kExit, kTrap };

// What an instruction asks of memory beside the access itself: the order it makes for the block, and where it reads.
enum Order : u8 { kWeak = 0, kStrong = 1, kAcquire = 2, kRelease = 4, kNonCoherent = 8 };

struct Instruction {
  Handler run = nullptr;
  Flow flow = kPlain;
  bool whole = false;        // all lanes of the warp, or of its mask, take part
  bool masked = false;       // the last operand is that mask
  bool polls = false;        // a load that others may be waited for with
  bool ftz = false;          // subnormal numbers are zero
  bool saturates = false;    // results lie in [0, 1]
  bool two_results = false;  // d|p
  bool negated = false;      // the guard predicate
  u8 order = kWeak;
  u8 rounding = 0;  // of floats: 0 nearest, 1 zero, 2 minus infinity, 3 plus infinity
  Type t = NONE, t2 = NONE;
  int a = 0, b = 0, c = 0;  // what the modifiers say, see the handlers
  int pred = -1;
  int target = -1;  // of a branch
  vector<Operand> ops;
  vector<int> targets;  // of a branch through a table
  // For messages, and while it is read.
  vector<string> mods;
  string text;
  int line = 0, loc_file = -1, loc_line = 0, scope = 0;
};

enum Space : u8 { kGeneric, kShared, kGlobal, kLocal, kParam, kConst, kSharedCluster, kCall };

struct Symbol {
  string name;
  Space space = kShared;
  size_t offset = 0, size = 0, align = 1;
  bool dynamic = false;
  std::shared_ptr<u8> memory;  // of a global or constant variable
  int reg = -1;                // of a call's parameter
};

// A register whose value is known when a warp starts.
struct Constant {
  enum Kind : u8 { Value, Special, Address } kind;
  int id = 0;     // of a special register, or of a symbol
  u64 value = 0;  // or what is added to a symbol's address
  int reg = -1;
};

struct Kernel {
  string name;
  vector<Instruction> code;
  vector<Symbol> symbols;
  vector<Constant> constants;
  std::map<int, string> files;  // of .loc
  vector<size_t> param_sizes, param_offsets;
  size_t param_bytes = 0, shared_bytes = 0, dynamic_align = 16, local_bytes = 0;
  int registers = 0;
  int cluster = 0;
  int most_threads = 1024, threads = 0;  // .maxntid, .reqntid
  int most_registers = 0;                // of a lane, where these bounds let a kernel change it
  bool reads_asynchronously = false;     // shared memory, by wgmma or bulk copies
  size_t allowed_dynamic = 48 << 10;
};

// A module of PTX; a kernel is read when it is first asked for.
class Module {
 public:
  explicit Module(const string& ptx);
  ~Module();
  // The kernel, nullptr where there is none; throws what it does not understand.
  Kernel* find(const string& name);
  vector<string> names() const;

 private:
  struct Text;
  std::unique_ptr<Text> text_;
  std::map<string, std::unique_ptr<Kernel>> kernels_;
};
}  // namespace ptxsim
