"""Snapshots: opened, preserved for, judged, closed and swept. docs/decisions/0009-snapshots.md is the protocol."""
