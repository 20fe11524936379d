// Source: ITU-T T.81 (baseline sequential, annexes B and F), and for the transform Arai, Agui and
// Nakajima, "A fast DCT-SQ scheme for images", 1988.

#include "jpeg.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "wide.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace avmae {
namespace {

constexpr int kZigzag[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                             12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                             35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                             58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

// Bits of a coefficient, T.81 table F.1. Two symbols with theirs fit into the 56 of a refill.
constexpr int kMostBits = 11;

// A block has at most 64 symbols of 16 + 11 bits: so much may be read past the end of a scan before
// that is noticed.
constexpr size_t kSlack = 64 * 27 / 8 + 16;

// Codes of up to this length are found by one look into a table.
constexpr int kLookBits = 10;

// What the next bits of a scan say about a block.
struct Symbol {
  int16_t value;  // of a coefficient
  uint8_t skip;   // coefficients up to it: 1 to 16, or kEnd
  uint8_t bits;   // used up; 0 where `kLookBits` are too few to tell
};

// Leads out of any block, and is told from a run that does so wrongly.
constexpr uint8_t kEnd = 128;

// A Huffman table of a JPEG, T.81 annex C.
struct Codes {
  std::array<Symbol, 1 << kLookBits> look;
  std::array<int32_t, 18> first_too_large;  // by length, as 16-bit prefixes
  std::array<int32_t, 17> offset;           // from code to place in `symbols`
  std::array<uint8_t, 256> symbols;
  bool valid = false;

  void build(const uint8_t* counts, const uint8_t* values);
  Symbol long_symbol(uint32_t next) const;
};

// The `size` bits of a coefficient's value as a number, T.81 table F.1.
inline int32_t extended(int32_t bits, int size) {
  return size && bits < (1 << (size - 1)) ? bits - (1 << size) + 1 : bits;
}

// How far a symbol of a block's later coefficients leads. 16 zeros are one of value 0.
inline uint8_t skip_of(uint8_t symbol) {
  return symbol & 15 || symbol == 0xF0 ? static_cast<uint8_t>((symbol >> 4) + 1) : kEnd;
}

void Codes::build(const uint8_t* counts, const uint8_t* values) {
  valid = false;
  look.fill({0, 0, 0});
  int32_t code = 0, place = 0;
  for (int length = 1; length <= 16; ++length, code <<= 1) {
    offset[static_cast<size_t>(length)] = place - code;
    for (int i = 0; i < counts[length - 1]; ++i, ++code, ++place) {
      if (code >= 1 << length || place >= 256) return;
      const uint8_t symbol = symbols[static_cast<size_t>(place)] = values[place];
      if ((symbol & 15) > kMostBits) return;
      const int size = symbol & 15, spare = kLookBits - length - size;
      for (int32_t rest = 0; spare >= 0 && rest < 1 << (spare + size); ++rest) {
        const int16_t value = static_cast<int16_t>(extended(rest >> spare, size));
        look[static_cast<size_t>(code << (spare + size) | rest)] = {
            value, skip_of(symbol), static_cast<uint8_t>(length + size)};
      }
    }
    first_too_large[static_cast<size_t>(length)] = code << (16 - length);
  }
  first_too_large[17] = 1 << 16;
  valid = true;
}

// Bits of a scan without its stuffing, most significant first.
class Bits {
 public:
  Bits(const uint8_t* data, const uint8_t* end) : next_(data), end_(end) {}

  // At least 56 bits are there after this.
  void refill() {
    uint64_t bytes = 0;
    for (int i = 0; i < 8; ++i) bytes = bytes << 8 | next_[i];
    bits_ |= bytes >> count_;
    next_ += (63 - count_) >> 3;
    count_ |= 56;
  }
  uint32_t peek(int count) const { return static_cast<uint32_t>(bits_ >> (64 - count)); }
  void skip(int count) {
    bits_ <<= count;
    count_ -= count;
  }
  // Whether more was read than there is, and whether all but what fills a byte was.
  bool overrun() const { return next_ - count_ / 8 > end_; }
  bool finished() const { return !overrun() && next_ - count_ / 8 >= end_ - 1; }

 private:
  uint64_t bits_ = 0;
  int count_ = 0;
  const uint8_t *next_, *end_;
};

Symbol Codes::long_symbol(uint32_t next) const {
  const int32_t prefix = static_cast<int32_t>(next >> 16);
  int length = 1;
  while (prefix >= first_too_large[static_cast<size_t>(length)]) ++length;
  if (length > 16) return {1, kEnd, 16};
  const int32_t place = (prefix >> (16 - length)) + offset[static_cast<size_t>(length)];
  const uint8_t symbol = symbols[static_cast<size_t>(place)];
  const int size = symbol & 15;
  // Two shifts, for none of 32.
  const int32_t value = static_cast<int32_t>(next << length >> 1 >> (31 - size));
  return {static_cast<int16_t>(extended(value, size)), skip_of(symbol),
          static_cast<uint8_t>(length + size)};
}

// Uses up to 16 + 11 bits. Where no code has these bits, `kEnd` with a value.
inline Symbol next_symbol(const Codes& codes, Bits* bits) {
  Symbol next = codes.look[bits->peek(kLookBits)];
  if (!next.bits) next = codes.long_symbol(bits->peek(32));
  bits->skip(next.bits);
  return next;
}

// Blocks are transformed so many at a time, one in each lane.
constexpr int kLanes = 16;
constexpr int kUnits = 8;  // 16 x 16 pixels each: 32 blocks of luma, 16 of chroma
constexpr int kGroups = 3;

struct Group {
  int16_t coefficients[65][kLanes];  // the last ones are what leads out of a block
};

// Bits after the point of the numbers that are transformed. 16 bits hold any picture; what no
// encoder writes wraps round.
constexpr int kFraction = 4;
constexpr double kPi = 3.14159265358979323846;

// a times a constant: a whole number, and a fraction in 2**-16.
template <int kWhole>
inline int16_t times(int16_t a, double fraction) {
  const int16_t scale = static_cast<int16_t>(fraction * 65536 + (fraction < 0 ? -0.5 : 0.5));
  const int16_t part = static_cast<int16_t>((int32_t{a} * scale) >> 16);
  return static_cast<int16_t>(a * kWhole + part);
}

// One pass over 8 numbers, kStep rows of lanes apart. What the algorithm would scale its inputs by
// is in the quantisation tables.
template <int kStep>
inline void transform(int16_t (*x)[kLanes], int lane) {
  const auto at = [=](int k) -> int16_t& { return x[k * kStep][lane]; };
  const auto sum = [](int16_t a, int16_t b) { return static_cast<int16_t>(a + b); };
  const auto less = [](int16_t a, int16_t b) { return static_cast<int16_t>(a - b); };
  const int16_t sum04 = sum(at(0), at(4)), less04 = less(at(0), at(4));
  const int16_t sum26 = sum(at(2), at(6));
  const int16_t turned26 = less(times<1>(less(at(2), at(6)), 0.414213562), sum26);
  const int16_t even0 = sum(sum04, sum26), even3 = less(sum04, sum26);
  const int16_t even1 = sum(less04, turned26), even2 = less(less04, turned26);

  const int16_t sum53 = sum(at(5), at(3)), less53 = less(at(5), at(3));
  const int16_t sum17 = sum(at(1), at(7)), less17 = less(at(1), at(7));
  const int16_t turned = times<2>(sum(less53, less17), 1.847759065 - 2);
  const int16_t odd0 = sum(sum17, sum53);
  const int16_t odd1 = less(sum(times<-3>(less53, 3 - 2.613125930), turned), odd0);
  const int16_t odd2 = less(times<1>(less(sum17, sum53), 0.414213562), odd1);
  const int16_t odd3 = sum(less(times<1>(less17, 0.082392200), turned), odd2);

  at(0) = sum(even0, odd0), at(7) = less(even0, odd0);
  at(1) = sum(even1, odd1), at(6) = less(even1, odd1);
  at(2) = sum(even2, odd2), at(5) = less(even2, odd2);
  at(4) = sum(even3, odd3), at(3) = less(even3, odd3);
}

AVMAE_WIDE
void inverse_dct(Group* group, uint8_t (*pixels)[kLanes]) {
  for (int column = 0; column < 8; ++column)
    for (int lane = 0; lane < kLanes; ++lane) transform<8>(group->coefficients + column, lane);
  for (int row = 0; row < 8; ++row) {
    int16_t(*x)[kLanes] = group->coefficients + 8 * row;
    for (int lane = 0; lane < kLanes; ++lane) transform<1>(x, lane);
  }
  for (int k = 0; k < 64; ++k)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int16_t level = static_cast<int16_t>(group->coefficients[k][lane] >> kFraction);
      pixels[k][lane] = static_cast<uint8_t>(std::min<int16_t>(std::max<int16_t>(level, 0), 255));
    }
}

// Rows of 8 pixels from 8 rows of lanes: out[lane] is where a block's row belongs.
inline void scatter_row(const uint8_t (*pixels)[kLanes], uint8_t* const* out, int64_t shift) {
#if defined(__SSE2__)
  __m128i a[8], b[8];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels[i]));
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 4]);
  }
  // Pairs of pixels 4 apart, of lanes 0 to 7 and 8 to 15; then fours 2 apart, then all eight.
  for (int i = 0; i < 2; ++i)
    for (int half = 0; half < 2; ++half) {
      a[4 * half + 2 * i] = _mm_unpacklo_epi8(b[2 * i + half], b[2 * i + 4 + half]);
      a[4 * half + 2 * i + 1] = _mm_unpackhi_epi8(b[2 * i + half], b[2 * i + 4 + half]);
    }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 2; ++i) {
      const __m128i low = _mm_unpacklo_epi8(a[4 * half + i], a[4 * half + 2 + i]);
      const __m128i high = _mm_unpackhi_epi8(a[4 * half + i], a[4 * half + 2 + i]);
      uint8_t* const* at = out + 8 * half + 4 * i;
      _mm_storel_epi64(reinterpret_cast<__m128i*>(at[0] + shift), low);
      _mm_storeh_pd(reinterpret_cast<double*>(at[1] + shift), _mm_castsi128_pd(low));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(at[2] + shift), high);
      _mm_storeh_pd(reinterpret_cast<double*>(at[3] + shift), _mm_castsi128_pd(high));
    }
