"""Tests of ``proxy.replicas``."""
