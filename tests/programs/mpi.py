"""As stuck.py, under mpirun: the rank comes from Open MPI's own variables, as such scripts have it."""

import os
import runpy
from pathlib import Path

os.environ["RANK"] = os.environ["OMPI_COMM_WORLD_RANK"]
os.environ["WORLD_SIZE"] = os.environ["OMPI_COMM_WORLD_SIZE"]
# In one write: several processes print here.
os.write(1, f"rank {os.environ['RANK']} pid {os.getpid()}\n".encode())
runpy.run_path(str(Path(__file__).with_name("stuck.py")), run_name="__main__")
