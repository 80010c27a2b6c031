"""What was read at snapshots, kept so that it need not be read again. Knows neither nodes nor clients."""
