// A few worker threads that outlive the calls: starting a thread costs as much as a small layer's whole product.
//
// Not torch's OpenMP team: its barrier waits for every member, and where another process had the second processor a
// 1.1B model's layers took 1200 ms instead of 26 (1 thread: 26; 2 undisturbed threads: 15 here, 17 with the team).
// Between two of torch's own products the team is better: its members spin for 14 ms after each and would compete.
#pragma once

#include <cstdint>
#include <functional>

namespace bitquilt {

// Calls work(index) for index 0..count-1 on up to `threads` threads, the caller among them; returns when all are done.
// Each thread begins with its own run of neighbouring pieces and then takes pieces of the others: one that
// starts late or is interrupted holds up one piece, not its share. If another call is using the threads, the caller
// does everything itself: no more than `threads` run at once. `work` must not throw.
void parallel_for(int count, int threads, const std::function<void(int)>& work);

// The same on torch's team if its GOMP_parallel is known, for work between two of torch's products.
void parallel_for_torch(int count, int threads, const std::function<void(int)>& work);
void use_team(uintptr_t gomp_parallel);

}  // namespace bitquilt
