"""Runnable entry points: parse, make a config, call the library once. Each is also ``python -m gbla_apps.<name>``."""
