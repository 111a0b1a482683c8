"""LMDeploy 0.11.0's PyTorch engine on a plain CPU.

LMDeploy knows no device type `cpu` and has no registry for one. What a plug-in can do without touching its source is
done here by subclassing; a few module globals of LMDeploy are then pointed at the subclasses (`install`). Nothing
outside LMDeploy's modules sees the change.
"""

from sagellm_common.engines.lmdeploy.device_cpu.install import CpuEngineConfig, install

__all__ = ["CpuEngineConfig", "install"]
