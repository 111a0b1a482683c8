"""Does the engine run on this machine's GPU, right and fast? `python -m bench.gpu_check`, see `__main__`."""
