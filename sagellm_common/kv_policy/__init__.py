"""Which KV to keep, where, and for how long. Pure: no I/O, no clock, no chance."""
