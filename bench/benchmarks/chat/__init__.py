"""`sagellm bench chat`: multi-turn conversations with the KV stack on and off."""
