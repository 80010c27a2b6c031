"""Hooks: tells commands and URLs of the operator's choice about events of the timeline."""
