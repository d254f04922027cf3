// The entry that Python calls: every cluster of the grid, one after the other.
static const char* x_of; static TensorMap maps[3]; static u16* y_of; static int sizes_of[3]; static const void* table_of[2];
static void entry() {
  qmv_stream(x_of, maps[0], maps[1], maps[2], y_of, sizes_of[0], sizes_of[1], sizes_of[2], static_cast<const uint4*>(table_of[0]),
             static_cast<const int*>(table_of[1]));
  emu::now->done = emu::moved = true;
  emu::block().running--, emu::check_cluster();
  swapcontext(&emu::now->context, &emu::home);
}
#include <malloc.h>
struct Release {  // stacks: a test process has many such libraries
  ~Release() { std::vector<emu::Fiber>().swap(emu::fibers), malloc_trim(0); }
};
// tensors: of each rank, sizes[3], strides[2], box[3], swizzle
// returns what went wrong, or null
extern "C" const char* run(int blocks, int shared_bytes, int order, int seed, void** pointers, const int* tensors, const int* sizes) {
  Release release;
  emu::failed = nullptr, emu::now = nullptr, emu::grid = {unsigned(blocks), 1, 1}, emu::order = order, emu::random_.seed(seed);
  x_of = static_cast<char*>(pointers[0]), y_of = static_cast<u16*>(pointers[4]);
  std::copy(pointers + 5, pointers + 7, table_of);
  std::copy(sizes, sizes + 3, sizes_of);
  for (int i = 0; i < 3; i++, tensors += 10) {
    maps[i].pointer = static_cast<char*>(pointers[1 + i]), maps[i].rank = tensors[0], maps[i].swizzle = tensors[9];
    std::copy(tensors + 1, tensors + 4, maps[i].sizes), std::copy(tensors + 4, tensors + 6, maps[i].strides);
    std::copy(tensors + 6, tensors + 9, maps[i].box);
    if (maps[i].swizzle != 128 || maps[i].box[0] != 128) return "swizzled within 128 bytes";
  }
  for (int number = 0; number < blocks; number += RANKS) {
    emu::blocks.clear(), emu::blocks.resize(RANKS), emu::copies.clear(), emu::phase = 0;
    for (auto& b : emu::blocks) b.shared.assign(shared_bytes + 1024, char(0xff));
    emu::fibers.clear(), emu::fibers.resize(RANKS * emu::THREADS);
    for (int i = 0; i < RANKS * emu::THREADS; i++) {
      auto& f = emu::fibers[i];
      f.rank = i / emu::THREADS, f.thread = {unsigned(i % emu::THREADS), 0, 0}, f.block = {unsigned(number + f.rank), 0, 0};
      f.stack.resize(1 << 16), f.turn = 0, f.done = f.arrived = false;
      getcontext(&f.context), f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr, makecontext(&f.context, entry, 0);
    }
    std::vector<int> ready(RANKS * emu::ALL), lanes(32);
    for (int i = 0; i < int(ready.size()); i++) ready[i] = i;
    for (int i = 0; i < 32; i++) lanes[i] = i;
    // a warp, or all of a block, runs only when no other can, perhaps not even while copies are left
    const int patience = emu::random_() % 2 ? 2 : 6;
    const int slow = order ? int(emu::random_() % ready.size()) : -1, whole = RANKS > 1 && emu::random_() % 2 ? emu::ALL : 1;
    for (int idle = 0; !ready.empty(); idle = emu::moved ? 0 : idle + 1) {
      emu::moved = false;
      std::shuffle(ready.begin(), ready.end(), emu::random_), std::shuffle(lanes.begin(), lanes.end(), emu::random_);
      for (int w : ready) {
        if (slow >= 0 && w / whole == slow / whole && idle < patience && int(ready.size()) > whole) continue;
        if (order == 2 && emu::random_() % 2) continue;
        for (int lane : lanes) {
          emu::now = &emu::fibers[w * 32 + lane];
          if (!emu::now->done) swapcontext(&emu::home, &emu::now->context);
          if (emu::failed) return emu::failed;
        }
      }
      std::erase_if(ready, [&](int w) {
        for (int lane : lanes) if (!emu::fibers[w * 32 + lane].done) return false;
        return true;
      });
      if (!emu::copies.empty() && (order == 2 ? emu::random_() % 8 == 0 : idle >= 4)) {
        emu::now = nullptr, idle = 0;
        for (size_t n = 1 + emu::copies.size() / 16; n > 0; n--) {
          std::swap(emu::copies[emu::random_() % emu::copies.size()], emu::copies.back());
          auto copy = emu::copies.back();
          emu::copies.pop_back();
          try { copy(); } catch (const char* what) { return what; }
        }
      }
      if (idle > 100) return "deadlock";
    }
    if (!emu::copies.empty()) return "a copy was under way when the block ended";
  }  return nullptr;
}
