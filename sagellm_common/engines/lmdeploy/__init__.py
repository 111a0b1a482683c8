"""LMDeploy 0.11.0 as the engine."""
