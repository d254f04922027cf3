// Workers spin for a moment after a job, since a decoder step is a chain of jobs some tens of microseconds apart, then
// sleep. Tasks are claimed one by one from an atomic counter: a worker that wakes late, or that the system has taken
// off its core, costs the caller nothing but the task it already holds.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

namespace mlxq {
namespace {

constexpr auto spin_time = std::chrono::microseconds(60);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int allowed_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return std::max(1, CPU_COUNT(&set));
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
 public:
  explicit Pool(int threads) : owner_(getpid()) {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this] { work(); });
    }
  }

  // False when the pool is busy or belongs to the parent of a fork, whose threads do not exist here.
  bool run(int count, const std::function<void(int)>& task) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || owner_ != getpid()) {
      return false;
    }
    task_ = &task;
    count_ = count;
    done_.store(0, std::memory_order_relaxed);
    // The counter carries the generation in its high half, so that a worker late for the last job cannot claim from
    // this one with the last job's task.
    uint64_t tag = (generation_.load(std::memory_order_relaxed) + 1) << 32;
    next_.store(tag, std::memory_order_release);
    generation_.store(tag >> 32, std::memory_order_release);
    generation_.notify_all();
    claim(tag >> 32);
    while (done_.load(std::memory_order_acquire) != count) {
      relax();
    }
    return true;
  }

 private:
  void claim(uint64_t generation) {
    uint64_t seen = next_.load(std::memory_order_acquire);
    while ((seen >> 32) == generation && static_cast<int>(seen & 0xffffffff) < count_.load(std::memory_order_relaxed)) {
      if (next_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        (*task_.load(std::memory_order_relaxed))(static_cast<int>(seen & 0xffffffff));
        done_.fetch_add(1, std::memory_order_acq_rel);
        seen = next_.load(std::memory_order_acquire);
      }
    }
  }

  void work() {
    uint64_t last = 0;
    while (true) {
      auto deadline = std::chrono::steady_clock::now() + spin_time;
      uint64_t now;
      int round = 0;
      while ((now = generation_.load(std::memory_order_acquire)) == last) {
        relax();
        if (++round % 64 == 0 && std::chrono::steady_clock::now() > deadline) {
          generation_.wait(last, std::memory_order_acquire);
        }
      }
      last = now;
      claim(now);
    }
  }

  std::mutex mutex_;
  std::vector<std::thread> workers_;
  pid_t owner_;
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<uint64_t> next_{0};
  alignas(64) std::atomic<int> done_{0};
  std::atomic<int> count_{0};
  std::atomic<const std::function<void(int)>*> task_{nullptr};
};

}  // namespace

int pool_threads() {
  static const int threads = [] {
    const char* wanted = std::getenv("MLXQ_THREADS");
    int n = wanted ? std::atoi(wanted) : allowed_cores();
    return std::clamp(n, 1, 256);
  }();
  return threads;
}

void parallel(int count, const std::function<void(int)>& task) {
  if (count > 1 && pool_threads() > 1) {
    // Never destroyed: MLX's stream threads may still run when static objects go.
    static Pool* pool = new Pool(pool_threads());
    if (pool->run(count, task)) {
      return;
    }
  }
  for (int i = 0; i < count; ++i) {
    task(i);
  }
}

}  // namespace mlxq
