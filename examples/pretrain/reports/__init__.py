"""Tables and pictures of records: the sweep's, the evaluation's, and those of a single run."""
