"""Backends: one module each, with NAME, why_not, kernel, forward and backward (dispatch.Backend)."""
