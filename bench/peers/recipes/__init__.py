"""Each recipe in plain PyTorch, by its name: `reference(recipe, view)` gives the terms of the loss from the recipe's
own parameters, and `batch(size)` random samples of the published sizes to time it with."""
