// A few worker threads that outlive the calls: starting a thread costs as much as a small layer's whole product.
#pragma once

#include <functional>

namespace bitquilt {

// Calls work(index) for index 0..count-1 on up to `threads` threads, the caller among them; returns when all are done.
// Pieces are handed out one by one: a thread that starts late or is interrupted holds up one piece, not its share.
// If another thread is using the workers, the caller does everything itself: no more than `threads` run at once.
// `work` must not throw.
void parallel_for(int count, int threads, const std::function<void(int)>& work);

}  // namespace bitquilt
