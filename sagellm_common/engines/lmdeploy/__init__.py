"""LMDeploy 0.11.0 as the engine."""

import os

# LMDeploy's own check starts a process to look for CUDA, and exits; `device.resolve` has checked what it checks. The
# variable is read when LMDeploy is first imported.
os.environ["LMDEPLOY_ENABLE_CHECK_ENV"] = "0"
