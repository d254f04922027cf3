// Hopper's copy engine and the barriers that it reports to.

struct alignas(64) TensorMap {  // CUtensorMap, made by the host
  unsigned long long opaque[16];
};

__device__ __forceinline__ void barrier_init(unsigned int at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}

// After all inits, by the thread that made them and before the block's barrier.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(unsigned int at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// As one instruction: behind a branch around it qmv_stream.cu with 17 warps wrote registers to memory.
__device__ __forceinline__ void barrier_arrive_if(unsigned int at, bool valid) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(at), "r"(int(valid)) : "memory");
}

// Lanes of a warp that say it is through. One is enough, for __syncwarp has ordered the others' accesses before; racecheck
// follows a barrier only for the thread that arrived: for it, -DARRIVALS=32.
#ifndef ARRIVALS
#define ARRIVALS 1
#endif

// When this value is there: what ldmatrix has asked for may still be on its way when an arrival that follows it is seen
// (an H200 overwrote words before they were read where many warps wait). never is a zero that the compiler does not know.
__device__ __forceinline__ void barrier_arrive_after(unsigned int value, unsigned int never, unsigned int at) {
  barrier_arrive(at + (value & never));
}

__device__ __forceinline__ void barrier_expect(unsigned int at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned int at, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}"
      ::"r"(at),
      "r"(parity)
      : "memory");
}

// One lane of a warp that is here as a whole. Behind this the compiler knows that there is only one, and puts no loop around
// a copy for lanes that might have asked for another.
__device__ __forceinline__ bool elected() {
  unsigned int chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
  return chosen;
}

// Bring the description of a tensor near, which the first copy waits for otherwise.
__device__ __forceinline__ void tensor_expected(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box of a tensor to shared memory; what lies outside the tensor is zeros, and counts.
__device__ __forceinline__ void tensor_copy(unsigned int to, const TensorMap& map, int c0, int c1, unsigned int barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(&map), "r"(c0), "r"(c1), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void tensor_copy(unsigned int to, const TensorMap& map, int c0, int c1, int c2, unsigned int barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
               "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void dependents_may_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// What the kernel before writes may be read only after this, and through no pointer to const that is __restrict__: the compiler
// takes what that points to for constant and may read it before.
__device__ __forceinline__ void predecessor_done() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Between the blocks of a cluster: an address of shared memory as another rank has it; 16 bytes to there, which count at a
// barrier of that rank as a copy's do; an arrival there. None of them waits for what was written before: a fence would be one of
// the whole GPU.
__device__ __forceinline__ unsigned int at_rank(unsigned int at, int rank) {
  unsigned int there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}

__device__ __forceinline__ void remote_store(unsigned int there, float4 v, unsigned int barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void remote_arrive(unsigned int there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

// All blocks of a cluster have begun, their barriers made (barriers_ready), and all that is left of them has come to its end.
// Under racecheck a warp that waits goes on only when every warp waits, and one that first asks for copies never does: there
// all wait where they arrive, so it says nothing about where the kernels wait (the emulation of tests/cuda does).
#if ARRIVALS == 1
__device__ __forceinline__ void cluster_begun() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_ends() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#else
__device__ __forceinline__ void cluster_begun() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_ends() { cluster_begun(); }
__device__ __forceinline__ void cluster_wait() {}
#endif
