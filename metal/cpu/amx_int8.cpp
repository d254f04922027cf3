// AMX int8: the q8mm of many rows, by products of 16x64 by 64x16 int8 tiles into int32.
//
// x is the left operand: a tile is 16 prepared rows of 64 codes. W is the right one: 32 rows of it become a panel of
// signed codes, code - z, whose 16 lines of 16 rows x 4 codes are a tile as they lie (panel.h). So sums come out with
// rows of x down and rows of W along, exact and without z:
//
//            n0..15    n16..31
//   x tile |  sums 0 |  sums 1 |  m0..15
//   x tile |  sums 2 |  sums 3 |  m16..31
//
// per_row: the four tiles are summed over all of K. Otherwise every group's four tiles are put aside, and after
// groups_aside of them added to float32 totals in the order and by the operations of avx512_vnni:q8_gemm, whose bits
// these are. Groups of 32 use tiles of half the depth.
//
//   prepared row   [codes, K padded to 64 with zeros] [x_sum of each group, times its x_scale if tiled]
//                  [x_scale of each group if tiled] [x_scale], an odd number of cache lines: 16 rows must not fall
//                  into one set of L1
//
// Within 64 codes k comes in the order of the panel: the codes of a word's field j after those of field j - 1.
// More rows of x than L2 holds are taken in passes, each of which builds W's panels anew.
#include "amx_tiles.h"
#include "numeric.h"
#include "panel.h"

#include <cstring>

