"""Decides which replica gets a request, and when: the router, prefixes of prompts, and the cost model of loading KV."""
