"""PyTorch's side of benchmarks/gpu.py: timm's distilled DeiT with timm's RegNetY as its teacher."""

from importlib import metadata

from tests import timm_reference

torch = timm_reference.import_torch()
timm = timm_reference.import_timm()
F = torch.nn.functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(row: dict):
    """Return a function that starts a step, one that waits for it, and one that tells the rest."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    step = {"train": train, "forward": forward}[row["part"]](row)
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    return step, wait, about


def about() -> dict:
    """Return what the row's process knows of the device, its memory and the versions."""
    gpu = DEVICE == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "versions": {name: metadata.version(name) for name in ("torch", "timm")},
    }


def student(row: dict):
    """Return timm's model, in float32 on the device."""
    toy = {"img_size": row["image_size"], "embed_dim": 24, "depth": 1} if row["toy"] else {}
    size = 384 if row["image_size"] == 384 else 224
    name = f"deit_{row['model']}_distilled_patch16_{size}"
    model = timm.create_model(name, drop_path_rate=0.1, num_classes=classes(row), **toy)
    return model.to(DEVICE)


def teacher(row: dict):
    """Return timm's RegNetY: frozen, in bfloat16, channels last."""
    name = "regnety_002" if row["toy"] else "regnety_160"
    model = timm.create_model(name, num_classes=classes(row)).eval().requires_grad_(False)
    return model.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)


def classes(row: dict) -> int:
    """Return the number of classes."""
    return 10 if row["toy"] else 1000


def compiled(row: dict, function):
    """Return the function as the row's peer runs it."""
    if row["peer"] == "eager":
        return function
    # The toy tries this file, not the compiler behind it.
    return torch.compile(function, backend="aot_eager" if row["toy"] else "inductor")


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
    """Return one update: teacher, student, hard distillation (DeiT eq. 3), backward, AdamW."""
    model, frozen, normalise = student(row).train(), teacher(row), normaliser()
    model.set_distilled_training(True)  # the two heads' logits, as in training DeiT
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=0.05, fused=True)
    images, smooth, k = images_of(row), 0.1, classes(row)
    labels = torch.randint(0, k, (row["batch"],), device=DEVICE)
    targets = (1 - smooth) * F.one_hot(labels, k).float() + smooth / k

    def loss_of(images, targets):
        with torch.autocast(DEVICE, torch.bfloat16):
            x = normalise(images)
            with torch.no_grad():
                hard = frozen(x.to(torch.bfloat16)).argmax(1)
            cls, dist = model(x)
        of_labels = F.cross_entropy(cls.float(), targets)
        return 0.5 * of_labels + 0.5 * F.cross_entropy(dist.float(), hard)

    loss_of = compiled(row, loss_of)

    def step():
        loss_of(images, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward(row: dict):
    """Return one prediction, the two heads averaged as timm does outside of training."""
    model, normalise = student(row).eval().to(torch.bfloat16), normaliser()
    images = images_of(row)
    predict = compiled(row, lambda images: model(normalise(images).to(torch.bfloat16)))

    def step():
        with torch.inference_mode():
            predict(images)

    return step
