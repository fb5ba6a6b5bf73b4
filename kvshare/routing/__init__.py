"""Which replica gets a request, and when: the router, prefixes of prompts, and what loading KV costs."""
