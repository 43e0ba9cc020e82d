// The kernels on odd shapes, for sanitizers to watch: see sanitize.sh. Prints what is wrong, if
// anything is, and returns 1 then.

#include <stdio.h>

#include <thread>
#include <vector>

#include "instruction_sets.h"
#include "self_test.h"
#include "workers.h"

namespace {

class ThreadScheduler final : public lissom::Scheduler {
 public:
  void schedule(void (*work)()) override { threads_.emplace_back(work); }
  ~ThreadScheduler() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::vector<std::thread> threads_;
};

// Every part runs once, whoever runs it.
bool sharing_works() {
  ThreadScheduler scheduler;
  lissom::Workers workers(&scheduler, 3);
  for (int64_t parts = 1; parts < 4000; parts += 97) {
    std::vector<int> runs(parts);
    workers.run(parts, [&](int64_t i) { ++runs[i]; });
    for (const int n : runs) if (n != 1) return false;
  }
  return true;
}

int wrong_products() {
  int failures = 0;
  for (int i = 0; i < lissom::instruction_set_count(); ++i) {
    const lissom::Kernels& kernels = *lissom::instruction_sets()[i];
    if (!kernels.supported()) {
      printf("%s: not on this machine\n", kernels.name);
      continue;
    }
    for (const int64_t rows : {1, 2, 3, 7, 8, 17, 65})
      for (const lissom::Shape shape : {lissom::Shape{rows, 1, 1, 1}, {rows, 70, 33, 1},
                                        {rows, 192, 64, 2}, {rows, 96, 31, 6}, {rows, 258, 100, 1}})
        if (const char* wrong = self_test(kernels, shape)) {
          printf("%s: %s is wrong, %d rows, %d inputs\n", kernels.name, wrong,
                 static_cast<int>(rows), static_cast<int>(shape.inputs));
          ++failures;
        }
    for (const lissom::AttentionShape shape :
         {lissom::AttentionShape{1, 1, 5, 1, 1, 1}, {3, 1, 70, 9, 3, 64}, {1, 8, 33, 5, 1, 21},
          {2, 2, 1100, 4, 4, 16},
          {2, 70, 290, 6, 2, 37}})
      if (const char* wrong = attention_test(kernels, shape)) {
        printf("%s: %s is wrong, %d keys\n", kernels.name, wrong, static_cast<int>(shape.keys));
        ++failures;
      }
    printf("%s: done\n", kernels.name);
  }
  return failures;
}

}  // namespace

int main() {
  int failures = wrong_products();
  if (!sharing_works()) {
    printf("a part ran twice or never\n");
    ++failures;
  }
  return failures != 0;
}
