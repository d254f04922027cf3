// The names of copies.cuh for a CPU, after emulated.h: a copy is done at once, or when a thread would wait in vain without it.
#define __grid_constant__
struct TensorMap {  // bytes: of an element; planes: how many of a third dimension, or 0, and how far one is from the next
  uint64_t pointer, sizes[2], stride, box[2], bytes, swizzle, planes, plane, rest[6];
};
inline emu::Meeting& meeting(uint32_t to) {
  auto found = emu::block().meetings.find(to);
  if (found == emu::block().meetings.end()) { fprintf(stderr, "no mbarrier at %u\n", to); abort(); }
  return found->second;
}
inline void ended(emu::Meeting& m) {
  if (m.left < 0 || m.bytes < 0) { fprintf(stderr, "mbarrier: too many arrivals\n"); abort(); }
  if (!m.left && !m.bytes) m.phase++, m.left = m.count, emu::waits = 0;
}
inline void barrier_init(uint32_t to, int count) { at(to + 7); emu::block().meetings[to] = {count, count}; }
inline void barriers_ready() {}
#define ARRIVALS 1
inline void barrier_arrive(uint32_t to) { auto& m = meeting(to); m.left--; ended(m); }
inline void barrier_arrive_after(uint32_t value, uint32_t never, uint32_t a) { barrier_arrive(a + (value & never)); }
inline void barrier_expect(uint32_t to, int bytes) { auto& m = meeting(to); m.bytes += bytes; barrier_arrive(to); }
inline void barrier_wait(uint32_t to, int parity) {
  auto& tensors = emu::block().tensors;
  while ((meeting(to).phase & 1) == parity) {
    auto first = std::find_if(tensors.begin(), tensors.end(), [&](auto& one) { return one.first == to; });
    if (first == tensors.end()) {
      if (++emu::waits > 3000000) { fprintf(stderr, "deadlock\n"); abort(); }
      emu::yield();
    } else {
      auto copy = first->second;
      tensors.erase(first);
      copy();
    }
  }
}
inline void plane_copy(uint32_t to, const TensorMap& map, int c0, int c1, uint64_t plane, bool there, uint32_t barrier) {
  const long row = map.box[0] * map.bytes;
  if (to % 128 || c0 * map.bytes % 16 || (map.swizzle && row > long(map.swizzle)) || (map.swizzle && to % 1024)) {
    fprintf(stderr, "tensor copy to %u of %d, %d\n", to, c0, c1); abort();
  }
  auto copy = [=, block = &emu::block(), memory = emu::memory(emu::now->rank)] {
    for (long i = 0; i < long(map.box[1]); i++)
      for (long j = 0; j < row; j++) {
        const long x = c0 * long(map.bytes) + j, y = c1 + i;
        const bool inside = there && x >= 0 && y >= 0 && x < long(map.sizes[0] * map.bytes) && y < long(map.sizes[1]);
        long flat = i * row + j;
        if (map.swizzle) flat ^= (flat >> 7 & (map.swizzle / 16 - 1)) << 4;
        memory[to - BASE + flat] = inside ? reinterpret_cast<const char*>(map.pointer + plane)[y * map.stride + x] : 0;
      }
    auto& m = block->meetings[barrier];
    m.bytes -= row * map.box[1];
    ended(m);
  };
  at(to), at(to + row * map.box[1] - 1);
  if (emu::late) emu::block().tensors.emplace_back(barrier, copy);
  else copy();
}
inline void tensor_copy(uint32_t to, const TensorMap& map, int c0, int c1, uint32_t barrier) {
  if (map.planes) fprintf(stderr, "a tensor of three dimensions\n"), abort();
  plane_copy(to, map, c0, c1, 0, true, barrier);
}
inline void tensor_copy(uint32_t to, const TensorMap& map, int c0, int c1, int c2, uint32_t barrier) {
  if (!map.planes) fprintf(stderr, "a tensor of two dimensions\n"), abort();
  plane_copy(to, map, c0, c1, c2 * map.plane, uint32_t(c2) < map.planes, barrier);
}
inline void dependents_may_start() {}
namespace emu { inline std::function<void()> before; }  // a kernel that runs as late as the next one's wait allows
inline void predecessor_done() {
  if (!emu::before) return;
  const auto run = emu::before;
  emu::before = nullptr;
  auto* const waiting = emu::now;
  run();
  emu::now = waiting;
}
