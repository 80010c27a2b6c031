"""Discovers the cluster and keeps the current view."""
