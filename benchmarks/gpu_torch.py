"""PyTorch's side of benchmarks/gpu.py: timm's own distillation task, with timm's models."""

from importlib import metadata

from tests import timm_reference

torch = timm_reference.import_torch()
timm = timm_reference.import_timm()

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = {"compile": None, "graphs": "reduce-overhead"}  # of torch.compile


def build(row: dict):
    """Return a function that starts a step, one that waits for it, and one that tells the rest."""
    if DEVICE == "cpu" and not row["toy"]:
        raise RuntimeError(f"this PyTorch ({torch.__version__}) sees no GPU")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    step = {"train": train, "forward": forward}[row["part"]](row)
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    return step, wait, lambda: about(row)


def about(row: dict) -> dict:
    """Return what the row's process knows of the device, its memory and the versions.

    Of a row with CUDA graphs also how often inductor took none.
    """
    gpu, found = DEVICE == "cuda", {}
    if row["peer"] == "graphs":
        from torch._dynamo.utils import counters

        found = {"graphs_skipped": counters["inductor"]["cudagraph_skips"]}
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "versions": {name: metadata.version(name) for name in ("torch", "timm")},
        **found,
    }


def student(row: dict):
    """Return timm's model, in float32 on the device."""
    toy = {"img_size": row["image_size"], "embed_dim": 24, "depth": 1} if row["toy"] else {}
    size = 384 if row["image_size"] == 384 else 224
    name = f"deit_{row['model']}_distilled_patch16_{size}"
    model = timm.create_model(name, drop_path_rate=0.1, num_classes=classes(row), **toy)
    return model.to(DEVICE)


def teacher(row: dict):
    """Return timm's RegNetY: frozen, batch norm folded, in bfloat16, channels last."""
    name = "regnety_002" if row["toy"] else "regnety_160"
    model = timm.create_model(name, num_classes=classes(row)).eval().requires_grad_(False)
    return folded(model).to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)


def folded(model):
    """Fold the batch norms into their convolutions; the activation behind each stays."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for module in model.modules():
        conv, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
            module.bn = getattr(norm, "act", torch.nn.Identity())  # timm's norms hold it
    return model


def classes(row: dict) -> int:
    """Return the number of classes."""
    return 10 if row["toy"] else 1000


def compiler(row: dict) -> dict:
    """Return torch.compile's arguments for a row's peer."""
    # The toy tries this file, not the compiler behind it.
    return {"backend": "aot_eager"} if row["toy"] else {"mode": MODES[row["peer"]]}


def images_of(row: dict):
    """Return uint8 images on the device, channels last."""
    shape = (row["batch"], 3, row["image_size"], row["image_size"])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    return images.contiguous(memory_format=torch.channels_last)


def normaliser():
    """Return a function from uint8 images to normalised float32 ones."""
    mean, std = (torch.tensor(x, device=DEVICE).view(1, 3, 1, 1) for x in (MEAN, STD))
    return lambda images: (images.float() / 255 - mean) / std


def train(row: dict):
    """Return one update by timm's TokenDistillationTask: hard distillation (DeiT eq. 3), AdamW."""
    from timm.task import TokenDistillationTask

    model, normalise = student(row).train(), normaliser()
    task = TokenDistillationTask(
        student_model=model,
        teacher_model=teacher(row),
        criterion=torch.nn.CrossEntropyLoss(label_smoothing=0.1),
        distill_type="hard",
        task_loss_weight=0.5,
        device=torch.device(DEVICE),
        verbose=False,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=0.05, fused=True)
    images = images_of(row)
    labels = torch.randint(0, classes(row), (row["batch"],), device=DEVICE)
    if row["peer"] in MODES:
        task.compile(**compiler(row))

    def step():
        if row["peer"] == "graphs" and DEVICE == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = task(normalise(images), labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward(row: dict):
    """Return one prediction, the two heads averaged as timm does outside of training."""
    model, normalise = student(row).eval().to(torch.bfloat16), normaliser()
    images = images_of(row)

    def predict(images):
        return model(normalise(images).to(torch.bfloat16))

    if row["peer"] in MODES:
        predict = torch.compile(predict, **compiler(row))

    def step():
        with torch.inference_mode():
            predict(images)

    return step