#else
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 8; ++i) out[lane][shift + i] = pixels[i][lane];
#endif
}

struct Component {
  uint8_t id, quantisation, dc, ac;
};

struct Header {
  int64_t height = 0, width = 0;
  std::array<Component, 3> components{};
  std::array<const uint8_t*, 4> quantisation{};  // 64 bytes in zigzag order
  std::array<const uint8_t*, 8> codes{};         // of DC, then of AC: 16 counts, then symbols
  const uint8_t *scan = nullptr, *end = nullptr;
};

// Walks the segments of a JPEG up to its scan; false where it is damaged or of another kind.
class Parser {
 public:
  Parser(const uint8_t* data, size_t bytes) : at_(data), end_(data + bytes) {}

  bool parse(Header* out) {
    if (end_ - at_ < 4 || at_[0] != 0xFF || at_[1] != 0xD8) return false;
    at_ += 2;
    while (end_ - at_ >= 4 && at_[0] == 0xFF) {
      const uint8_t marker = at_[1];
      const int64_t length = at_[2] << 8 | at_[3];
      if (length < 2 || length > end_ - at_ - 2) return false;
      const uint8_t *segment = at_ + 4, *rest = at_ + 2 + length;
      at_ = rest;
      const bool skipped = (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE;
      if (marker == 0xDA) return scan(segment, rest, out);
      const bool good = skipped || (marker == 0xDB && quantisation(segment, rest, out)) ||
                        (marker == 0xC0 && frame(segment, rest, out)) ||
                        (marker == 0xC4 && codes(segment, rest, out));
      if (!good) return false;
    }
    return false;
  }

 private:
  static bool quantisation(const uint8_t* at, const uint8_t* end, Header* out) {
    for (; end - at >= 65; at += 65) {
      if (at[0] > 3) return false;  // also where the steps have 16 bits
      out->quantisation[at[0]] = at + 1;
    }
    return at == end;
  }

  static bool codes(const uint8_t* at, const uint8_t* end, Header* out) {
    while (end - at >= 17) {
      int symbols = 0;
      for (int i = 1; i <= 16; ++i) symbols += at[i];
      if ((at[0] & 0xEF) > 3 || symbols > 256 || symbols > end - at - 17) return false;
      out->codes[(at[0] >> 4) * 4u + (at[0] & 3)] = at + 1;
      at += 17 + symbols;
    }
    return at == end;
  }

  static bool frame(const uint8_t* at, const uint8_t* end, Header* out) {
    if (end - at != 15 || at[0] != 8 || at[5] != 3 || out->width) return false;
    out->height = at[1] << 8 | at[2], out->width = at[3] << 8 | at[4];
    for (size_t i = 0; i < 3; ++i) {
      const uint8_t* component = at + 6 + 3 * i;
      if (component[1] != (i ? 0x11 : 0x22) || component[2] > 3) return false;
      out->components[i] = {component[0], component[2], 0, 0};
    }
    return out->height && out->width;
  }

  bool scan(const uint8_t* at, const uint8_t* end, Header* out) const {
    if (!out->width || end - at != 10 || at[0] != 3) return false;
    for (size_t i = 0; i < 3; ++i) {
      Component& component = out->components[i];
      const uint8_t id = at[1 + 2 * i], tables = at[2 + 2 * i];
      component.dc = tables >> 4, component.ac = tables & 15;
      if (id != component.id || component.dc > 3 || component.ac > 3) return false;
      if (!out->codes[component.dc] || !out->codes[4u + component.ac]) return false;
      if (!out->quantisation[component.quantisation]) return false;
    }
    out->scan = end, out->end = end_;
    return at[7] == 0 && at[8] == 63 && at[9] == 0;
  }

  const uint8_t *at_, *end_;
};

// The scan without its stuffing, followed by zeros that may be read; false unless it ends as it must.
bool unstuff(const Header& header, std::vector<uint8_t>* out) {
  const uint8_t *at = header.scan, *end = header.end;
  out->clear();
  while (true) {
    const auto* marker = static_cast<const uint8_t*>(
        std::memchr(at, 0xFF, static_cast<size_t>(end - at)));
    if (!marker || end - marker < 2 || (marker[1] != 0 && marker[1] != 0xD9)) return false;
    const bool last = marker[1] == 0xD9;
    out->insert(out->end(), at, last ? marker : marker + 1);
    if (last) break;
    at = marker + 2;
  }
  out->resize(out->size() + kSlack);
  return true;
}

// Huffman tables as the last JPEG of this thread had them: all of a clip have the same.
struct CodesOf {
  std::vector<uint8_t> text;
  Codes codes;

