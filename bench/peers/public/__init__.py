"""Models of other projects, in our own words (structure, names, maths): what tests and benchmarks accelerate where the
projects themselves are not installed."""
