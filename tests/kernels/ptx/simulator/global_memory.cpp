#include "global_memory.h"

#include <algorithm>

#include "machine.h"

namespace ptxsim {
Ranges& ranges() {
  static Ranges r;
  return r;
}

void Ranges::add(u64 address, size_t bytes, const string& name, bool writable) {
  ranges_.push_back({address, address + bytes, name, writable});
  merged_ = false;
}
void Ranges::remove(u64 address) {
  const auto it = std::find_if(ranges_.begin(), ranges_.end(), [&](const Range& r) { return r.begin == address; });
  if (it == ranges_.end()) return;
  ranges_.erase(it);
  merged_ = false;
}
void Ranges::clear() {
  ranges_.clear();
  merged_ = false;
}

void Ranges::merge() const {
  auto united = [&](bool only_writable) {
    Intervals all, out;
    for (const Range& r : ranges_)
      if (r.begin < r.end && (r.writable || !only_writable)) all.push_back({r.begin, r.end});
    std::sort(all.begin(), all.end());
    for (const auto& [begin, end] : all)
      if (!out.empty() && begin <= out.back().second)
        out.back().second = std::max(out.back().second, end);
      else
        out.push_back({begin, end});
    return out;
  };
  readable_ = united(false), writable_ = united(true);
}

bool Ranges::allows(u64 address, size_t bytes, bool write) const {
  if (!merged_) merge(), merged_ = true, latest_[0] = latest_[1] = {};
  std::pair<u64, u64>& latest = latest_[write];
  if (address >= latest.first && latest.second >= address + bytes) return true;
  const Intervals& in = write ? writable_ : readable_;
  const auto it = std::upper_bound(in.begin(), in.end(), std::pair<u64, u64>{address, ~0ull});
  if (it == in.begin()) return false;
  latest = it[-1];
  return latest.second >= address + bytes;
}

string Ranges::nearest(u64 address, size_t bytes) const {
  const Range* best = nullptr;
  u64 least = ~0ull;
  for (const Range& r : ranges_) {
    const u64 distance = address < r.begin ? r.begin - address : address + bytes > r.end ? address + bytes - r.end : 0;
    if (distance < least) least = distance, best = &r;
  }
  if (!best) return "no memory is registered";
  const string name = "'" + best->name + "' of " + std::to_string(best->end - best->begin) + " bytes" +
                      (best->writable ? "" : ", read only");
  if (least == 0) return "inside " + name;
  return std::to_string(least) + " bytes " + (address < best->begin ? "before " : "beyond the end of ") + name;
}

StoreBuffer::Line* StoreBuffer::find(u64 line) {
  if (lines_.empty()) return nullptr;
  if (lines_.back().address == line) return &lines_.back();
  const auto it = index_.find(line);
  return it == index_.end() ? nullptr : &lines_[it->second];
}
StoreBuffer::Line& StoreBuffer::insert(u64 line) {
  if (Line* l = find(line)) return *l;
  index_[line] = u32(lines_.size());
  lines_.push_back({line, 0, {}});
  return lines_.back();
}
StoreBuffer::Line StoreBuffer::take(size_t i) {
  const Line line = lines_[i];
  index_.erase(line.address);
  if (i + 1 < lines_.size()) {
    lines_[i] = lines_.back();
    index_[lines_[i].address] = u32(i);
  }
  lines_.pop_back();
  return line;
}
vector<StoreBuffer::Line> StoreBuffer::take_all() {
  vector<Line> all = std::move(lines_);
  lines_.clear();
  index_.clear();
  return all;
}

namespace {
u64 line_of(const void* p) { return reinterpret_cast<u64>(p) / kLine * kLine; }
}  // namespace

// What a line was before goes to its history.
void GlobalMemory::write(const Block* writer, u64 address, const u8* data, u32 mask) {
  u8* memory = reinterpret_cast<u8*>(address);
  if (late) {
    s64& newest = newest_.try_emplace(address, -1).first->second;
    Version v{++time_, writer, newest, {}};
    memcpy(v.data, memory, kLine);
    newest = s64(versions_.size());
    versions_.push_back(v);
  }
  if (mask == ~0u)
    memcpy(memory, data, kLine);
  else
    for (u32 m = mask; m; m &= m - 1) memory[__builtin_ctz(m)] = data[__builtin_ctz(m)];
}

void GlobalMemory::load(Block& block, const u8* from, u8* to, size_t bytes, u8 order, u64 random) {
  memcpy(to, from, bytes);
  if (!late) return;
  const u64 line = line_of(from);
  const size_t offset = reinterpret_cast<u64>(from) - line;
  if ((order & ~kNonCoherent) == kWeak && !versions_.empty()) {
    const auto it = newest_.find(line);
    for (s64 i = it == newest_.end() ? -1 : it->second; i >= 0; i = versions_[size_t(i)].older) {
      const Version& v = versions_[size_t(i)];
      if ((v.until <= block.acquired && !(order & kNonCoherent)) || v.writer == &block || (random & 1) == 0) break;
      memcpy(to, v.data + offset, bytes);
      random >>= 1;
    }
  }
  if (const StoreBuffer::Line* buffered = block.stores.find(line))
    for (size_t i = 0; i < bytes; ++i)
      if (buffered->mask >> (offset + i) & 1) to[i] = buffered->data[offset + i];
}

void GlobalMemory::store(Block& block, u8* to, const u8* from, size_t bytes, u8 order) {
  if (!late) {
    memcpy(to, from, bytes);
    return;
  }
  if (order & (kStrong | kAcquire | kRelease)) return write_through(&block, to, from, bytes);
  const u64 line = line_of(to);
  StoreBuffer::Line& l = block.stores.insert(line);
  const size_t offset = reinterpret_cast<u64>(to) - line;
  memcpy(l.data + offset, from, bytes);
  l.mask |= u32(low_bits(int(bytes))) << offset;
}

void GlobalMemory::drain_line_of(Block& block, u64 address) {
  if (!late) return;
  StoreBuffer::Line* l = block.stores.find(address / kLine * kLine);
  if (!l || !l->mask) return;
  write(&block, l->address, l->data, l->mask);
  l->mask = 0;
}

void GlobalMemory::write_through(Block* block, u8* to, const u8* from, size_t bytes) {
  if (!late) {
    memcpy(to, from, bytes);
    return;
  }
  for (size_t done = 0; done < bytes;) {
    const u64 at = reinterpret_cast<u64>(to) + done, line = at / kLine * kLine;
    const size_t n = std::min<size_t>(bytes - done, line + kLine - at);
    if (block) drain_line_of(*block, line);
    u8 data[kLine];
    memcpy(data + (at - line), from + done, n);
    write(block, line, data, u32(low_bits(int(n))) << (at - line));
    done += n;
  }
}

void GlobalMemory::release(Block& block) {
  if (block.stores.empty()) return;
  for (const StoreBuffer::Line& l : block.stores.take_all()) write(&block, l.address, l.data, l.mask);
}
void GlobalMemory::acquire(Block& block) const { block.acquired = time_; }

void GlobalMemory::drain_some(Block& block, u64 random) {
  if (block.stores.empty()) return;
  const StoreBuffer::Line l = block.stores.take(random % block.stores.size());
  write(&block, l.address, l.data, l.mask);
}

void GlobalMemory::leave(Block& block) {
  for (const StoreBuffer::Line& l : block.stores.take_all()) left_.push_back(l);
}
void GlobalMemory::drain_left(u64 random) {
  if (left_.empty()) return;
  std::swap(left_[random % left_.size()], left_.back());
  const StoreBuffer::Line l = left_.back();
  left_.pop_back();
  write(nullptr, l.address, l.data, l.mask);
}
void GlobalMemory::drain_all_left() {
  late = false;
  for (const StoreBuffer::Line& l : left_) write(nullptr, l.address, l.data, l.mask);
  left_.clear();
}
}  // namespace ptxsim
