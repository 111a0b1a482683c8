"""Arithmetic for LMDeploy on a CPU, compiled at set-up.

| file | what |
|---|---|
| `ops.py` | the contract: paged attention, quantised linear layers, a whole decoder |
| `native.py` | it in C++ (`csrc/`), for AVX-512 with VNNI or AVX2, through ctypes |
| `reference.py` | it in plain torch: the oracle of the tests, and the fallback |
| `build.py` | compiles `csrc/`: `python -m sagellm_common.engines.lmdeploy.kernels.build` |
| `prefix_aware_attention.py` | the attention of LMDeploy's layers, over cached prefix and new tokens alike |
| `model.py` | Llama and Qwen2 for LMDeploy with `engine.weights` int8 or int8x2 |
| `direct.py` | their decode steps without LMDeploy's model agent, for greedy sequences |
"""
