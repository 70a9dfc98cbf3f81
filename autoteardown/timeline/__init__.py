"""The reports of a job, read and drawn: what `autoteardown timeline` and the pages of `drill` are made of."""
