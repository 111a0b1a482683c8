"""`sagellm plan`: how many prefill and decode workers a trace needs, and what they cost."""
