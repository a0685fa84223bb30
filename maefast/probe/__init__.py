"""What was learned, as a figure: probes of features that an encoder gives and that are not trained further.

    samples    the inputs of a recipe as they are, nothing random, with their names
    labels     a class for each name: its folder, or a row of a CSV file
    features   what `Recipe.encode` gives, pooled; the run around it undisturbed; kept in a file
    knn        k nearest neighbours by cosine, weighted votes
    linear     logistic regression on standardised features
    accuracy   shares with their interval; the part of the data that is held back
    pictures   classes in two dimensions; features of patches as colours
    watch      k-NN accuracy during pre-training

Nothing here knows `maefast.train`, which has the command (`maefast.train.probe`).
"""
