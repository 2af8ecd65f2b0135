// Rows of quantized blocks → float32 or bfloat16, on all threads: a range of rows or listed rows, and of each row a
// range of blocks. The blocks are defined in formats.h, the arithmetic in expand.h.
#include "formats.h"
#include "kinds.h"

namespace {

template <class Format, class T>
void blocks_of(const uint8_t* source, int64_t blocks, T* out) {
  for (int64_t b = 0; b < blocks; ++b) Format::expand(source + b * Format::bytes, out + b * Format::values);
}

// Types whose blocks are single numbers.
template <class T>
void from_float32(const uint8_t* source, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) expand_floats(source + 4 * i, out + i);
  for (; i < count; ++i) put_careful(out + i, float_at(source + 4 * i));
}

template <class T>
void from_float16(const uint8_t* source, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) expand_halves(source + 2 * i, out + i);
  for (; i < count; ++i) put_careful(out + i, half_to_float(source + 2 * i));
}

void bits_of_bfloat16(const uint8_t* source, int64_t count, bfloat16* out) { std::memcpy(out, source, 2 * count); }

void bits_of_bfloat16(const uint8_t* source, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    bfloat16 value;
    std::memcpy(&value, source + 2 * i, 2);
    out[i] = widened(value);
  }
}

template <class Format>
constexpr Kind kind(int type) {
  return {type, Format::values, Format::bytes, blocks_of<Format, float>, blocks_of<Format, bfloat16>};
}

template <class Format>
constexpr Kind levels(int type) {
  return {type, Format::values, Format::bytes, eights_of_levels<Format, float>, eights_of_levels<Format, bfloat16>};
}

template <class Format>
constexpr Kind integers(int type) {
  return {type, Format::values, Format::bytes, eights_of_signed<Format, float>, eights_of_signed<Format, bfloat16>};
}

const Kind kinds[] = {
    {0, 1, 4, from_float32<float>, from_float32<bfloat16>},
    {1, 1, 2, from_float16<float>, from_float16<bfloat16>},
    {30, 1, 2, bits_of_bfloat16, bits_of_bfloat16},
    levels<FourBits<kSigned4, false>>(2),
    levels<FourBits<kUnsigned4, true>>(3),
    integers<FiveBits<false>>(6),
    integers<FiveBits<true>>(7),
    integers<Q8_0>(8),
    kind<Q2_K>(10),
    kind<Q3_K>(11),
    kind<Q4_K>(12),
    kind<Q5_K>(13),
    kind<Q6_K>(14),
    levels<FourBits<kNonLinear4, false>>(20),
    kind<IQ4_XS>(23),
    levels<MXFP4>(39),
};

const int64_t kPiece = 8192;   // values of a row that a thread computes at a time
const int64_t kGrain = 16384;  // values below which a second thread costs more than it brings
// The distance in bytes at which stored bytes are prefetched, for this many values at a time. The processor sees no
// pattern in a range of columns, and its own prefetching of whole rows ends with the page.
const int64_t kBytesAhead = 2048, kAsked = 256;

inline void ask_for(const uint8_t* place, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(place + i);
}

}  // namespace

const Kind* kind_of(int type) {
  for (const Kind& known : kinds) {
    if (known.type == type) return &known;
  }
  return nullptr;
}

// Write the ggml types that this library knows to `types` (room for `room` of them), and return their number.
BACKHAND_EXPORT int backhand_dequantize_types(int* types, int room) {
  int count = 0;
  for (const Kind& known : kinds) {
    if (count < room) types[count] = known.type;
    ++count;
  }
  return count;
}

// rows × blocks of a stored matrix, written to `out`.
//
//   type         ggml's number
//   source       its first row, of `source_rows` rows with a stride of `row_bytes`
//   row_ids      the rows to write, int64, or null for the first `rows`
//   first_block  the first of the `blocks` blocks of each row
//   out          rows of `blocks` times the block's values, with a stride of `out_stride` elements
//   narrow       0: float32, 1: bfloat16
//
// Returns 0; 1 for an unknown type, 2 for a row or a block outside the source. Nothing is written then.
BACKHAND_EXPORT int backhand_dequantize(int type, const uint8_t* source, int64_t row_bytes, int64_t source_rows,
                                        const int64_t* row_ids, int64_t rows, int64_t first_block, int64_t blocks,
                                        void* out, int64_t out_stride, int narrow) {
  const Kind* found = kind_of(type);
  if (found == nullptr) return 1;
  if (rows < 0 || blocks < 0 || first_block < 0 || (first_block + blocks) * found->bytes > row_bytes) return 2;
  if (row_ids == nullptr && rows > source_rows) return 2;
  for (int64_t r = 0; row_ids != nullptr && r < rows; ++r) {
    if (row_ids[r] < 0 || row_ids[r] >= source_rows) return 2;
  }
  if (rows == 0 || blocks == 0) return 0;

  const Kind& kind = *found;
  const int64_t step = kPiece / kind.values;  // blocks of a piece
  const int64_t pieces = (blocks + step - 1) / step;
  const int64_t most = blocks < step ? blocks : step, values = most * kind.values;
  const int64_t ahead = 1 + kBytesAhead / (most * kind.bytes), units = rows * pieces;
  const int64_t group = kind.values < kAsked ? kAsked / kind.values : 1;
  const auto stored = [=](int64_t unit) {
    const int64_t row = row_ids == nullptr ? unit / pieces : row_ids[unit / pieces];
    return source + row * row_bytes + (first_block + unit % pieces * step) * kind.bytes;
  };
  parallel(units, (kGrain + values - 1) / values, [=](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % pieces * step, place = unit / pieces * out_stride + block * kind.values;
      const int64_t count = blocks - block < step ? blocks - block : step;
      const uint8_t *from = stored(unit), *later = stored(unit + ahead < units ? unit + ahead : unit);
      for (int64_t b = 0; b < count; b += group) {
        const int64_t some = count - b < group ? count - b : group;
        const uint8_t* group_from = from + b * kind.bytes;
        ask_for(later + b * kind.bytes, some * kind.bytes);
        if (narrow) {
          kind.to_bfloat16(group_from, some, static_cast<bfloat16*>(out) + place + b * kind.values);
        } else {
          kind.to_float32(group_from, some, static_cast<float*>(out) + place + b * kind.values);
        }
      }
    }
  });
  return 0;
}
