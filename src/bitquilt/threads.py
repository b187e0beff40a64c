"""`one_thread` keeps loops over small matrices on the calling thread; `sleep_at_barriers` bounds how long idle threads
spin.

After every product the threads of BLAS and OpenMP wait for the slowest one, and they spin while they wait. Where
another process is busy, one of them is not running, and the others burn whole time slices. Processor seconds on two
cores with a load of 7: the fits of one law 7.7, on one thread 1.3; the graph network of `mg-ptq` on 1024 columns 14.4,
on one thread 0.6.
"""

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

# Waits of some 100 us, as in the threads of csrc/pool.cpp: the next product usually comes sooner. libgomp's own default
# is a hundred times as long. `gptq` on the demo model, two threads, the same two cores: 27.1 processor seconds (68 s of
# time) by default, 4.4 (12.6) with this, 4.0 (12.4) when threads sleep at once.
_SPINS = "2000"
_CHOSEN_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread in the BLAS of numpy and scipy, and in torch where it is imported; also a decorator.

    BLAS is limited in the whole process, torch for the calling thread; both come back as they were. Entering takes some
    4 ms: put it around a loop, not into one.
    """
    from threadpoolctl import threadpool_limits

    torch: Any = sys.modules.get("torch")
    before = 1 if torch is None else torch.get_num_threads()
    with threadpool_limits(limits=1, user_api="blas"):
        if before > 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if before > 1:
                torch.set_num_threads(before)


def sleep_at_barriers(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound the spinning of torch's threads, unless the user chose a policy. Works only before torch is imported."""
    if not any(name in environment for name in _CHOSEN_BY):
        environment["GOMP_SPINCOUNT"] = _SPINS
