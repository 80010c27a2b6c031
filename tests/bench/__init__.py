"""Benchmarks: programs that measure and print. None of them is a test, and no test depends on a duration."""