  const Codes& of(const uint8_t* counts) {
    size_t symbols = 0;
    for (int i = 0; i < 16; ++i) symbols += counts[i];
    if (text.size() != 16 + symbols || std::memcmp(text.data(), counts, text.size()) != 0) {
      text.assign(counts, counts + 16 + symbols);
      codes.build(counts, counts + 16);
    }
    return codes;
  }
};

// Where coefficient k of the zigzag goes, and what it is multiplied by, in units of 2**-16 of the
// transform's; beyond a block nowhere.
struct Step {
  int32_t place = 64 * kLanes, scale = 0;

  int16_t times(int32_t value) const {
    return static_cast<int16_t>((int64_t{value} * scale + (1 << 15)) >> 16);
  }
};
constexpr int kScale = kFraction + 16;

using Steps = std::array<Step, 64 + kEnd>;

Steps steps_of(const uint8_t* quantisation) {
  static const auto factors = [] {
    std::array<double, 64> made{};
    const auto factor = [](int i) { return i ? std::sqrt(2.0) * std::cos(i * kPi / 16) : 1.0; };
    for (size_t k = 0; k < 64; ++k)
      made[k] = factor(kZigzag[k] / 8) * factor(kZigzag[k] % 8) / 8 * (1 << kScale);
    return made;
  }();
  Steps steps;
  for (size_t k = 0; k < 64; ++k)
    steps[k] = {kZigzag[k] * kLanes,
                static_cast<int32_t>(std::lround(quantisation[k] * factors[k]))};
  return steps;
}

struct Coder {
  const Codes *dc, *ac;
  Steps steps;
  int32_t previous = 0;

