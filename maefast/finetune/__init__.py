"""A classifier of a pre-trained encoder, trained end to end, so that a run ends in a figure.

    classifier   the encoder with a pooled head
    layers       learning rates that fall towards the input; the papers' values
    mix          mixup and CutMix
    data         training samples with their classes
    began        what a run must have still when it goes on
    recipe       all of that as a `maefast.recipe.Recipe`, which the loop of pre-training trains
    judge        accuracy on samples that are held back, on the way and at the end

Nothing here knows `maefast.train`, which has the command (`maefast.train.finetune`).
"""
