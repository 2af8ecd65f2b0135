// ∂L/∂h = s G B (rows, rank) and ∂L/∂B += s Gᵀ h (n, rank) in one pass over G (rows, n), for all layers that share an
// input, each of which owns columns of G: the formulas of ops/low_rank.py.
//
// A task is a range of columns of G. It copies a few rows of them at a time into the cache, where both products read
// them. Its rows of ∂L/∂B are its own. Its part of ∂L/∂h goes to a buffer, and the buffers are added in the order of
// the columns, so that nothing depends on the number of threads.
#include "low_rank.h"

namespace {

// One of several layers with a common input: its columns of G, its factor, and the columns of h and ∂L/∂h from `first`
// on.
template <class T, class O>
struct Member {
  Matrix<const T> g, factor, h;
  Matrix<T> d_h;
  Matrix<O> gradient;
  int64_t n, rank;
  double scaling;
};

// A range of columns of a layer, for one thread; its part of ∂L/∂h goes to `partial`, (rows, width).
template <class T, class O>
struct Piece {
  const Member<T, O>* member;
  int64_t column;
  Wide<T>* partial;
};

template <class T, class O>
struct Backward {
  typedef Operands<T> Op;
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  static constexpr bool AS_IT_IS = Op::PACK == 1 && sizeof(E) == sizeof(T);
  // The block of G that is computed at a time, and the columns of a task.
  static constexpr int64_t ROWS = 48, COLUMNS = 64, TASK = 2 * COLUMNS;

  static int64_t width(int64_t rank) { return rounded_up(rank, lanes<C>); }
  static int64_t pieces_of(int64_t n) { return std::max<int64_t>(1, (n + TASK - 1) / TASK); }

  // Bytes of one thread: the factor's rows of a piece, h of all rows, the sums of a piece.
  static size_t scratch(int64_t rows, int64_t rank) {
    const int64_t units = units_of<Op>(TASK) * width(rank) + units_of<Op>(rows) * rank;
    const int64_t numbers = BlockSums<C>::numbers((rank + 16) * TASK, rows, ROWS);
    return static_cast<size_t>(units) * sizeof(U) + static_cast<size_t>(numbers) * sizeof(C) + 256;
  }

  static void piece(const Piece<T, O>& here, int64_t rows, Arena& arena) {
    arena.clear();
    const Member<T, O>& member = *here.member;
    const int64_t rank = member.rank, wide = width(rank), there = std::min(TASK, member.n - here.column);
    const U* factor = reinterpret_cast<const U*>(member.factor.at(here.column));
    int64_t factor_row = member.factor.row;
    if (!AS_IT_IS || rank != wide) {
      U* packed = arena.take<U>(units_of<Op>(TASK) * wide);
      interleave<Op>(member.factor.at(here.column), factor_row, there, rank, packed, wide);
      factor = packed;
      factor_row = wide;
    }
    Interleaved<U> h{reinterpret_cast<const U*>(member.h.data), member.h.row};
    if (!AS_IT_IS) {
      U* packed = arena.take<U>(units_of<Op>(rows) * rank);
      interleave<Op>(member.h.data, member.h.row, rows, rank, packed, rank);
      h = {packed, rank};
    }
    const int64_t one = (rank + 16) * TASK;
    const BlockSums<C> sums(arena.take<C>(BlockSums<C>::numbers(one, rows, ROWS)), one, rows, ROWS);
    alignas(64) U right[ROWS / Op::PACK * COLUMNS];
    alignas(64) E copy[ROWS * COLUMNS];
    for (int64_t t = 0; t < rows; t += ROWS) {
      const int64_t count = std::min(ROWS, rows - t);
      for (int64_t j = 0; j == 0 || j < there; j += COLUMNS) {
        const Matrix<const T> g{member.g.at(t, here.column + j), member.g.row};
        const int64_t some = std::min(COLUMNS, there - j);
        interleave<Op>(g.data, g.row, count, some, right, COLUMNS);
        product_of_part<Op>(rank, rounded_up(some, 16), units_of<Op>(count),
                            Interleaved<U>{h.data + t / Op::PACK * h.place, h.place}, right, COLUMNS, sums.recent + j,
                            TASK, MUTATED("low_rank: first rows of a pass lost", sums.adds(t / ROWS), false));
        Rows<U> left{right, COLUMNS};
        if (Op::PACK > 1) left = rows_as_units<Op>(g, count, some, copy);
        product_of_part<Op>(count, wide, units_of<Op>(some), left, factor + j / Op::PACK * factor_row, factor_row,
                            here.partial + t * wide, wide,
                            MUTATED("low_rank: first columns of a pass lost", j > 0, false));
      }
      sums.end_block(t / ROWS, t + ROWS >= rows, 0, TASK, rank, 0, TASK);
    }
    const C s = static_cast<C>(MUTATED("low_rank: scaling of dB forgotten", member.scaling, 1));
    add_turned(sums.all, TASK, there, rank, s, member.gradient.at(here.column), member.gradient.row);
  }

