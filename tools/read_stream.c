// The fastest that this machine reads memory: what no kernel at M=1 can beat. Compiled and driven by bench_qmm.py.
//
//   read_stream THREADS BYTES       two regions of BYTES, one in 4 KB pages and one that asked for huge pages
//   stdin   PAGES AHEAD SLICE COUNT DISTINCT      one measurement a line
//           COUNT slices of SLICE bytes are read, one after the other, from the first DISTINCT ones of the region PAGES
//           (0: 4 KB, 1: huge), prefetching AHEAD bytes (0: no prefetch); DISTINCT 1 reads the same slice again
//   stdout  seconds
//
// Each slice is split over the threads, which never wait for each other inside a measurement. Vectors are the widest
// that -march=native has, through the compiler's vector extension: no intrinsics, so the same file serves x86 and ARM.
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t Vector __attribute__((vector_size(64)));
enum { line = 64, unrolled = 8, huge = 2 << 20 };

typedef struct {
  const char* base;
  size_t slice, share, count, distinct, ahead;
  int index;
  double begin, end;
  uint64_t sum;
} Work;

static atomic_int ready, go;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void* reader(void* argument) {
  Work* w = argument;
  Vector acc[unrolled];
  memset(acc, 0, sizeof acc);
  atomic_fetch_add(&ready, 1);
  while (!atomic_load(&go)) {
  }
  w->begin = now();
  for (size_t i = 0; i < w->count; ++i) {
    const char* at = w->base + i % w->distinct * w->slice + w->index * w->share;
    if (w->ahead) {
      for (size_t b = 0; b < w->share; b += unrolled * line) {
        for (int j = 0; j < unrolled; ++j) {
          __builtin_prefetch(at + b + w->ahead + j * line);
          acc[j] += *(const Vector*)(at + b + j * line);
        }
      }
    } else {
      for (size_t b = 0; b < w->share; b += unrolled * line) {
        for (int j = 0; j < unrolled; ++j) {
          acc[j] += *(const Vector*)(at + b + j * line);
        }
      }
    }
  }
  w->end = now();
  for (int j = 1; j < unrolled; ++j) {
    acc[0] += acc[j];
  }
  w->sum = acc[0][0] + acc[0][7];
  return NULL;
}

static char* region(size_t bytes, int pages) {
  char* at = mmap(NULL, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) {
    perror("read_stream: mmap");
    exit(1);
  }
  at = (char*)(((uintptr_t)at + huge - 1) / huge * huge);
#ifdef MADV_HUGEPAGE
  madvise(at, bytes, pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  memset(at, 1, bytes);
  return at;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: read_stream THREADS BYTES\n");
    return 2;
  }
  int threads = atoi(argv[1]), pages;
  size_t bytes = strtoull(argv[2], NULL, 10), ahead, slice, count, distinct;
  char* regions[2] = {region(bytes, 0), region(bytes, 1)};
  Work* work = calloc(threads, sizeof *work);
  pthread_t* ids = calloc(threads, sizeof *ids);
  while (scanf("%d %zu %zu %zu %zu", &pages, &ahead, &slice, &count, &distinct) == 5) {
    // Rounded up: a share is whole runs of `unrolled` lines, and all shares start on such a boundary.
    size_t unit = (size_t)threads * unrolled * line;
    slice = (slice + unit - 1) / unit * unit;
    if (slice * distinct > bytes) {
      distinct = bytes / slice;
    }
    if (distinct == 0) {
      fprintf(stderr, "read_stream: a slice of %zu bytes does not fit in %zu\n", slice, bytes);
      return 2;
    }
    atomic_store(&ready, 0);
    atomic_store(&go, 0);
    for (int i = 0; i < threads; ++i) {
      work[i] = (Work){regions[pages != 0], slice, slice / threads, count, distinct, ahead, i, 0, 0, 0};
      pthread_create(&ids[i], NULL, reader, &work[i]);
    }
    while (atomic_load(&ready) != threads) {
    }
    atomic_store(&go, 1);
    double begin = 1e300, end = 0;
    uint64_t sum = 0;
    for (int i = 0; i < threads; ++i) {
      pthread_join(ids[i], NULL);
      begin = work[i].begin < begin ? work[i].begin : begin;
      end = work[i].end > end ? work[i].end : end;
      sum += work[i].sum;
    }
    printf("%.9f %llu\n", end - begin, (unsigned long long)sum);  // the sum keeps the reads alive
    fflush(stdout);
  }
  return 0;
}
