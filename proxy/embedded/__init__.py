"""Real clusters on this machine, for the demo, the tests and first steps: found, run, resharded, stopped."""
