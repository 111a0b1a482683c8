// A team of threads for one call at a time. They sleep between calls: a spinning pool would take the cores from the
// other workers of this machine.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace sage {

// Where the threads of one call meet.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    if (threads_ == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 4000) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> phase_{0};
};

class Team {
 public:
  // Runs work(0) … work(threads - 1), the first on the calling thread, and returns when all have returned.
  static void run(int threads, const std::function<void(int)>& work) {
    if (threads <= 1) {
      work(0);
    } else {
      instance().run_all(threads, work);
    }
  }

 private:
  static Team& instance() {
    static Team* team = new Team;  // never destroyed: its threads live as long as the process
    return *team;
  }

  void run_all(int threads, const std::function<void(int)>& work) {
    std::lock_guard<std::mutex> one_call(calls_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < threads - 1; ++started_) std::thread(&Team::serve, this, started_ + 1).detach();
      work_ = &work;
      wanted_ = threads;
      left_ = threads - 1;
      ++call_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
  }

  void serve(int index) {
    long seen = 0;
    for (;;) {
      const std::function<void(int)>* work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return call_ != seen && index < wanted_; });
        seen = call_;
        work = work_;
      }
      (*work)(index);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex calls_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* work_ = nullptr;
  int started_ = 0, wanted_ = 0, left_ = 0;
  long call_ = 0;
};

}  // namespace sage
