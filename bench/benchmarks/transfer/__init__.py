"""How fast KV moves between two processes, over every byte path: `sagellm bench transfer`."""
