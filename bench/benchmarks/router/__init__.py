"""What a router costs and adds: CPU per request and per token, latency, beside sglang-router and a bare proxy."""
