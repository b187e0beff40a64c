#include "pool.h"

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace bitquilt {
namespace {

// One round of work. Shared with the workers, so that one that wakes after the end finds nothing left to do.
struct Round {
    const std::function<void(int)>* work;
    int count;
    std::atomic<int> next{0};
    int unfinished;  // pieces; guarded by the pool's lock
};

class Pool {
  public:
    explicit Pool(pid_t owner) : owner_(owner) {}

    pid_t owner() const { return owner_; }

    void run(int count, int threads, const std::function<void(int)>& work) {
        std::unique_lock<std::mutex> user(user_, std::try_to_lock);
        if (threads < 2 || count < 2 || !user.owns_lock()) {
            for (int i = 0; i < count; ++i) work(i);
            return;
        }
        auto round = std::make_shared<Round>();
        round->work = &work;
        round->count = round->unfinished = count;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow((threads < count ? threads : count) - 1);
            round_ = round;
            places_ = (threads < count ? threads : count) - 1;
        }
        wake_.notify_all();
        work_on(*round);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return round->unfinished == 0; });
        round_ = nullptr;
        places_ = 0;
    }

  private:
    void work_on(Round& round) {
        int finished = 0;
        for (int i = round.next++; i < round.count; i = round.next++, ++finished) (*round.work)(i);
        if (finished == 0) return;
        std::lock_guard<std::mutex> lock(mutex_);
        round.unfinished -= finished;
        if (round.unfinished == 0) done_.notify_all();
    }

    void loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return places_ > 0; });
            --places_;
            const std::shared_ptr<Round> round = round_;
            lock.unlock();
            work_on(*round);
            lock.lock();
        }
    }

    // Where the system allows no further thread, the work is done by those there are.
    void grow(int workers) {
        try {
            for (; workers_ < workers; ++workers_) std::thread([this] { loop(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    const pid_t owner_;
    std::mutex user_, mutex_;
    std::condition_variable wake_, done_;
    std::shared_ptr<Round> round_;
    int places_ = 0, workers_ = 0;
};

std::atomic<Pool*> current{nullptr};

// The pool is never destroyed: its threads may outlive main. After a fork the child has none of them: a new pool.
Pool& pool() {
    Pool* seen = current.load();
    const pid_t here = getpid();
    while (!seen || seen->owner() != here) {
        auto fresh = std::make_unique<Pool>(here);
        if (current.compare_exchange_strong(seen, fresh.get())) return *fresh.release();
    }
    return *seen;
}

}  // namespace

void parallel_for(int count, int threads, const std::function<void(int)>& work) { pool().run(count, threads, work); }

}  // namespace bitquilt
