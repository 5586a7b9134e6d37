"""Sharding plans, and models saved to and loaded from disk by any number of ranks."""
