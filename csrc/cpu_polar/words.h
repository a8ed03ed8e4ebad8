// Words of 32 bits from a boundary of 64 bytes on: a vector of 16 that crosses one is read at half the rate.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace steepest::cpu_polar {

constexpr std::align_val_t kWordsAlignment{64};

struct DeleteWords {
  void operator()(uint32_t* words) const { ::operator delete(words, kWordsAlignment); }
};
using Words = std::unique_ptr<uint32_t, DeleteWords>;

inline Words make_words(int64_t count) {
  return Words(static_cast<uint32_t*>(::operator new(count * sizeof(uint32_t), kWordsAlignment)));
}

}  // namespace steepest::cpu_polar
