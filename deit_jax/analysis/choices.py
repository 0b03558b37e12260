"""What people choose of an analysis, by name, without JAX, as `--help` says it."""

FEATURES = {
    "pooled": "what the heads are given: the class token, of a distilled model the mean of both",
    "cls": "the class token",
    "dist": "the distillation token",
    "mean": "the mean of the patches",
    "patches": "every patch, row by row",
    "tokens": "class token, distillation token where there is one, patches",
}
PROBES = {
    "knn": "nearest training images",
    "linear": "logistic regression",
}
IMAGES = 5000  # that a report evaluates on, unless told
