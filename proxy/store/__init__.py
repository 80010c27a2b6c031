"""The topology store: the durable record of where data is and where it is going."""
