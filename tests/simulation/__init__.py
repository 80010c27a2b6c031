"""The proxy in front of a cluster in memory, on a virtual clock: one seed, one history."""
