"""torchrun, which gets a SIGTERM when the first of its workers has been started, and before the second one is."""

import os
import signal

import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

real = SubprocessHandler.__init__


def init(self, *args, **kwargs):
    real(self, *args, **kwargs)
    if self.local_rank_id == 0:
        os.kill(os.getpid(), signal.SIGTERM)


SubprocessHandler.__init__ = init
torch.distributed.run.main()
