// The entry that Python calls: every block of the grid, one after the other.
static const char* x_of; static TensorMap maps[3]; static u16* y_of; static int sizes_of[3];
static void entry() {
  qmv_stream(x_of, maps[0], maps[1], maps[2], y_of, sizes_of[0], sizes_of[1], sizes_of[2]);
  emu::now->done = emu::moved = true;
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
  std::copy(sizes, sizes + 3, sizes_of);
  for (int i = 0; i < 3; i++, tensors += 10) {
    maps[i].pointer = static_cast<char*>(pointers[1 + i]), maps[i].rank = tensors[0], maps[i].swizzle = tensors[9];
    std::copy(tensors + 1, tensors + 4, maps[i].sizes), std::copy(tensors + 4, tensors + 6, maps[i].strides);
    std::copy(tensors + 6, tensors + 9, maps[i].box);
    if (maps[i].swizzle != 128 || maps[i].box[0] != 128) return "swizzled within 128 bytes";
  }
  for (int number = 0; number < blocks; number++) {
    emu::block = {unsigned(number), 0, 0};
    emu::shared.assign(shared_bytes + 1024, char(0xff));
    for (auto& w : emu::warps) w = {};
    emu::all = emu::named = {}, emu::barriers.clear(), emu::copies.clear();
    emu::fibers.clear(), emu::fibers.resize(emu::THREADS);
    for (int i = 0; i < emu::THREADS; i++) {
      auto& f = emu::fibers[i];
      f.stack.resize(1 << 16), f.thread = {unsigned(i), 0, 0}, f.turn = 0, f.done = false;
      getcontext(&f.context), f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr, makecontext(&f.context, entry, 0);
    }
    std::vector<int> ready(WARPS + 1), lanes(32);
    for (int i = 0; i <= WARPS; i++) ready[i] = i;
    for (int i = 0; i < 32; i++) lanes[i] = i;
    const int slow = order ? int(emu::random_() % (WARPS + 1)) : -1;  // runs only when no other warp can
    for (int idle = 0; !ready.empty(); idle = emu::moved ? 0 : idle + 1) {
      emu::moved = false;
      std::shuffle(ready.begin(), ready.end(), emu::random_), std::shuffle(lanes.begin(), lanes.end(), emu::random_);
      for (int w : ready) {
        if (w == slow && idle < 2 && ready.size() > 1) continue;
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
        std::swap(emu::copies[emu::random_() % emu::copies.size()], emu::copies.back());
        auto copy = emu::copies.back();
        emu::copies.pop_back(), emu::now = nullptr, idle = 0;
        try { copy(); } catch (const char* what) { return what; }
      }
      if (idle > 100) return "deadlock";
    }
    if (!emu::copies.empty()) return "a copy was under way when the block ended";
  }  return nullptr;
}