  // Coefficients of a block into one lane of zeros; false where the scan is damaged.
  bool decode(Bits* shared, int16_t* out) {
    // A copy, which stays in registers whatever is written to `out`.
    Bits bits = *shared;
    bits.refill();
    // A difference of no bits is the end of nothing, and one after a run of zeros is no difference.
    const Symbol first = next_symbol(*dc, &bits);
    const bool good = first.skip == 1 || (first.skip == kEnd && first.value == 0);
    previous = static_cast<int16_t>(previous + first.value);
    // With what makes levels of the result, and rounds them.
    out[0] = static_cast<int16_t>(steps[0].times(previous) + (257 << (kFraction - 1)));
    size_t k = 0;
    Symbol symbol;
    const auto advance = [&] {
      symbol = next_symbol(*ac, &bits);
      k += symbol.skip;
      const Step step = steps[k];
      out[step.place] = step.times(symbol.value);
      return k < 63;
    };
    do bits.refill();
    while (advance() && advance());
    const bool ended = k == 63 || (symbol.skip == kEnd && symbol.value == 0);
    *shared = bits;
    return good && ended && !bits.overrun();
  }
};

// One JPEG on its way from a scan to planes.
class Picture {
 public:
  Picture(const Header& header, const std::vector<uint8_t>& scan, const JpegPlanes& out)
      : out_(out), bits_(scan.data(), scan.data() + scan.size() - kSlack) {
    static thread_local std::array<CodesOf, 8> codes;
    for (size_t i = 0; i < 3; ++i) {
      const Component& component = header.components[i];
      const size_t ac = 4u + component.ac;
      coders_[i].dc = &codes[component.dc].of(header.codes[component.dc]);
      coders_[i].ac = &codes[ac].of(header.codes[ac]);
      coders_[i].steps = steps_of(header.quantisation[component.quantisation]);
      valid_ = valid_ && coders_[i].dc->valid && coders_[i].ac->valid;
    }
  }

