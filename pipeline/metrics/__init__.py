"""How good a set of generated images is: numpy arrays in, numbers and pictures out.

`classifier` gives the features, `distances` and `manifold` compare two sets of them, `neighbours` looks for
copied training images, `scores` gathers everything for one set, `pictures` shows it. Nothing here imports
another part of the project.
"""