namespace mlxq {
namespace {

// From this many rows on this family is faster than avx512_vnni (tools/results/amx-*.json: one thread of a busy Xeon, in
// all cells but one).
constexpr int q8_from_rows = 16;

constexpr int tile_bytes = 1024;
constexpr int groups_aside = 4;  // 16 KB of sums
#ifdef MLXQ_EMULATE_AMX
constexpr size_t pass_bytes = 16 << 10;  // small shapes take several passes
#else
constexpr size_t pass_bytes = 1 << 20;  // of x: half of a 2 MB L2
#endif
constexpr int block_rows = 32;

int groups(const Qmm& q) { return q.K / q.group_size; }
size_t code_bytes(const Qmm& q) { return size_t(q.K + 63) / 64 * 64; }

size_t row_bytes(const Qmm& q) {
  size_t bytes = code_bytes(q) + 4 * (size_t(groups(q)) * (q.tiled ? 2 : 1) + 1);
  return 64 * ((bytes + 63) / 64 | 1);
}

float* sums_of(const Qmm& q, char* row) { return reinterpret_cast<float*>(row + code_bytes(q)); }
const float* sums_of(const Qmm& q, const char* row) { return reinterpret_cast<const float*>(row + code_bytes(q)); }
const float* tile_scales_of(const Qmm& q, const char* row) { return sums_of(q, row) + groups(q); }
float x_scale_of(const Qmm& q, const char* row) { return sums_of(q, row)[groups(q) * (q.tiled ? 2 : 1)]; }

// 16 codes of x in the order in which a panel's lines have them.
template <int BITS>
__m128i in_panel_order(__m128i codes) {
  if constexpr (BITS == 8) {
    return codes;
  } else if constexpr (BITS == 4) {
    return _mm_shuffle_epi8(codes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  } else {
    return _mm_shuffle_epi8(codes, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  }
}

template <int BITS>
void prepare_bits(const Qmm& q, char* prepared, int begin, int end) {
  for (int m = begin; m < end; ++m) {
    int64_t from = q.x_rows ? q.x_rows[m] : m;
    const int8_t* x = static_cast<const int8_t*>(q.x) + from * q.K;
    const float* x_scales = q.x_scales_of(from);
    char* row = prepared + size_t(m) * row_bytes(q);
    float* sums = sums_of(q, row);
    for (int g = 0; g < groups(q); ++g) {
      __m128i total = _mm_setzero_si128();
      for (int k = g * q.group_size; k < (g + 1) * q.group_size; k += 16) {
        __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k));
        total = _mm_dpbusd_epi32(total, _mm_set1_epi8(1), codes);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(row + k), in_panel_order<BITS>(codes));
      }
      float sum = float(_mm512_reduce_add_epi32(_mm512_zextsi128_si512(total)));
      sums[g] = q.tiled ? sum * x_scales[g] : sum;
      if (q.tiled) {
        sums[groups(q) + g] = x_scales[g];
      }
    }
    sums[groups(q) * (q.tiled ? 2 : 1)] = q.tiled ? 1.0f : *x_scales;
    std::memset(row + q.K, 0, code_bytes(q) - q.K);
  }
}

void prepare(const Qmm& q, char* prepared, int begin, int end) {
  (q.bits == 2 ? prepare_bits<2> : q.bits == 4 ? prepare_bits<4> : prepare_bits<8>)(q, prepared, begin, end);
  _mm256_zeroupper();
}

// Up to 32 rows of x. codes: of the first and of row 16, `stride` bytes from row to row, 16 rows each.
struct Rows {
  const char* codes[2];
  size_t stride[2];
  const char* prepared;  // of the first
  int m, count;
};

// Sums over the codes [k, k_end) of K, put at `sums` as [m_tiles][2] tiles.
template <int m_tiles>
void multiply(const Panel& panel, const Rows& rows, int k, int k_end, int tile_k, char* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (m_tiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  stores_done();
  for (; k < k_end; k += tile_k) {
    const char* w = panel.codes + size_t(k) * panel_columns;
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    _tile_loadd(4, rows.codes[0] + k, int64_t(rows.stride[0]));
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (m_tiles == 2) {
      _tile_loadd(5, rows.codes[1] + k, int64_t(rows.stride[1]));
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + tile_bytes, 64);
  if constexpr (m_tiles == 2) {
    _tile_stored(2, sums + 2 * tile_bytes, 64);
    _tile_stored(3, sums + 3 * tile_bytes, 64);
  }
  stores_done();
}

// Where row r's sums of columns [16 h, 16 h + 16) lie among four tiles.
const char* sums_at(const char* sums, int r, int h) { return sums + (r / 16 * 2 + h) * tile_bytes + r % 16 * 64; }

__mmask16 columns_of(int columns, int h) {
  int left = columns - 16 * h;
  return left >= 16 ? 0xffff : __mmask16((1u << (left > 0 ? left : 0)) - 1);
}

template <int m_tiles>
void whole_block(const Qmm& q, const Panel& panel, const Rows& rows, int n0, int columns, char* sums) {
  multiply<m_tiles>(panel, rows, 0, q.K, 64, sums);
  const size_t stride = row_bytes(q);
  for (int r = 0; r < rows.count; ++r) {
    const __m512 x_scale = _mm512_set1_ps(x_scale_of(q, rows.prepared + r * stride));
    for (int h = 0; h < 2; ++h) {
      __m512 scale = _mm512_mul_ps(x_scale, _mm512_load_ps(panel.scales + h * 16));
      __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums_at(sums, r, h)));
      store16(q.y, q.x_dtype, y_row(q, rows.m + r) + n0 + h * 16, _mm512_mul_ps(sum, scale), columns_of(columns, h));
    }
  }
}

// sums: groups_aside sets of four tiles; totals: [32][32] float32.
template <int BITS, int m_tiles>
void grouped_block(const Qmm& q, const Panel& panel, const Rows& rows, int n0, int columns, char* sums,
                   float* totals) {
  const int tile_k = q.group_size == 32 ? 32 : 64, count = groups(q);
  const size_t stride = row_bytes(q);
  std::memset(totals, 0, sizeof(float) * block_rows * panel_columns);
  for (int g0 = 0; g0 < count; g0 += groups_aside) {
    const int here = count - g0 < groups_aside ? count - g0 : groups_aside;
    for (int i = 0; i < here; ++i) {
      const int k = (g0 + i) * q.group_size;
      multiply<m_tiles>(panel, rows, k, k + q.group_size, tile_k, sums + i * 4 * tile_bytes);
    }
    for (int h = 0; h < 2; ++h) {
      __m512 scales[groups_aside], biases[groups_aside];
      for (int i = 0; i < here; ++i) {
        scales[i] = _mm512_load_ps(panel.scales + size_t(g0 + i) * panel_columns + h * 16);
        __m512 bias = _mm512_load_ps(panel.biases + size_t(g0 + i) * panel_columns + h * 16);
        biases[i] = _mm512_fmadd_ps(_mm512_set1_ps(1 << (BITS - 1)), scales[i], bias);
      }
      for (int r = 0; r < rows.count; ++r) {
        const char* row = rows.prepared + r * stride;
        const float* x_sums = sums_of(q, row) + g0;
        const float* x_scales = q.tiled ? tile_scales_of(q, row) + g0 : nullptr;
        __m512 total = _mm512_load_ps(totals + r * panel_columns + h * 16);
        for (int i = 0; i < here; ++i) {
          total = _mm512_fmadd_ps(biases[i], _mm512_set1_ps(x_sums[i]), total);
          __m512 by = x_scales ? _mm512_mul_ps(scales[i], _mm512_set1_ps(x_scales[i])) : scales[i];
          __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums_at(sums + i * 4 * tile_bytes, r, h)));
          total = _mm512_fmadd_ps(sum, by, total);
        }
        _mm512_store_ps(totals + r * panel_columns + h * 16, total);
      }
    }
  }
  for (int r = 0; r < rows.count; ++r) {
    const __m512 x_scale = _mm512_set1_ps(x_scale_of(q, rows.prepared + r * stride));
    for (int h = 0; h < 2; ++h) {
      __m512 total = _mm512_load_ps(totals + r * panel_columns + h * 16);
      store16(q.y, q.x_dtype, y_row(q, rows.m + r) + n0 + h * 16, _mm512_mul_ps(total, x_scale),
              columns_of(columns, h));
    }
  }
}

