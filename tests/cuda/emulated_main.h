// The entry that Python calls: every cluster of the grid, one after the other.
#include <malloc.h>
struct Release {  // stacks and shared memory: a test process has a hundred such libraries
  ~Release() { std::vector<emu::Fiber>().swap(emu::fibers); std::vector<emu::Block>().swap(emu::blocks); malloc_trim(0); }
};
#ifdef PIECE
constexpr int NUMBERS = 7;
#else
constexpr int NUMBERS = 4;
#endif
static const void* arg[8]; static int number[NUMBERS];
static void entry() {
#if defined X_STAGES && defined PER_ROW
  const auto* maps = reinterpret_cast<const TensorMap* const*>(arg);
  q8_stream(*maps[0], *maps[1], *maps[2], *maps[3], (const float*)arg[4], (const char*)arg[5], (char*)arg[6], number[0], number[1], number[2]);
#elif defined X_STAGES
  const auto* maps = reinterpret_cast<const TensorMap* const*>(arg);
  qmm_stream(*maps[0], *maps[1], *maps[2], *maps[3], (char*)arg[4], number[0], number[1], number[2], (const uint4*)arg[5], (const int*)arg[6]);
#elif defined PIECE
  by_expert((const Piece*)arg[0], (const int*)arg[1], (const int*)arg[2], (Piece*)arg[3], (uint4*)arg[4], (int*)arg[5], number[0], number[1],
            number[2], number[3], number[4], number[5], number[6]);
#elif defined PER_ROW
  q8mm((const char*)arg[0], (const float*)arg[1], (const char*)arg[2], (const char*)arg[3], (const char*)arg[4], (char*)arg[5], number[0],
       number[1], number[2]);
#else
  qmm((const char*)arg[0], (const char*)arg[1], (const char*)arg[2], (const char*)arg[3], (char*)arg[4], number[0], number[1], number[2],
      (const uint4*)arg[5], (const int*)arg[6]);
#endif
  emu::now->done = true;
  swapcontext(&emu::now->context, &emu::home);
}
extern "C" void run(int gx, int gy, int gz, int shared_bytes, int late, int seed, const void** pointers, const int* numbers) {
  Release release;
  auto product = [=] {
  emu::grid = {unsigned(gx), unsigned(gy), unsigned(gz)}; emu::late = late; emu::random_.seed(seed);
  for (int z = 0; z < gz; z++) for (int y = 0; y < gy; y++) {
    emu::blocks.clear(); emu::blocks.resize(gx); emu::cluster = {};
    for (auto& b : emu::blocks) { b.memory.assign(shared_bytes + 1024, char(0xff)); }
    emu::fibers.clear(); emu::fibers.resize(THREADS * gx);
    for (int i = 0; i < THREADS * gx; i++) {
      auto& f = emu::fibers[i];
      f.stack.resize(1 << 16); f.thread = {unsigned(i % THREADS), 0, 0}; f.rank = i / THREADS; f.block = {unsigned(i / THREADS), unsigned(y), unsigned(z)};
      getcontext(&f.context); f.context.uc_stack.ss_sp = f.stack.data(); f.context.uc_stack.ss_size = f.stack.size(); f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
    std::vector<int> ready(THREADS * gx); for (int i = 0; i < THREADS * gx; i++) ready[i] = i;
    while (!ready.empty()) {
      std::shuffle(ready.begin(), ready.end(), emu::random_);
      for (int i : ready) { emu::now = &emu::fibers[i]; swapcontext(&emu::home, &emu::now->context); }
      std::erase_if(ready, [](int i) { return emu::fibers[i].done; });
    }
  }
  };
  for (int i = 0; i < 8; i++) arg[i] = pointers[i];
  for (int i = 0; i < NUMBERS; i++) number[i] = numbers[i];
#if defined X_STAGES && defined PARTS && PARTS > 1
  emu::before = product;  // add_parts begins first, and must wait
  emu::Fiber one;
  emu::now = &one;
  for (unsigned i = 0; i < unsigned(number[3] + 255) / 256 * 256; i++) {
    one.block = {i / 256, 0, 0}, one.thread = {i % 256, 0, 0};
    add_parts((const float4*)arg[4], (uint2*)arg[7], number[3]);
  }
#else
  product();
#endif
}
