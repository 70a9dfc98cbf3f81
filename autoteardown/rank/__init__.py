"""What an armed rank has: hooks on torch, its guard, its loop thread, the gate of its threads."""
