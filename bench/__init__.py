"""The measurements behind every number in the README, and the demonstration that `make demo` runs."""
