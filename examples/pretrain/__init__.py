"""Self-supervised pretraining on images: methods, data, protocols, and reports on what each ingredient adds."""

import os
import sys

if "LOCAL_RANK" in os.environ:
    # Where another rank has gone, torch's C++ prints its stack as a warning, beside the errors that are handled.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
if sys.argv[0] == "-m":  # a command of this package: the imports that follow take seconds
    from examples.pretrain import startup

    startup.guard()
