// Checks a call's buffers, prepares the rows, and shares the tiles out among threads.

#include "product_call.h"

#include <string.h>

#include <algorithm>
#include <vector>

#include "scratch.h"

namespace lissom {
namespace {

// Below this a second thread costs more than it saves: some microseconds of memory traffic, and of
// arithmetic.
constexpr int64_t kBytesAlone = 128 << 10;
constexpr int64_t kProductsAlone = 1 << 18;
constexpr int64_t kPartsPerThread = 4;  // a thread that comes late finds less to do

thread_local Scratch scratch;

// The activations in one of their three forms, laid out in scratch memory where they must be.
struct Prepared {
  enum Kind { kCodes, kFloats, kHalves } kind;
  Rows rows = {};
  float* floats = nullptr;  // f32 with w.inputs (kCodes) or padded_inputs() numbers a row
  uint16_t* halves = nullptr;
  int16_t* codes = nullptr;
  float* scales = nullptr;
  int32_t* sums = nullptr;
};

bool lay_out(const Call& call, Prepared* p) {
  const Weights& w = call.products[0].weights;
  const int64_t m = call.rows, padded = w.padded_inputs(), blocks = w.blocks();
  const bool ragged = padded != w.inputs;
  p->rows.count = m;
  if (p->kind == Prepared::kHalves) {
    p->rows.halves = static_cast<const uint16_t*>(call.x);
    if (ragged) {
      p->halves = reinterpret_cast<uint16_t*>(scratch.reserve(m * padded * 2));
      p->rows.halves = p->halves;
      return p->halves != nullptr;
    }
    return true;
  }
  const bool codes = p->kind == Prepared::kCodes;
  const bool copy = call.x_bf16 || (ragged && !codes);
  const int64_t width = codes ? w.inputs : padded;
  const int64_t float_bytes = copy ? aligned(m * width * 4) : 0;
  const int64_t code_bytes = codes ? aligned(m * padded * 2) + 2 * aligned(m * blocks * 4) : 0;
  uint8_t* memory = nullptr;
  if (float_bytes + code_bytes > 0) {
    memory = scratch.reserve(float_bytes + code_bytes);
    if (memory == nullptr) return false;
  }
  if (copy) p->floats = reinterpret_cast<float*>(memory);
  p->rows.floats = copy ? p->floats : static_cast<const float*>(call.x);
  if (codes) {
    p->codes = reinterpret_cast<int16_t*>(memory + float_bytes);
    p->scales = reinterpret_cast<float*>(memory + float_bytes + aligned(m * padded * 2));
    p->sums = reinterpret_cast<int32_t*>(reinterpret_cast<uint8_t*>(p->scales) +
                                         aligned(m * blocks * 4));
    p->rows.codes = p->codes;
    p->rows.scales = p->scales;
    p->rows.sums = p->sums;
  }
  return true;
}

// Copies, widens and quantizes some of the rows.
void fill(const Call& call, const Prepared& p, int64_t begin, int64_t end) {
  const Weights& w = call.products[0].weights;
  const int64_t padded = w.padded_inputs(), blocks = w.blocks();
  const int64_t width = p.kind == Prepared::kCodes ? w.inputs : padded;
  for (int64_t r = begin; r < end; ++r) {
    const uint16_t* half = static_cast<const uint16_t*>(call.x) + r * w.inputs;
    if (p.halves != nullptr) {
      memcpy(p.halves + r * padded, half, w.inputs * 2);
      memset(p.halves + r * padded + w.inputs, 0, (padded - w.inputs) * 2);
    }
    if (p.floats != nullptr) {
      float* to = p.floats + r * width;
      if (call.x_bf16) {
        for (int64_t k = 0; k < w.inputs; ++k) to[k] = from_bf16(half[k]);
      } else {
        memcpy(to, static_cast<const float*>(call.x) + r * w.inputs, w.inputs * 4);
      }
      std::fill(to + w.inputs, to + width, 0.0f);
    }
  }
  if (p.codes != nullptr) {
    call.kernels->quantize(w, p.rows.floats + begin * w.inputs, end - begin,
                           p.codes + begin * padded, p.scales + begin * blocks,
                           p.sums + begin * blocks);
  }
}

// All of a call's tiles, numbered through, and what they cost.
struct Tiles {
  int64_t count = 0, bytes = 0, outputs = 0;
  explicit Tiles(const Call& call) {
    for (int64_t i = 0; i < call.count; ++i) {
      const Weights& w = call.products[i].weights;
      count += w.tiles();
      bytes += w.tiles() * (w.tile_bytes() + w.places_bytes());
      outputs += w.outputs;
    }
  }
};

using Kernel = void (*)(const Weights&, const Rows&, Output, Range rows, Range tiles);

void run_tiles(const Call& call, Kernel kernel, const Rows& x, Range rows, Range tiles) {
  for (int64_t i = 0, first = 0; i < call.count && first < tiles.end; ++i) {
    const Product& product = call.products[i];
    const int64_t count = product.weights.tiles();
    const Range range = {std::max<int64_t>(tiles.begin - first, 0),
                         std::min(tiles.end - first, count)};
    if (range.begin < range.end) kernel(product.weights, x, product.out, rows, range);
    first += count;
  }
}

// Parts are claimed in turn. So that a thread that keeps its place in the turn reads on where it
// ended, and what it prefetched is its own, the n-th claims of all threads are far apart.
int64_t in_streams(int64_t claim, int64_t parts, int64_t threads) {
  if (parts % threads) return claim;
  return claim % threads * (parts / threads) + claim / threads;
}

// Some tiles of one product with one expert, for the rows of its group.
struct Part {
  const Product* product;
  int64_t expert;
  Range rows, tiles;
};

// What a tile costs for some rows, in rows: it is read once, however few they are.
int64_t cost_in_rows(int64_t rows) { return std::max<int64_t>(rows, 4); }

thread_local std::vector<Part> group_parts;

// Cuts the products of all groups that have rows into parts of about the same cost, in order of
// memory. Returns the number of rows that have a group.
int64_t cut(const Call& call, const Tiles& tiles, int64_t wanted, std::vector<Part>* parts) {
  int64_t total = 0, used = 0;
  const auto each_group = [&](auto&& fn) {
    int64_t start = 0;
    for (int64_t e = 0; e < call.experts; ++e) {
      const int64_t size = std::max<int64_t>(call.group_sizes[e], 0);
      const int64_t end = std::min(start + size, call.rows);
      if (start < end) fn(e, Range{start, end});
      start = end;
    }
    return start;
  };
  used = each_group([&](int64_t, Range rows) {
    total += tiles.count * cost_in_rows(rows.end - rows.begin);
  });
  parts->clear();
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t count = call.products[i].weights.tiles();
    each_group([&](int64_t e, Range rows) {
      const int64_t cost = count * cost_in_rows(rows.end - rows.begin);
      const int64_t pieces = std::min(count, std::max<int64_t>(1, wanted * cost / total));
      for (int64_t k = 0; k < pieces; ++k)
        parts->push_back(
            {&call.products[i], e, rows, {count * k / pieces, count * (k + 1) / pieces}});
    });
  }
  return used;
}

// Rows without a group get zeros.
void clear_rows(const Call& call, int64_t first) {
  for (int64_t i = 0; i < call.count; ++i) {
    const Output& out = call.products[i].out;
    const int64_t row_bytes = call.products[i].weights.outputs * (out.bf16 ? 2 : 4);
    memset(static_cast<uint8_t*>(out.y) + first * row_bytes, 0, (call.rows - first) * row_bytes);
  }
}

void run_groups(const Call& call, Kernel kernel, const Rows& x, const Tiles& tiles,
                Workers& workers, int64_t threads) {
  std::vector<Part>& parts = group_parts;
  const int64_t wanted = threads == 1 ? 1 : threads * kPartsPerThread;
  clear_rows(call, cut(call, tiles, wanted, &parts));
  const int64_t count = static_cast<int64_t>(parts.size());
  // Whole turns of all threads; the claims that are left over find nothing.
  const int64_t claims = (count + threads - 1) / threads * threads;
  workers.run(claims, threads, [&](int64_t i) {
    const int64_t n = in_streams(i, claims, threads);
    if (n >= count) return;
    const Part& part = parts[n];
    kernel(part.product->weights.expert(part.expert), x, part.product->out, part.rows, part.tiles);
  });
}

}  // namespace

