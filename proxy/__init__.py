"""Does. Network I/O on Trio, in the order in which a request travels."""
