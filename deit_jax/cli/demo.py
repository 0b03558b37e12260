"""`deit demo`: a page to drop an image on."""

import tempfile
from pathlib import Path

from deit_jax.cli.flags import Command, UsageError, add_checkpoint_flags, no_words

DEMO_DOC = """usage: deit demo --weights=W[,W…] [--teacher=T] [--examples=8] [--port=7860] …

Serve a page to drop an image on: what the class head, the distillation head, both together and the
teacher answer, what each token reads in every head and through all blocks, and where the two
tokens disagree; several models side by side. W is what `deit predict` takes. The workdir of a run
brings its teacher, and examples from its evaluation data. It needs pip install 'deit_jax[demo]'.

  deit demo --weights=runs/quickstart
  deit demo --weights=runs/quickstart --space=space    # a folder for a Hugging Face Space

Nothing is fetched from the network, and nothing is sent there, but with --share."""


def main(argv: list[str]) -> None:
    """Run `deit demo`."""
    command = Command("demo", DEMO_DOC)
    command.words("weights", None, "a run, file, folder or hf-hub: id; several with commas")
    command.string("model", None, "name of the weights' model, where they do not say it")
    command.string("teacher", "", "weights, a teacher folder, timm:NAME, …; else the run's own")
    command.integer("examples", 8, "how many images of the evaluation data to offer", lower_bound=0)
    command.integer("topk", 5, "classes to show of each answer", lower_bound=1)
    command.boolean("multi_label", False, "each class has a probability of its own")
    add_checkpoint_flags(command)
    command.string("host", "127.0.0.1", "the address to serve at; 0.0.0.0 is every one")
    command.integer("port", 7860, "the port to serve at; 0 takes a free one", lower_bound=0)
    command.boolean("share", False, "ask Gradio's servers for a public address")
    command.string("space", "", "write a Hugging Face Space to this folder, and serve nothing")
    no_words(command.parse(argv, required=("weights",)))
    values = command.flags
    if values.space and values.share:
        raise UsageError("--space=… writes a folder and serves nothing; leave --share out")
    from deit_jax.cli import compile_cache
    from deit_jax.demo import page, space
    from deit_jax.demo.examples import write_examples
    from deit_jax.demo.session import Session, open_models

    page.require_gradio()  # before minutes of loading
    port = values.port if values.space else page.free_port(values.host, values.port)
    compile_cache.enable()
    which = (values.checkpoint, values.ema, values.multi_label)
    models, teachers = open_models(values.weights, values.teacher, values.model, *which)
    if values.space:
        written = space.write_space(values.space, models, teachers, values.topk, values.examples)
        print(f"space: {written}")
        return
    with tempfile.TemporaryDirectory(prefix="deit-demo-") as folder:
        opened = [model.opened for model in models]
        examples = write_examples(opened, values.examples, Path(folder))
        session = Session(models, values.topk, Path(folder), examples)
        page.serve(page.build(session), values.host, port, values.share)
