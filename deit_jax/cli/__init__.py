"""The commands: one file each, flags and printing only. A new one is a file and a line below."""

from typing import NamedTuple


class Entry(NamedTuple):
    """What `deit --help` says of a command, and whether it computes for long."""

    help: str
    computes: bool = False


# `deit NAME` runs `main(argv)` of the module deit_jax.cli.NAME.
COMMANDS = {
    "train": Entry("train a model, or continue the run in --workdir", computes=True),
    "eval": Entry("top-1 and top-5 of each head on a data set", computes=True),
    "report": Entry("one or several runs, also under way, as a page to read in a browser"),
    "analyze": Entry("the figures of that page as JSON"),
    "predict": Entry("classify image files"),
    "embed": Entry("features of image files, as an array or a table"),
    "demo": Entry("a page to drop images on: answers, attention, where the tokens disagree"),
    "convert": Entry("bring weights from one format into another"),
    "export": Entry("a model as a program of another runtime: ONNX, StableHLO, SavedModel"),
    "share": Entry("publish a model on the Hugging Face hub, with a model card"),
    "prepare": Entry("turn images into a TFDS data set, without TensorFlow"),
    "inspect": Entry("draw training images as the model is given them"),
    "bench": Entry("measure the training step, or the input pipeline", computes=True),
    "tape": Entry(
        "record what a teacher says of a run's images, for students to come", computes=True
    ),
    "doctor": Entry("what this machine has for training, and what is wrong with it"),
    "plan": Entry("what a training step needs on TPUs that are not there"),
}
