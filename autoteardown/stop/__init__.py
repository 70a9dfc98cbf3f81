"""One stop, from the signal to the exit."""
