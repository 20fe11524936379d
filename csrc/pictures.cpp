#include "pictures.h"

#include <algorithm>
#include <cstring>

#include "wide.h"

namespace avmae {
namespace {

// Blocks of 2x2 pixels that are converted at a time: what they need stays in the first cache. Loops
// run over whole vectors of `kLanes`, because a remainder would take as long as all the rest.
constexpr int64_t kBlocks = 128, kLanes = 32;

// A number of levels in two halves, whole ones and 2**-16 of one, so that the loops over pixels need
// 16-bit lanes only, twice as many as of the 32-bit sums that this is the same as.
struct Scaled {
  int16_t levels;
  uint16_t fraction;
};

// A coefficient is whole * 2**16 + part, where both have 16 bits, sign included.
struct Coefficient {
  int16_t whole, part;

  explicit Coefficient(int32_t value)
      : whole(static_cast<int16_t>((value + (1 << 15)) >> 16)), part(static_cast<int16_t>(value)) {}

  Scaled operator*(int16_t x) const {
    const int16_t high = static_cast<int16_t>((int32_t{x} * part) >> 16);
    return {static_cast<int16_t>(x * whole + high), static_cast<uint16_t>(x * part)};
  }
};

inline Scaled operator+(Scaled a, Scaled b) {
  const uint16_t fraction = static_cast<uint16_t>(a.fraction + b.fraction);
  return {static_cast<int16_t>(a.levels + b.levels + (fraction < a.fraction)), fraction};
}

// What chroma adds to one colour of each block, with the half that rounds to the nearest.
struct Term {
  int16_t levels[kBlocks];
  uint16_t fraction[kBlocks];

  Scaled operator[](int64_t i) const { return {levels[i], fraction[i]}; }

  void set(int64_t i, Scaled value) {
    value = value + Scaled{0, 1 << 15};
    levels[i] = value.levels;
    fraction[i] = value.fraction;
  }
};

struct Chroma {
  Term red, green, blue;
};

// Two neighbours of a line in each number, as memory has them: their chroma is the same, so that
// arithmetic in 16-bit lanes needs no repetition of it and no rearrangement of bytes.
struct Pairs {
  uint16_t red[kBlocks], green[kBlocks], blue[kBlocks];
};

AVMAE_WIDE
void weigh(const uint8_t* __restrict u, const uint8_t* __restrict v, int64_t vectors,
           const Coefficients& by, Chroma* __restrict out) {
  const Coefficient v_red(by.v_red), u_green(by.u_green), v_green(by.v_green), u_blue(by.u_blue);
  for (int64_t i = 0; i < vectors * kLanes; ++i) {
    const int16_t of_u = static_cast<int16_t>(u[i] - 128), of_v = static_cast<int16_t>(v[i] - 128);
    out->red.set(i, v_red * of_v);
    out->green.set(i, u_green * of_u + v_green * of_v);
    out->blue.set(i, u_blue * of_u);
  }
}

inline uint16_t level(Scaled sum) {
  return static_cast<uint16_t>(std::min<int16_t>(std::max<int16_t>(sum.levels, 0), 255));
}

AVMAE_WIDE
void convert(const uint16_t* __restrict luma, const Chroma& __restrict chroma, int64_t vectors,
             const Coefficients& by, Pairs* __restrict out) {
  const Coefficient of_y(by.luma);
  const int32_t black = by.black;
  for (int64_t i = 0; i < vectors * kLanes; ++i) {
    const Scaled one = of_y * static_cast<int16_t>((luma[i] & 255) - black);
    const Scaled other = of_y * static_cast<int16_t>((luma[i] >> 8) - black);
    const auto both = [=](Scaled term) {
      return static_cast<uint16_t>(level(one + term) | level(other + term) << 8);
    };
    out->red[i] = both(chroma.red[i]);
    out->green[i] = both(chroma.green[i]);
    out->blue[i] = both(chroma.blue[i]);
  }
}

AVMAE_WIDE
void interleave(const uint8_t* __restrict red, const uint8_t* __restrict green,
                const uint8_t* __restrict blue, int64_t count, uint8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[3 * i] = red[i];
    out[3 * i + 1] = green[i];
    out[3 * i + 2] = blue[i];
  }
}

AVMAE_WIDE
void interleave_mirrored(const uint8_t* __restrict red, const uint8_t* __restrict green,
                         const uint8_t* __restrict blue, int64_t count, uint8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[3 * i] = red[count - 1 - i];
    out[3 * i + 1] = green[count - 1 - i];
    out[3 * i + 2] = blue[count - 1 - i];
  }
}

