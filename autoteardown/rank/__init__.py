"""What an armed rank has: hooks on torch, its guard, its listener, the gate of its threads."""
