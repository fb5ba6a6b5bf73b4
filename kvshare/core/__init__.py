"""Basics that every other package may import: policy ids, versions, LMCache settings, ports, errors."""
