// Pairs of a block of x and an expert in the order of their experts, for products of many rows: a counting sort that every block
// does anew, so that each knows the places of its pairs without another kernel or a wait.
//
//   x       16-bit (blocks_of_x, M, K)   lhs, rhs  i32 (pairs): pair i is x[lhs[i]] and expert rhs[i]
//   sorted  16-bit (pairs * M, K)        rows of x, those of one expert beside each other, its pairs as they came
//   rows    i32    (pairs * M)           of y = (pairs, M, ..): where the product of a sorted row belongs
//   tiles   4 i32  (most_tiles)          {expert, first sorted row, rows, tiles in all} of each tile_rows sorted rows of one
//                                        expert, in the order of experts; no rows in those that are too many
//
// An index out of range, below or above, stands for the last.
//
//   count   warp w has the w-th part of the pairs and counts those of each expert: counts [expert][warp]; in a warp lanes with one
//           expert find each other (match), so nothing depends on who comes first
//   add up  over warps, then over experts: where the pairs of each expert and warp begin
//   place   once more over the pairs, and only by warps that have pairs of this block
//   copy    block b has the b-th part of the rows: PIECE bytes a thread, all threads over all of them
//
// Threads: 1024, as many as there may be experts. Limit: the latency of each step, some 2 us; for many rows the bytes of x.

#define F16 2
#include "halves.cuh"
#include "copies.cuh"

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int WARPS = 32, COLUMN = WARPS + 1;  // of an expert in counts: neither all lanes' experts nor all warps in one bank
constexpr u32 ALL = 0xffffffffu;
#if PIECE == 16
typedef uint4 Piece;
#else
typedef u16 Piece;
#endif

__device__ __forceinline__ int up_to_here(int value, int lane) {  // the sum over this lane and those before
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(ALL, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

extern "C" __global__ void __launch_bounds__(1024, 1)
by_expert(const Piece* x, const int* lhs, const int* rhs, Piece* __restrict__ sorted,
          uint4* __restrict__ tiles, int* __restrict__ rows, int pairs, int M, int blocks_of_x, int experts, int tile_rows,
          int most_tiles, int pieces) {
  SHARED_MEMORY(shared);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int each = (pairs * M + int(gridDim.y) - 1) / int(gridDim.y);  // rows of a block
  const int own = min(int(blockIdx.y) * each, pairs * M), own_end = min(own + each, pairs * M);
  const int first_pair = own / M, last_pair = (own_end + M - 1) / M;
  const int share = (pairs + 1023) / 1024 * 32, begin = warp * share, end = min(begin + share, pairs);
  int* const counts = reinterpret_cast<int*>(shared);
  int* const totals = counts + experts * COLUMN;                   // of an expert, then where it begins
  int* const of_warps = totals + experts;                          // [2][WARPS]
  int* const places = of_warps + 2 * WARPS;                        // of the block's pairs
  predecessor_done();
  dependents_may_start();
  for (int i = tid; i < experts * COLUMN; i += 1024) counts[i] = 0;
  __syncthreads();

  auto expert_of = [&](int pair) { return pair < end ? min(u32(rhs[pair]), u32(experts - 1)) : ALL; };
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const u32 expert = expert_of(first + lane), same = __match_any_sync(ALL, expert);
    if (expert != ALL && lane == __ffs(same) - 1) counts[expert * COLUMN + warp] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
#pragma unroll 1
  for (int e = warp; e < experts; e += WARPS) {
    const int mine = counts[e * COLUMN + lane], sum = up_to_here(mine, lane);
    counts[e * COLUMN + lane] = sum - mine;
    if (lane == 31) totals[e] = sum;
  }
  __syncthreads();
  const int found = tid < experts ? totals[tid] : 0, needed = (found * M + tile_rows - 1) / tile_rows;
  const int pairs_here = up_to_here(found, lane), tiles_here = up_to_here(needed, lane);
  if (lane == 31) of_warps[warp] = pairs_here, of_warps[WARPS + warp] = tiles_here;
  __syncthreads();
  const int pairs_in_all = up_to_here(of_warps[lane], lane), tiles_to = up_to_here(of_warps[WARPS + lane], lane);
  const int pairs_before = __shfl_sync(ALL, pairs_in_all, warp) - __shfl_sync(ALL, pairs_here, 31) + pairs_here - found;
  const int tiles_before = __shfl_sync(ALL, tiles_to, warp) - __shfl_sync(ALL, tiles_here, 31) + tiles_here - needed;
  const int tiles_in_all = __shfl_sync(ALL, tiles_to, 31);
  if (tid < experts) totals[tid] = pairs_before;
  __syncthreads();

  if (blockIdx.y == 0) {
#pragma unroll 1
    for (int i = 0; i < needed; i++)
      tiles[tiles_before + i] =
          make_uint4(tid, pairs_before * M + i * tile_rows, min(tile_rows, found * M - i * tile_rows), tiles_in_all);
    for (int i = tiles_in_all + tid; i < most_tiles; i += 1024) tiles[i] = make_uint4(0, 0, 0, tiles_in_all);
  }
  if (end > first_pair)
#pragma unroll 1
    for (int first = begin; first < min(end, last_pair); first += 32) {
      const int pair = first + lane;
      const u32 expert = expert_of(pair), same = __match_any_sync(ALL, expert);
      const int before = expert != ALL ? counts[expert * COLUMN + warp] : 0;
      if (pair >= first_pair && pair < last_pair && expert != ALL)
        places[pair - first_pair] = totals[expert] + before + __popc(same & ((1u << lane) - 1));
      __syncwarp();
      if (expert != ALL && lane == __ffs(same) - 1) counts[expert * COLUMN + warp] = before + __popc(same);
      __syncwarp();
    }
  __syncthreads();

  for (int row = own + tid; row < own_end; row += 1024) rows[places[row / M - first_pair] * M + row % M] = row;
  const long long all = static_cast<long long>(own_end - own) * pieces;
#pragma unroll 4
  for (long long i = tid; i < all; i += 1024) {
    const int row = own + int(i / pieces), piece = int(i % pieces), pair = row / M;
    const size_t from = size_t(min(u32(lhs[pair]), u32(blocks_of_x - 1))) * M + row % M;
    const size_t to = size_t(places[pair - first_pair]) * M + row % M;
    sorted[to * pieces + piece] = x[from * pieces + piece];
  }
}