template <int BITS, int m_tiles>
void run_block(const Qmm& q, const Panel& panel, const Rows& rows, int n0, int columns, char* sums, float* totals) {
  if (q.per_row) {
    whole_block<m_tiles>(q, panel, rows, n0, columns, sums);
  } else {
    grouped_block<BITS, m_tiles>(q, panel, rows, n0, columns, sums, totals);
  }
}

// The last rows of x when they are not 16: copied, with zeros after them.
const char* last_rows(const Qmm& q, const char* prepared) {
  static thread_local char* held = nullptr;
  static thread_local size_t size = 0;
  const size_t wanted = 16 * code_bytes(q), stride = row_bytes(q);
  if (wanted > size) {
    std::free(held);
    size = (wanted + 4095) / 4096 * 4096;
    held = static_cast<char*>(std::aligned_alloc(4096, size));
  }
  const int rows = q.M % 16;
  for (int r = 0; r < rows; ++r) {
    std::memcpy(held + r * code_bytes(q), prepared + size_t(q.M - rows + r) * stride, code_bytes(q));
  }
  std::memset(held + rows * code_bytes(q), 0, (16 - rows) * code_bytes(q));
  return held;
}

template <int BITS>
void run_bits(const Qmm& q, const char* prepared, int begin, int end) {
  alignas(64) char sums[groups_aside * 4 * tile_bytes];
  alignas(64) float totals[block_rows * panel_columns];
  const Panel panel = panel_memory(q);
  const char* last = q.M % 16 ? last_rows(q, prepared) : nullptr;
  const size_t stride = row_bytes(q);
  int pass_rows = int(pass_bytes / stride) / block_rows * block_rows;
  pass_rows = pass_rows < 2 * block_rows ? 2 * block_rows : pass_rows;

  TileConfig config;  // 0..3: sums. 4, 5: x. 6, 7: W.
  if (!q.per_row && q.group_size == 32) {
    config.colsb[4] = config.colsb[5] = 32;
    config.rows[6] = config.rows[7] = 8;
  }
  configure(config);
  for (int first = 0; first < q.M; first += pass_rows) {
    const int stop = q.M - first < pass_rows ? q.M : first + pass_rows;
    for (int n0 = begin; n0 < end; n0 += panel_columns) {
      build_panel<BITS, 1 << (BITS - 1)>(q, panel, n0);
      const int columns = end - n0 < panel_columns ? end - n0 : panel_columns;
      for (int m = first; m < stop; m += block_rows) {
        Rows rows{{}, {}, prepared + size_t(m) * stride, m, stop - m < block_rows ? stop - m : block_rows};
        for (int t = 0; 16 * t < rows.count; ++t) {
          const bool whole = rows.count - 16 * t >= 16;
          rows.codes[t] = whole ? rows.prepared + 16 * t * stride : last;
          rows.stride[t] = whole ? stride : code_bytes(q);
        }
        (rows.count > 16 ? run_block<BITS, 2> : run_block<BITS, 1>)(q, panel, rows, n0, columns, sums, totals);
      }
    }
  }
  _tile_release();
}

void run(const Qmm& q, const char* prepared, int begin, int end) {
  (q.bits == 2 ? run_bits<2> : q.bits == 4 ? run_bits<4> : run_bits<8>)(q, prepared, begin, end);
  _mm256_zeroupper();
}

bool serves(const Qmm& q) { return q.transpose && q.M >= q8_from_rows; }
int unit(const Qmm&) { return panel_columns; }

constexpr Kernel kernels[] = {{"amx_int8:q8", serves, unit, row_bytes, prepare, run, true}};

bool runs_here() {
  static const bool here = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           tiles_here(cpuid_amx_int8);
  return here;
}

}  // namespace

extern const Family amx_int8_family;
const Family amx_int8_family{"amx_int8", runs_here, kernels, 1};

}  // namespace mlxq