  // Add the pieces' parts of ∂L/∂h for some rows, in order.
  static void add_up(const Piece<T, O>* pieces, int64_t count, int64_t begin, int64_t end) {
    for (int64_t p = 0; p < count;) {
      const Member<T, O>& member = *pieces[p].member;
      int64_t last = p;
      while (last < count && pieces[last].member == &member) ++last;
      const int64_t wide = width(member.rank);
      const C s = static_cast<C>(MUTATED("low_rank: scaling of dh forgotten", member.scaling, 1));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t r = 0; r < member.rank; r += lanes<C>) {
          Vector<C> sum = load<C>(pieces[p].partial + i * wide + r);
          for (int64_t q = p + 1; q < MUTATED("low_rank: last piece of dh forgotten", last, last - 1); ++q)
            sum += load<C>(pieces[q].partial + i * wide + r);
          if (member.rank - r >= lanes<C>) {
            store(member.d_h.at(i, r), sum * s);
          } else {
            store_some<C>(member.d_h.at(i, r), sum * s, member.rank - r);
          }
        }
      p = last;
    }
  }

  static int run(const Member<T, O>* members, int64_t count, int64_t rows) {
    int64_t piece_count = 0, partials = 0, rank = 0;
    for (const Member<T, O>* member = members; member < members + count; ++member) {
      piece_count += pieces_of(member->n);
      partials += pieces_of(member->n) * width(member->rank);
      rank = std::max(rank, member->rank);
    }
    const size_t bytes = static_cast<size_t>(piece_count) * (sizeof(Piece<T, O>) + 64);
    Arena arena(bytes + static_cast<size_t>(partials * rows) * sizeof(C) + 64);
    Piece<T, O>* pieces = arena.take<Piece<T, O>>(piece_count);
    if (!arena.there()) return 1;
    int64_t filled = 0;
    for (const Member<T, O>* member = members; member < members + count; ++member)
      for (int64_t j = 0; j == 0 || j < member->n; j += TASK)
        pieces[filled++] = {member, j, arena.take<C>(rows * width(member->rank))};
    std::atomic<int> outcome{0};
    by_turns(filled, [&](std::atomic<int64_t>& next) {
      Arena own(scratch(rows, rank));
      if (!own.there()) {
        outcome = 1;
        return;
      }
      for (int64_t i = next++; i < filled; i = next++) piece(pieces[i], rows, own);
    });
    if (outcome) return outcome;
    parallel(rows, grain_of<Op>(8 * partials),
             [=](int64_t begin, int64_t end) { add_up(pieces, filled, begin, end); });
    return 0;
  }
};

// The same by parts of the rows, for AMX, which multiplies faster than it is supplied: blocks of rows are read for the
// first product and are still in the cache for the second. The number of parts does not depend on the number of
// threads. Each part has its own sums of ∂L/∂B, which are added in order.
template <class T, class O>
struct ByParts {
  typedef Operands<T> Op;
  typedef typename Op::Sum C;
  typedef typename Op::Unit U;
  static constexpr int64_t MOST_ROWS = 128;

