"""One armed rank: hooks on torch, when the rank is armed and disarmed, and what makes it stop."""
