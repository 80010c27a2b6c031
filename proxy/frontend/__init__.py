"""Client connections: bytes in, replies out, and what a standalone server would answer."""