AVMAE_WIDE
void reverse(const uint8_t* __restrict from, int64_t count, uint8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from[count - 1 - i];
}

AVMAE_WIDE
void limit(uint8_t* levels, int64_t count, int32_t scale, int32_t offset) {
  offset += 1 << 15;
  for (int64_t i = 0; i < count; ++i)
    levels[i] = static_cast<uint8_t>((levels[i] * scale + offset) >> 16);
}

const uint8_t* at(const Plane& plane, int64_t line, int64_t column) {
  return plane.data + line * plane.line + column;
}

void crop_plane(const Plane& plane, const Crop& crop, uint8_t* out) {
  for (int64_t line = 0; line < crop.height; ++line, out += crop.width) {
    const uint8_t* from = at(plane, crop.top + line, crop.left);
    if (crop.mirrored)
      reverse(from, crop.width, out);
    else
      std::memcpy(out, from, static_cast<size_t>(crop.width));
  }
}

// Lines of a part of the crop that is as wide as fits into `kBlocks` blocks. The first and the last
// may be cut: their other pixel is converted too, and left out.
void convert_columns(const Planes& planes, const Crop& part, const Coefficients& by, uint8_t* out,
                     int64_t out_line) {
  const int64_t first = part.left / 2, cut = part.left % 2, count = part.width;
  const int64_t blocks = (cut + count + 1) / 2, vectors = (blocks + kLanes - 1) / kLanes;
  // Copies of a line, for there may be no memory behind it where a vector ends.
  uint8_t u[kBlocks] = {}, v[kBlocks] = {};
  uint16_t luma[kBlocks] = {};
  Chroma chroma;
  Pairs pairs;
  for (int64_t line = 0; line < part.height; ++line, out += out_line) {
    const int64_t y = part.top + line;
    if (line == 0 || y % 2 == 0) {
      std::memcpy(u, at(planes.u, y / 2, first), static_cast<size_t>(blocks));
      std::memcpy(v, at(planes.v, y / 2, first), static_cast<size_t>(blocks));
      weigh(u, v, vectors, by, &chroma);
    }
    std::memcpy(luma, at(planes.y, y, 2 * first), static_cast<size_t>(cut + count));
    convert(luma, chroma, vectors, by, &pairs);
    const auto bytes = [cut](const uint16_t* colour) {
      return reinterpret_cast<const uint8_t*>(colour) + cut;
    };
    (part.mirrored ? interleave_mirrored : interleave)(bytes(pairs.red), bytes(pairs.green),
                                                       bytes(pairs.blue), count, out);
  }
}

}  // namespace

void crop_to_rgb(const Planes& planes, const Crop& crop, const Coefficients& by, uint8_t* out) {
  int64_t done = 0;
  while (done < crop.width) {
    const int64_t left = crop.left + done;
    const int64_t count = std::min(2 * kBlocks - left % 2, crop.width - done);
    // Mirrored, a line is written from its end on.
    const int64_t column = crop.mirrored ? crop.width - done - count : done;
    convert_columns(planes, {crop.top, left, crop.height, count, crop.mirrored}, by,
                    out + 3 * column, 3 * crop.width);
    done += count;
  }
}

void crop_to_i420(const Planes& planes, const Crop& crop, bool full, uint8_t* out) {
  const Crop half{crop.top / 2, crop.left / 2, crop.height / 2, crop.width / 2, crop.mirrored};
  const int64_t luma = crop.height * crop.width;
  crop_plane(planes.y, crop, out);
  crop_plane(planes.u, half, out + luma);
  crop_plane(planes.v, half, out + luma + luma / 4);
  if (full) {
    limit(out, luma, 56284, 16 << 16);  // 219 / 255
    limit(out + luma, luma / 2, 57569, (128 << 16) - 128 * 57569);  // 224 / 255, round 128
  }
}

}  // namespace avmae
