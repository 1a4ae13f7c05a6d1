"""Tables and pictures of records: the sweep's, the evaluation's, and those of a single run."""

import matplotlib

matplotlib.use("agg")
# Names of classes and runs come from the data: a `$` in them is no formula.
matplotlib.rcParams["text.parse_math"] = False
