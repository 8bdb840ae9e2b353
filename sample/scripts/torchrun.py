"""torchrun with the same arguments, but without its traceback where the program has said in a line why it ends.

    python sample/scripts/torchrun.py --standalone --nproc_per_node=2 train.py --config configs/demo/demo_train.yaml

That is a mistake of the user (exit code 2), or Ctrl-C (130); the exit code is the program's.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

# It logs which process failed, as the traceback of ChildFailedError says, too
logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
try:
    main()
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    if code not in (2, 130):
        raise
    sys.exit(code)
except SignalException as error:
    sys.exit(128 + error.sigval)
