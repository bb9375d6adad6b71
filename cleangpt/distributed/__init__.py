"""Processes, devices and parallelism."""
