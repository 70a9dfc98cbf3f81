"""Records each signal that it gets, and continues. `recorder.py NAME [family]`

`$RECORDS/NAME`: a line for each signal, with seconds since the epoch. `$RECORDS/NAME.alive` is touched as long as the
process lives, so that its age tells when SIGKILL came. With `family` it has two children that do the same: one in its
process group, and one in a session of its own.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

WANTED = {getattr(signal, f"SIG{name}") for name in ("TERM", "CONT", "USR1", "USR2", "INT", "HUP", "TSTP")}

# First of all, and inherited by the children: none of them is to die of a signal that it should record.
signal.pthread_sigmask(signal.SIG_BLOCK, WANTED)
name = sys.argv[1]
records = Path(os.environ["RECORDS"])
try:
    os.nice(
        -10
    )  # two signals of the same number, 20 ms apart, are one to a process that had no turn in between
except OSError:
    pass
if "family" in sys.argv:
    for own_session in (False, True):
        child = f"{name}-{'session' if own_session else 'child'}"
        subprocess.Popen([sys.executable, __file__, child], start_new_session=own_session)


def live():
    while True:
        (records / f"{name}.alive").touch()
        time.sleep(0.05)


with (records / name).open("a", buffering=1) as record:
    record.write(f"{time.time():.3f} pid {os.getpid()}\n")
    threading.Thread(target=live).start()
    while True:
        # Not `sigtimedwait`: stopped for longer than its timeout, it returns one that was never sent (CPython 3.11).
        got = signal.sigwaitinfo(WANTED)
        record.write(f"{time.time():.3f} {signal.Signals(got.si_signo).name[3:]}\n")
