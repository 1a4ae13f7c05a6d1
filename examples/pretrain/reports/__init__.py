"""Tables and pictures of records: the sweep's, the evaluation's, and those of a single run."""

from pathlib import Path

import matplotlib
import matplotlib.style

matplotlib.use("agg")
matplotlib.style.use(Path(__file__).parents[2] / "style.mplstyle")
# Names of classes and runs come from the data: a `$` in them is no formula.
matplotlib.rcParams["text.parse_math"] = False