bool multiply(const Call& call, Workers& workers) {
  const Weights& w = call.products[0].weights;
  const Tiles tiles(call);
  const int64_t m = call.rows;
  if (m == 0 || tiles.count == 0) return true;
  int64_t experts = call.experts;  // that may have rows
  if (call.group_sizes != nullptr) experts = std::min(experts, m);
  Prepared p;
  bool half = call.x_bf16 && call.kernels->half != nullptr;
  for (int64_t i = 0; i < call.count; ++i) {
    const Format format = call.products[i].weights.format;
    half = half && (format == kBf16 || format == kBf16Of4);
  }
  p.kind = call.quantize ? Prepared::kCodes : half ? Prepared::kHalves : Prepared::kFloats;
  if (!lay_out(call, &p)) return false;

  const bool alone =
      experts * tiles.bytes < kBytesAlone && m * w.inputs * tiles.outputs < kProductsAlone;
  const int64_t threads = alone ? 1 : workers.count();
  const bool fills = p.codes != nullptr || p.floats != nullptr || p.halves != nullptr;
  if (fills && (threads == 1 || m * w.inputs < kProductsAlone / 4)) {
    fill(call, p, 0, m);
  } else if (fills) {
    const int64_t parts = std::min(m, threads * kPartsPerThread);
    workers.run(parts, [&](int64_t i) { fill(call, p, m * i / parts, m * (i + 1) / parts); });
  }

  const Kernel kernel = p.kind == Prepared::kCodes    ? call.kernels->integer
                      : p.kind == Prepared::kHalves ? call.kernels->half
                                                    : call.kernels->floating;
  if (call.group_sizes != nullptr) {
    run_groups(call, kernel, p.rows, tiles, workers, threads);
    return true;
  }
  const int64_t row_parts = tiles.count >= threads * 2 ? 1 : (m + kRowChunk - 1) / kRowChunk;
  const int64_t tile_parts = std::min(tiles.count, threads == 1 ? 1 : threads * kPartsPerThread);
  workers.run(row_parts * tile_parts, threads, [&](int64_t i) {
    const int64_t r = i / tile_parts, t = in_streams(i % tile_parts, tile_parts, threads);
    const Range rows = {m * r / row_parts, m * (r + 1) / row_parts};
    const Range range = {tiles.count * t / tile_parts, tiles.count * (t + 1) / tile_parts};
    run_tiles(call, kernel, p.rows, rows, range);
  });
  return true;
}

}  // namespace lissom
