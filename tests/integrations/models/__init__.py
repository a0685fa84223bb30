"""Models of other projects, in our own words (structure, names, maths), to accelerate without installing them."""
