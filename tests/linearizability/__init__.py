"""Linearizability of single keys: `recorder` makes histories, `checker` judges them, `campaign` moves the slots."""
