"""Run `potstill` with FSDP 2 on CPUs: accelerate offers it for accelerators alone.

torchrun --nproc-per-node 2 tests/fsdp_on_cpu.py distill …
"""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from potstill import cli

if __name__ == "__main__":
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    sys.exit(cli.main(sys.argv[1:]))
