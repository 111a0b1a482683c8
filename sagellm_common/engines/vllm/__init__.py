"""vLLM 0.32.0 as the engine: an extra that lives in a virtual environment of its own (`make setup-vllm`).

    service ── allocate, pull, submit ──► VllmEngine ── add_request, step ──► vLLM's LLMEngine
                      │                       │                                  │ scheduler, worker
                      ▼                       ▼                                  ▼
                the pool's blocks ◄──── VllmSequence ◄────────────────── SageKVConnector
                                     which tokens' KV they hold          blocks → pages, pages → blocks

vLLM allocates its pages itself, once it schedules a sequence, and keeps them to itself. So the KV that others see is in
a pool of ours (`kv_runtime.backends.host`), in the one block format of the project: byte paths, leases, prefix cache
and events work on it as they do for LMDeploy. The connector, vLLM's public interface for this, copies between the two.
"""
