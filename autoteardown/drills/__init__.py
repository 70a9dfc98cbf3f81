"""Fire drills: start a real training job, evict it as a platform would, and watch its ranks until they have exited.

Only the `drill` command imports this. The modules that run in the job itself (`torchrun.py`, `training.py`,
`handwritten.py`) import no other module of this folder.
"""
