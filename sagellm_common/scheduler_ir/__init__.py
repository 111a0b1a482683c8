"""The scheduling IR: a request and a placement become an ExecutionPlan. Pure: no I/O, no clock, no chance."""
