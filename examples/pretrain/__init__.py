"""Self-supervised pretraining on images: methods, data, protocols, and reports on what each ingredient adds."""

import sys

if sys.argv[0] == "-m":  # a command of this package: the imports that follow take seconds
    from examples.pretrain import startup

    startup.guard()
