"""Where samples come from, by what they are of: `maefast.data.images`."""
