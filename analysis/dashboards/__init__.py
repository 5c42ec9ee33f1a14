"""Pages of what units do: a static site that opens from disk, from a model's own run."""
