"""Carries a decision out: relay, redirect, split, gather."""