  // A layer's operands as units, and the sums of all parts, (parts, rounded up rank, width).
  struct Packed {
    const U* factor;
    Left<Op> h;
    C* sums;
  };

  static int64_t width(const Member<T, O>& member) { return rounded_up(member.n, FEWEST_COLUMNS); }
  static int64_t high(const Member<T, O>& member) { return rounded_up(member.rank, TILE); }
  static int64_t factor_width(const Member<T, O>& member) { return rounded_up(member.rank, lanes<C>); }

  static int64_t one(const Member<T, O>& member, int64_t parts) { return parts * high(member) * width(member); }

  // A square of sums may begin in the last row.
  static int64_t sums_of(const Member<T, O>& member, int64_t parts, int64_t rows, int64_t block) {
    return BlockSums<C>::numbers(one(member, parts), rows / parts, block) + TILE * width(member);
  }

  static int run(const Member<T, O>* members, int64_t count, int64_t rows) {
    const RowParts parts(rows);
    size_t bytes = static_cast<size_t>(count) * sizeof(Packed) + 64;
    int64_t multiplications = 0, columns = 0, longest = 0, rank = 0;
    for (const Member<T, O>* member = members; member < members + count; ++member)
      longest = std::max(longest, member->n);
    const int64_t block = longest <= 4096 ? MOST_ROWS : MOST_ROWS / 2;
    for (const Member<T, O>* member = members; member < members + count; ++member) {
      bytes += bytes_of_units<Op>(member->n, factor_width(*member)) + bytes_of_left<Op>(rows, member->rank) + 192 +
               static_cast<size_t>(sums_of(*member, parts.count, rows, block)) * sizeof(C);
      multiplications += member->n * member->rank;
      columns += width(*member) / FEWEST_COLUMNS;
      rank = std::max(rank, member->rank);
    }
    Arena arena(bytes);
    Packed* packed = arena.there() ? arena.take<Packed>(count) : nullptr;
    if (packed == nullptr) return 1;
    for (int64_t i = 0; i < count; ++i) {
      const Member<T, O>& member = members[i];
      const U* factor =
          units_along_n<Op>(Factor<T>{member.factor, false}, member.n, member.rank, factor_width(member), arena);
      const Left<Op> h = left_of<Op>(member.h, rows, member.rank, arena);
      packed[i] = {factor, h, arena.take<C>(sums_of(member, parts.count, rows, block))};
    }
    parallel(parts.count, grain_of<Op>(2 * rows / parts.count * multiplications), [=](int64_t begin, int64_t end) {
      const TilesOf<Op> tiles;
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = parts.begin(part), last = parts.begin(part + 1);
        for (int64_t t = first, number = 0; t == first || t < last; t += block, ++number)
          for (int64_t i = 0; i < count; ++i) {
            const int64_t columns = width(members[i]), rank = members[i].rank;
            const BlockSums<C> sums(packed[i].sums + part * high(members[i]) * columns, one(members[i], parts.count),
                                    rows / parts.count, block);
            rows_of(members[i], packed[i], sums.recent, t, std::min(block, last - t),
                    std::min(block, rows - std::min(rows, t + block)), sums.adds(number));
            sums.end_block(number, t + block >= last, 0, columns, rank, 0, columns);
          }
      }
    });
    parallel(columns, grain_of_sums(parts.count * rank), [=](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count && end > 0; ++i) {
        const int64_t there = width(members[i]) / FEWEST_COLUMNS;
        if (begin < there)
          add_up(members[i], packed[i].sums, parts.count, std::max<int64_t>(begin, 0), std::min(end, there));
        begin -= there;
        end -= there;
      }
    });
    return 0;
  }

  // Both products of the rows t … t + count - 1 with one layer's factor and h; `next` rows follow.
  static void rows_of(const Member<T, O>& member, const Packed& packed, C* sums, int64_t t, int64_t count, int64_t next,
                      bool add) {
    alignas(64) U right[MOST_ROWS / Op::PACK * GATHERED_COLUMNS];
    const C s = static_cast<C>(MUTATED("low_rank_rows: scaling forgotten", member.scaling, 1));
    const int64_t columns = width(member);
    shrink_rows<Op>(member.g, packed.factor, factor_width(member), member.d_h, t, t + count, member.n, member.rank, s);
    for (int64_t j = 0; j < columns; j += GATHERED_COLUMNS) {
      if (by_tiles<Op>)
        fetch_share(member.g, t + count, next, member.n, j / GATHERED_COLUMNS,
                    (columns + GATHERED_COLUMNS - 1) / GATHERED_COLUMNS);
      gather_block<Op>(member.g, packed.h, t, count, j, std::min(GATHERED_COLUMNS, columns - j), member.n,
                       GATHERED_COLUMNS, right, sums, columns,
                       MUTATED("low_rank_rows: first rows of a part lost", add, false));
    }
  }

  // Add blocks begin … end - 1 of `FEWEST_COLUMNS` columns of all parts to the gradient.
  static void add_up(const Member<T, O>& member, C* sums, int64_t parts, int64_t begin, int64_t end) {
    const int64_t first = begin * FEWEST_COLUMNS, last = end * FEWEST_COLUMNS, row = width(member);
    add_parts(sums, parts, high(member) * row, row, member.rank, first, last);
    const C s = static_cast<C>(MUTATED("low_rank_rows: scaling of dB forgotten", member.scaling, 1));
    add_turned(sums + first, row, std::min(last, member.n) - first, member.rank, s, member.gradient.at(first),
               member.gradient.row);
  }
};

