"""Attention backends that verify token trees over vLLM's paged cache."""
