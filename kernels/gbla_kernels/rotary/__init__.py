"""Rotary position embedding of queries and keys; its backward is the same kernel, turning the other way."""
