"""Backends: a module or an object each, with what dispatch.Backend lists."""
