"""Measures models and kernels on this machine."""
