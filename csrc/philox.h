// Philox 4x32-10, and the random words, integers and subsets that everything else draws from it.
//
// Philox turns (counter, key) into 128 random bits with no state, so each draw below is a function
// of (seed, purpose, stream, sample key, index) alone. Two draws that differ in any of these read
// different counters, and Philox is a bijection of the counter: no word is ever used twice.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#endif

namespace avmae {

using Block = std::array<uint32_t, 4>;

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

inline Block philox(Block c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{kMultiplier0} * c[0], p1 = uint64_t{kMultiplier1} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return c;
}

// The blocks of `c` and of the counter after it (in the first word) as eight words. Most words are
// drawn this way: SSE2, which every x86-64 has, makes two blocks in the time of one.
inline void philox_pair(const Block& c, uint32_t k0, uint32_t k1, uint32_t* words) {
#if defined(__SSE2__) || defined(_M_X64)
  const auto both = [](uint32_t value) { return _mm_set1_epi32(static_cast<int>(value)); };
  const __m128i m0 = both(kMultiplier0), m1 = both(kMultiplier1), low = _mm_set1_epi64x(0xFFFFFFFF);
  // One counter in each 64-bit half. Only the lower 32 bits of a half count: _mm_mul_epu32 reads
  // no others, so what a product leaves above them does no harm.
  __m128i c0 = _mm_set_epi64x(static_cast<int64_t>(c[0] + 1u), static_cast<int64_t>(c[0]));
  __m128i c1 = both(c[1]), c2 = both(c[2]), c3 = both(c[3]);
  for (int round = 0; round < 10; ++round) {
    const __m128i p0 = _mm_mul_epu32(c0, m0), p1 = _mm_mul_epu32(c2, m1);
    c0 = _mm_xor_si128(_mm_xor_si128(_mm_srli_epi64(p1, 32), c1), both(k0));
    c2 = _mm_xor_si128(_mm_xor_si128(_mm_srli_epi64(p0, 32), c3), both(k1));
    c1 = p1;
    c3 = p0;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  const __m128i c01 = _mm_or_si128(_mm_and_si128(c0, low), _mm_slli_epi64(c1, 32));
  const __m128i c23 = _mm_or_si128(_mm_and_si128(c2, low), _mm_slli_epi64(c3, 32));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm_unpacklo_epi64(c01, c23));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words + 4), _mm_unpackhi_epi64(c01, c23));
#else
  const Block first = philox(c, k0, k1), second = philox({c[0] + 1u, c[1], c[2], c[3]}, k0, k1);
  std::memcpy(words, first.data(), sizeof first);
  std::memcpy(words + 4, second.data(), sizeof second);
#endif
}

// What the words are for. The numbers are part of every result: never renumber them.
enum class Purpose : uint32_t {
  kMask = 0,
  kMaskColumns = 1,
  kBoxes = 2,
  kBoxRemainder = 3,
  kUniform = 4,
  kIntegers = 5,
  kPermutation = 6,
};

// The random words of one (seed, purpose, stream, sample key). Counter layout, low word first:
//   [block index | stream (16 bits), purpose (8), attempt (8) | key, low half | key, high half]
class Draws {
 public:
  Draws(uint64_t seed, Purpose purpose, uint32_t stream, int64_t key)
      : k0_(static_cast<uint32_t>(seed)),
        k1_(static_cast<uint32_t>(seed >> 32)),
        id_(stream | static_cast<uint32_t>(purpose) << 16),
        key_lo_(static_cast<uint32_t>(key)),
        key_hi_(static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32)) {}

  Block block(uint32_t index, uint32_t attempt = 0) const {
    return philox({index, id_ | attempt << 24, key_lo_, key_hi_}, k0_, k1_);
  }

  // The eight words of blocks index and index + 1; the second must exist.
  void pair(uint32_t index, uint32_t* words) const {
    philox_pair({index, id_, key_lo_, key_hi_}, k0_, k1_, words);
  }

  // Draw `index` as an integer in [0, range), 1 <= range <= 2**32, without bias: `word`, the
  // draw's own word, is scaled to the range, and a word that would favour some values is replaced
  // by the word of the next attempt (Lemire, "Fast random integer generation in an interval",
  // 2019). Fewer than half of all words are ever refused, so 256 attempts do not run out.
  uint32_t bounded(uint32_t word, uint32_t index, uint64_t range) const {
    uint64_t scaled = word * range;
    if (static_cast<uint32_t>(scaled) < range) {
      const uint32_t biased_below = static_cast<uint32_t>((uint64_t{1} << 32) % range);
      for (uint32_t attempt = 1; static_cast<uint32_t>(scaled) < biased_below; ++attempt)
        scaled = block(index / 4, attempt)[index % 4] * range;
    }
    return static_cast<uint32_t>(scaled >> 32);
  }

 private:
  uint32_t k0_, k1_, id_, key_lo_, key_hi_;
};

// Mark a uniformly random subset of exactly `count` of `n` sites: marks[i] becomes 1 in it, else 0.
//
// Floyd's method (Bentley and Floyd, CACM 1987): as many draws as there are sites to choose, no
// sorting and no table. The smaller of the subset and its complement is what is drawn.
inline void choose(const Draws& draws, int64_t n, int64_t count, uint8_t* marks) {
  const bool complement = 2 * count > n;
  const int64_t drawn = complement ? n - count : count;
  const uint8_t mark = complement ? 0 : 1;
  std::memset(marks, 1 - mark, static_cast<size_t>(n));

  uint32_t words[8];
  for (int64_t first = 0; first < drawn; first += 8) {
    draws.pair(static_cast<uint32_t>(first / 4), words);
    const int64_t end = first + 8 < drawn ? first + 8 : drawn;
    for (int64_t i = first; i < end; ++i) {
      const int64_t last = n - drawn + i;
      const int64_t pick = draws.bounded(words[i - first], static_cast<uint32_t>(i),
                                         static_cast<uint64_t>(last + 1));
      // A site drawn before gives way to `last`, which no earlier draw could reach. Arithmetic and
      // no branch: whether it was drawn before is a coin that no processor can predict.
      const int64_t taken = marks[pick] == mark;
      marks[pick + taken * (last - pick)] = mark;
    }
  }
}

}  // namespace avmae
