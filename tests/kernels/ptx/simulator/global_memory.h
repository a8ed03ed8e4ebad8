// Global memory as blocks see it: where it may be accessed, and when a block's stores are there for the others.
//
// A store goes to its block's buffer. Others see it when a fence or a releasing access of the block has drained the
// buffer, or at a random time, at the latest when the kernel ends. A weak load may return what was there at any time
// since the block's last acquire (a line of an L1 cache that nobody invalidated, or a load that was made early: .cg
// orders nothing either); strong ones (.volatile, .relaxed and stronger, atomics) return what is there now.
#pragma once
#include <unordered_map>

#include "types.h"

namespace ptxsim {
// Addresses that kernels may access. Where nothing is registered everything is allowed.
class Ranges {
 public:
  void add(u64 address, size_t bytes, const string& name, bool writable);
  void remove(u64 address);
  void clear();
  bool empty() const { return ranges_.empty(); }
  bool allows(u64 address, size_t bytes, bool write) const;
  // "12 bytes after the end of 'x' (...)", of the nearest range.
  string nearest(u64 address, size_t bytes) const;

 private:
  struct Range {
    u64 begin, end;
    string name;
    bool writable;
  };
  using Intervals = vector<std::pair<u64, u64>>;  // sorted, apart
  void merge() const;
  vector<Range> ranges_;
  mutable bool merged_ = true;
  mutable Intervals readable_, writable_;
  mutable std::pair<u64, u64> latest_[2];  // of each, where an access was looked for last
};
Ranges& ranges();

constexpr u64 kLine = 32;  // bytes, a sector

class StoreBuffer {
 public:
  struct Line {
    u64 address;
    u32 mask;  // a bit a byte
    u8 data[kLine];
  };
  bool empty() const { return lines_.empty(); }
  size_t size() const { return lines_.size(); }
  Line* find(u64 line);
  Line& insert(u64 line);
  Line take(size_t index);
  vector<Line> take_all();

 private:
  vector<Line> lines_;
  std::unordered_map<u64, u32> index_;
};

struct Block;

class GlobalMemory {
 public:
  // Whether blocks can see each other's stores late at all.
  bool late = false;

  void load(Block& block, const u8* from, u8* to, size_t bytes, u8 order, u64 random);
  void store(Block& block, u8* to, const u8* from, size_t bytes, u8 order);
  // To memory at once, behind what the block has stored there: atomics and copies of the async proxy.
  void write_through(Block* block, u8* to, const u8* from, size_t bytes);
  void drain_line_of(Block& block, u64 address);  // before an atomic reads there
  void release(Block& block);
  void acquire(Block& block) const;
  void drain_some(Block& block, u64 random);
  // A block's stores outlive it.
  void leave(Block& block);
  void drain_left(u64 random);
  void drain_all_left();

 private:
  struct Version {  // what was at a line until a time
    u64 until;
    const Block* writer;  // who overwrote it
    s64 older;
    u8 data[kLine];
  };
  void write(const Block* writer, u64 address, const u8* data, u32 mask);
  u64 time_ = 0;
  vector<Version> versions_;
  std::unordered_map<u64, s64> newest_;
  vector<StoreBuffer::Line> left_;
};
}  // namespace ptxsim
