"""llama.cpp in a process of its own: `python -m benchmarks.llamacpp_step FILE THREADS PROMPT TOKENS`.

Answers every line on stdin with the seconds of one token, the median of TOKENS. Torch must not live in the same
process: both configure a thread's AMX tiles, llama.cpp only once, and after torch has released them it meets an
illegal instruction.
"""

import importlib
import sys
import time


def main() -> None:
    path, (threads, prompt, tokens) = sys.argv[1], map(int, sys.argv[2:5])
    llama_cpp = importlib.import_module("llama_cpp")
    if "--plain-buffers" in sys.argv:  # without repacked weights and AMX; the Python class has no argument for that
        default = llama_cpp.llama_model_default_params

        def plain() -> object:
            parameters = default()
            parameters.use_extra_bufts = False
            return parameters

        llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = plain
    model = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval(list(range(3, 3 + prompt)))
    for _ in sys.stdin:
        times = []
        for _ in range(tokens):
            started = time.perf_counter()
            model.eval([7])
            times.append(time.perf_counter() - started)
        print(sorted(times)[tokens // 2], flush=True)


if __name__ == "__main__":
    main()
