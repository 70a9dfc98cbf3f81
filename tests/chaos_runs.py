"""Runs many evictions with faults that a seed decides, several at a time. Shared by all chaos tests."""

import os
import random
import threading
from collections import Counter

from harness import AGENT, ForkServer, Job


class Eviction:
    """One job, one eviction, and what was wrong with it. A subclass says how, in `_run`.

    Its `random` decides everything; `kind` is what it is counted under, and so are the `outcomes` of its ranks.
    """

    kind = ()

    def __init__(self, seed, folder, server):
        self.random = random.Random(seed)
        self.seed = seed
        self.folder = folder
        self.wrong = []
        self.outcomes = Counter()
        self.job = Job(folder, server)

    def __str__(self):
        return f"CHAOS_SEED={self.seed}: {', '.join(self.kind)}"

    def run(self):
        """Start the job, evict, and look at what is left."""
        try:
            self._run()
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
        finally:
            self.job.close()

    def _run(self):
        raise NotImplementedError


def run_evictions(make, folder, capsys, runs):
    """As many evictions as CHAOS_RUNS says, or `runs`; none of them may go wrong.

    CHAOS_WORKERS (default 3) at a time. Each has a seed of its own, printed when it fails; CHAOS_SEED is the first.
    """
    runs = int(os.environ.get("CHAOS_RUNS", runs))
    first = int(os.environ.get("CHAOS_SEED", random.randrange(10**9)))
    seeds = iter(range(first, first + runs))
    done, failed, outcomes = Counter(), [], Counter()

    def work():
        server = ForkServer(AGENT)
        for seed in seeds:
            own = folder / str(seed)
            own.mkdir()
            eviction = make(seed, own, lambda mode: server)
            eviction.run()
            done[eviction.kind] += 1
            for outcome, ranks in eviction.outcomes.items():
                outcomes[eviction.kind[0], outcome or "no report"] += ranks
            if eviction.wrong:
                failed.append(eviction)
                with capsys.disabled():
                    print(f"\n{eviction}\n" + "\n".join(eviction.wrong), flush=True)
        server.close()

    workers = min(runs, int(os.environ.get("CHAOS_WORKERS", "3")))
    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with capsys.disabled():
        print(f"\nchaos: {sum(done.values())} evictions from seed {first}, {len(failed)} went wrong")
        for name in sorted({kind[0] for kind in done}):
            each = [
                f"{' '.join(kind[1:])} {count}" for kind, count in sorted(done.items()) if kind[0] == name
            ]
            ends = [f"{end} {ranks}" for (kind, end), ranks in sorted(outcomes.items()) if kind == name]
            print(f"  {name:12} {', '.join(each)}; ranks: {', '.join(ends)}")
    assert sum(done.values()) == runs
    assert not failed, [str(eviction) for eviction in failed]
