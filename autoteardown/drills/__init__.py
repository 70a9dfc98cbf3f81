"""Fire drills: a real training job is started, evicted as a platform would do it, and looked at until it is gone.

Only the `drill` command imports this. What runs in the job itself (`torchrun.py`, `training.py`, `handwritten.py`)
imports nothing else of it.
"""
