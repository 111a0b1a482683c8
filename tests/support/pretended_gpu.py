"""A GPU for triton and LMDeploy where there is none: a driver that names its target, and torch.cuda that names its
capability. For processes of their own: none of it is taken back.
"""

from __future__ import annotations

import types
from typing import Any

import torch


def pretend_gpu(target: tuple[str, int, int], capability: tuple[int, int], processors: int) -> None:
    """`target`: backend, architecture and warp size, as triton's GPUTarget wants them; ("cpu", 0, 0) to interpret."""
    import triton
    from triton.backends.compiler import GPUTarget

    limits = {
        "max_shared_mem": 232_448,
        "multiprocessor_count": processors,
        "max_num_regs": 65_536,
        "warpSize": 32,
    }
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            utils=types.SimpleNamespace(get_device_properties=lambda _: limits),
            get_current_target=lambda: GPUTarget(*target),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_device_capability=lambda device=0: capability,
            get_active_torch_device=lambda: torch.device("cpu"),
            map_python_to_cpp_type=lambda name: name,
        )
    )
    major, minor = capability
    properties = types.SimpleNamespace(major=major, minor=minor, multi_processor_count=processors, name="pretended")
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.current_device = lambda: 0


def alias_libdevice(*modules: Any) -> None:
    """The interpreter has none of CUDA's libdevice, and replaces triton.language's own functions at each run."""
    import triton.language as tl

    for module in modules:
        module.fast_dividef = lambda a, b: a / b
        module.tl_log2, module.tl_exp2 = lambda x: tl.log2(x), lambda x: tl.exp2(x)