  bool decode(int64_t rows, int64_t columns) {
    for (int64_t row = 0; valid_ && row < rows; ++row)
      for (int64_t first = 0; valid_ && first < columns; first += kUnits)
        decode_units(row, first, static_cast<int>(std::min<int64_t>(kUnits, columns - first)));
    return valid_ && bits_.finished();
  }

 private:
  void decode_units(int64_t row, int64_t first, int count) {
    std::memset(groups_, 0, sizeof groups_);
    const auto lane = [this](int group, int lane) {
      return &groups_[group].coefficients[0][lane];
    };
    for (int unit = 0; valid_ && unit < count; ++unit) {
      for (int block = 0; block < 4; ++block)
        valid_ = valid_ && coders_[0].decode(&bits_, lane(unit / 4, unit % 4 * 4 + block));
      valid_ = valid_ && coders_[1].decode(&bits_, lane(2, unit));
      valid_ = valid_ && coders_[2].decode(&bits_, lane(2, kUnits + unit));
    }
    for (int group = 0; group < kGroups; ++group) write(group, row, first);
  }

  void write(int group, int64_t row, int64_t first) {
    uint8_t* at[kLanes];
    const bool luma = group < 2;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t unit = first + (luma ? group * 4 + lane / 4 : lane % kUnits);
      if (luma)
        at[lane] = out_.y + (row * 16 + lane % 4 / 2 * 8) * out_.y_line + unit * 16 + lane % 2 * 8;
      else
        at[lane] = (lane < kUnits ? out_.u : out_.v) + row * 8 * out_.c_line + unit * 8;
    }
    uint8_t pixels[64][kLanes];
    inverse_dct(&groups_[group], pixels);
    for (int line = 0; line < 8; ++line)
      scatter_row(pixels + 8 * line, at, line * (luma ? out_.y_line : out_.c_line));
  }

  JpegPlanes out_;
  Bits bits_;
  std::array<Coder, 3> coders_{};
  alignas(64) Group groups_[kGroups];
  bool valid_ = true;
};

}  // namespace

bool decode_jpeg(const uint8_t* data, size_t bytes, int64_t height, int64_t width,
                 const JpegPlanes& out) {
  static thread_local std::vector<uint8_t> scan;
  Header header;
  if (!Parser(data, bytes).parse(&header) || header.height != height || header.width != width)
    return false;
  return unstuff(header, &scan) &&
         Picture(header, scan, out).decode((height + 15) / 16, (width + 15) / 16);
}

}  // namespace avmae
