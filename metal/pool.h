// A small pool of threads that one operation at a time may use.
#pragma once

#include <functional>

namespace mlxq {

// How many threads a job may use, the caller included: MLXQ_THREADS, or the cores this process may run on.
int pool_threads();

// Calls task(0) ... task(count - 1), each once, on the caller and on idle workers; returns when all are done.
// A brief job (some tens of microseconds) takes the workers that are awake and wakes none: that would take longer than
// the job. When another stream holds the pool the caller does all the work itself: several streams never oversubscribe
// the cores.
void parallel(int count, bool brief, const std::function<void(int)>& task);

}  // namespace mlxq
