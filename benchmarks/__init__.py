"""Measurements of time and memory: prefill, decode, end to end, memory, loading. Run with `python -m benchmarks.NAME`.

What is measured is the package `llava`. Tests check counts here, never times.
"""
