"""`python3 examples [OPTIONS]`: create the environment if needed, then run `examples.pretrain`.

It works from any folder; relative paths in the options are relative to that folder. `--help` needs no environment.
"""

import importlib.util
import sys
from pathlib import Path

HELP = """\
usage: python3 examples [PRESET] [OPTIONS]

Pretrain without labels, then probe the frozen encoders with few labels. Table, pictures and checkpoints go to runs/.

presets (the first is the default):
  demo   Generated phantoms, a few minutes on two CPU cores.
  small  For a CPU and real data: a narrow ResNet at 32 px, about 800 steps on 4,400 images.
  paper  The paper's: ResNet-18 at 224 px, three codebooks of 2048, LARS for 300 epochs. For a GPU.

some options:
  --data PATH        your images: an .npz file, or a folder of pictures or DICOM files; phantoms if left out
  --out FOLDER       a new folder for the results; the next one under runs/ if left out
  --resume           continue the run in --out, or the preset's latest
  --methods NAMES    such as byol dissect dissect_codes, which are the default
  --image-size N     side of the images in pixels
  --seed N           of the split, the weights, the batches and the label subsets
  --device NAME      auto, cpu, cuda, ...

`python3 examples PRESET --help` lists all options, with their defaults. Like every run it needs the environment, which
the first one makes in .venv: about 1 GB.
"""


def main():
    """Replace this process by `python -m examples.pretrain` in the environment of the repository."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(HELP, end="")
        return
    path = Path(__file__).resolve().parent.parent / ".ci" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment", path)
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    try:
        environment.run(["examples"], ["-m", "examples.pretrain", *sys.argv[1:]], cwd=None)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
