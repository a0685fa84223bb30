"""Published systems, each as a `maefast.recipe.Recipe`."""