template <class T, class O>
int backward_of_members(Matrix<const T> g, Matrix<const T> h, Matrix<T> d_h, int64_t count, const int64_t* numbers,
                        const double* scalings, bool by_parts, int64_t rows) {
  if (rows <= 0) return 0;
  Arena arena(static_cast<size_t>(count) * sizeof(Member<T, O>) + 64);
  Member<T, O>* members = arena.take<Member<T, O>>(count);
  if (!arena.there()) return 1;
  int64_t first = 0;
  for (int64_t i = 0; i < count; ++i, numbers += 7) {
    const int64_t column = numbers[0], n = numbers[1], rank = numbers[2];
    members[i] = {{g.at(0, column), g.row},
                  {reinterpret_cast<const T*>(numbers[3]), numbers[4]},
                  {h.at(0, MUTATED("low_rank: every member with the first's h", first, int64_t{0})), h.row},
                  {d_h.at(0, first), d_h.row},
                  {reinterpret_cast<O*>(numbers[5]), numbers[6]},
                  n,
                  rank,
                  scalings[i]};
    first += rank;
  }
  return by_parts ? ByParts<T, O>::run(members, count, rows) : Backward<T, O>::run(members, count, rows);
}

}  // namespace

// For `count` layers that share their input: d_h (rows, Σ rank) = s g B, and += s gᵀ h, of B's shape, (n, rank). Each
// layer is given by seven numbers: its first column of g, n, its rank; address and row stride of B; the same of the
// gradient of B, in float (double for double) if `wide`, else in the storage type. Tasks are parts of the rows if
// `by_parts`, else columns of g. Returns 1 if there is no memory, else 0.
BACKHAND_EXPORT int backhand_low_rank_backward(int dtype, const void* g, int64_t g_row, const void* h, int64_t h_row,
                                               void* d_h, int64_t d_h_row, int64_t count, const int64_t* numbers,
                                               const double* scalings, int wide, int by_parts, int64_t rows) {
  BY_DTYPE(dtype, T, {
    const Matrix<const T> large{static_cast<const T*>(g), g_row}, small{static_cast<const T*>(h), h_row};
    const auto run = wide ? backward_of_members<T, Wide<T>> : backward_of_members<T, T>;
    return run(large, small, {static_cast<T*>(d_h), d_h_row}, count, numbers, scalings, by_parts != 0, rows);
  });
}
