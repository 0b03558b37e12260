"""Which field or flag is meant by a name that there is not: usual names, other groups, typos."""

import difflib
from collections.abc import Collection, Iterable

MOST = 3  # that are named
_CUTOFF, _SHORT = 0.75, 0.6  # of difflib's likeness, 0 … 1: of fields, of flags

# What fields are called elsewhere: on the command lines of facebookresearch/deit and timm, in
# Hugging Face's TrainingArguments, in big_vision's configs. Dots and dashes are written as _.
SYNONYMS = {
    "seed": ("random_seed", "rng_seed", "manual_seed"),
    "epochs": (
        *("epoch", "num_epochs", "n_epochs", "max_epochs", "total_epochs", "train_epochs"),
        "num_train_epochs",
    ),
    "batch_size": (
        *("batch", "b", "bs", "batchsize", "train_batch_size", "global_batch_size", "input_batch"),
        *("per_device_train_batch_size", "batch_size_per_gpu", "batch_size_per_device"),
    ),
    "dtype": (
        *("precision", "amp", "amp_dtype", "fp16", "bf16", "bfloat16", "float16", "half"),
        *("mixed_precision", "compute_dtype", "model_dtype", "torch_dtype"),
    ),
    "init.weights": (
        *("finetune", "pretrained", "initial_checkpoint", "init_checkpoint", "pretrained_path"),
        *("model_init", "pretrained_weights", "load_from", "checkpoint_path", "model_name_or_path"),
    ),
    "model.name": ("model", "arch", "architecture", "model_name", "backbone", "net", "variant"),
    "model.image_size": (
        *("input_size", "img_size", "imgsz", "image_size", "resolution", "res", "img_dim"),
        *("input_resolution", "crop_size", "train_size", "size", "data_image_size"),
    ),
    "model.in_channels": ("in_chans", "input_channels", "num_channels", "num_input_channels"),
    "model.drop_path": (
        *("drop_path_rate", "stochastic_depth", "stochastic_depth_prob", "stochastic_depth_rate"),
        *("stoch_depth", "droppath", "drop_connect", "path_drop", "sd_rate"),
    ),
    "model.dropout": ("drop", "drop_rate", "dropout_rate", "dropout_prob", "hidden_dropout_prob"),
    "model.remat": (
        *(
            "grad_checkpointing",
            "gradient_checkpointing",
            "activation_checkpointing",
            "checkpointing",
        ),
        *("use_checkpoint", "remat_policy"),
    ),
    "model.width": ("embed_dim", "hidden_size", "hidden_dim", "dim", "d_model"),
    "model.depth": ("num_layers", "num_hidden_layers", "n_layers", "layers", "blocks"),
    "model.num_heads": ("n_heads", "nhead", "num_attention_heads"),
    "model.patch_size": ("patch", "patchsize"),
    "model.layer_scale": ("init_values", "layerscale", "layerscale_value", "init_scale", "ls_init"),
    "model.attention": ("attn", "attn_implementation", "fused_attn", "flash_attention", "flash"),
    "data.source": (
        *("dataset", "data_set", "data_path", "data", "dataset_name", "input_data", "train_data"),
        *("data_root", "root", "train_dir", "imagenet", "datapath", "data_name"),
    ),
    "data.dir": ("data_dir", "tfds_dir", "tfds_data_dir", "data_folder", "datadir", "cache_dir"),
    "data.train_split": ("train_split_name", "train_folder"),
    "data.eval_split": ("val_split", "validation_split", "test_split", "val_folder", "valid_split"),
    "data.eval_fraction": ("val_fraction", "val_ratio", "validation_fraction", "train_val_split"),
    "data.classes": ("num_classes", "nb_classes", "n_classes", "class_map", "num_labels"),
    "data.mean": ("image_mean", "img_mean", "pixel_mean"),
    "data.std": ("image_std", "img_std", "pixel_std"),
    "data.eval_crop_ratio": ("crop_pct", "eval_crop", "crop_fraction", "test_crop_ratio"),
    "data.threads": (
        *("workers", "num_workers", "j", "n_workers", "dataloader_num_workers", "num_threads"),
        *("preprocessing_num_workers", "num_parallel_calls"),
    ),
    "data.prefetch_batches": ("prefetch", "prefetch_factor", "prefetch_size"),
    "augment.auto": (
        *(
            "aa",
            "auto_augment",
            "autoaugment",
            "randaugment",
            "rand_augment",
            "randaug",
            "threeaugment",
        ),
        *("three_augment", "3aug", "augmentation", "aug"),
    ),
    "augment.color_jitter": ("colour_jitter", "jitter", "colorjitter"),
    "augment.crop_scale": ("scale", "rrc_scale", "random_resized_crop_scale"),
    "augment.crop_ratio": ("ratio", "aspect_ratio", "rrc_ratio"),
    "augment.crop": ("src", "simple_random_crop", "random_crop"),
    "augment.flip_prob": ("hflip", "flip", "horizontal_flip"),
    "augment.erase_prob": (
        *("reprob", "random_erasing", "random_erase", "random_erase_prob", "erasing", "cutout"),
        "re_prob",
    ),
    "augment.repeats": ("aug_repeats", "repeated_aug", "repeated_augmentation", "num_repeats"),
    "mixing.prob": ("mixup_prob", "mix_prob"),
    "mixing.mixup_alpha": ("mixup",),
    "mixing.cutmix_alpha": ("cutmix",),
    "mixing.switch_prob": ("mixup_switch_prob", "cutmix_prob"),
    "loss.smoothing": ("label_smoothing", "label_smoothing_factor", "smooth", "labels_smoothing"),
    "loss.kind": ("bce_loss", "bce", "criterion", "loss_type", "loss", "loss_fn"),
    "loss.class_weights": ("class_weight", "weights_of_classes"),
    "distill.kind": (
        *("distillation_type", "distill_type", "kd_distill_type", "distillation", "distill"),
        "distillation_kind",
    ),
    "distill.alpha": ("distillation_alpha", "kd_alpha", "distill_loss_weight", "distill_weight"),
    "distill.tau": (
        "temperature",
        "distillation_tau",
        "kd_temperature",
        "t",
        "distill_temperature",
    ),
    "teacher.model.name": ("teacher_model", "teacher", "teacher_name", "kd_model_name"),
    "teacher.weights": ("teacher_path", "teacher_checkpoint", "teacher_ckpt", "teacher_weights"),
    "optim.name": ("opt", "optimizer", "optimiser", "optimizer_name", "optim"),
    "optim.lr": (
        *("learning_rate", "blr", "base_lr", "lr_base", "max_lr", "peak_lr", "init_lr", "lrate"),
        *("base_learning_rate", "peak_learning_rate", "eta"),
    ),
    "optim.min_lr": ("min_learning_rate", "eta_min", "end_lr", "lr_min", "final_lr", "lr_end"),
    "optim.warmup_lr": ("warmup_lr_init", "warmup_start_lr", "warmup_init_lr"),
    "optim.warmup_epochs": ("warmup", "num_warmup_epochs", "warmup_steps", "warmup_ratio"),
    "optim.weight_decay": ("wd", "decay", "weightdecay", "l2", "l2_reg"),
    "optim.b1": ("momentum", "beta1", "adam_beta1", "opt_betas", "betas", "beta_1"),
    "optim.b2": ("beta2", "adam_beta2", "beta_2"),
    "optim.eps": ("opt_eps", "epsilon", "adam_epsilon"),
    "optim.clip_norm": (
        *("clip_grad", "grad_clip", "gradient_clip", "clip", "max_grad_norm", "clip_grad_norm"),
        *("grad_clip_norm", "max_norm", "clip_gradient", "gradient_clip_val"),
    ),
    "optim.accum_steps": (
        *("accum_iter", "grad_accum_steps", "gradient_accumulation_steps", "grad_accum"),
        *("update_freq", "accumulation_steps", "accumulate_grad_batches", "iters_to_accumulate"),
    ),
    "optim.ema_decay": (
        *("ema", "model_ema", "model_ema_decay", "ema_rate", "ema_momentum", "use_ema"),
        "moving_average",
    ),
    "optim.tune": ("attn_only", "linear_probe", "lin_probe", "linprobe", "trainable"),
    "optim.freeze": ("freeze_layers", "frozen", "freeze_backbone"),
    "optim.layer_decay": (
        "lr_decay_rate",
        "layer_lr_decay",
        "layerwise_decay",
        "llrd",
        "lr_layer_decay",
    ),
    "train.log_every_steps": (
        *("log_interval", "print_freq", "logging_steps", "log_steps", "log_every", "log_freq"),
        "log_training_steps",
    ),
    "train.trackers": (
        *(
            "report_to",
            "log_wandb",
            "wandb",
            "tensorboard",
            "mlflow",
            "trackio",
            "logger",
            "tracker",
        ),
        *("use_wandb", "loggers", "enable_wandb"),
    ),
    "train.eval_every_epochs": (
        *("eval_interval", "eval_freq", "eval_every", "eval_steps", "val_interval", "eval_epochs"),
        "check_val_every_n_epoch",
    ),
    "train.save_every_epochs": (
        *("save_freq", "save_interval", "save_every", "save_steps", "checkpoint_interval"),
        *("ckpt_steps", "save_epochs", "recovery_interval"),
    ),
    "train.keep_checkpoints": ("checkpoint_hist", "save_total_limit", "keep", "max_to_keep"),
    "train.eval_batch_size": (
        *("validation_batch_size", "val_batch_size", "test_batch_size"),
        "per_device_eval_batch_size",
    ),
    "train.patience_epochs": (
        "patience",
        "early_stopping",
        "early_stopping_patience",
        "early_stop",
    ),
    "train.micro_batch": ("micro_batch_size", "microbatch", "microbatch_size"),
    "train.deterministic": ("determinism", "cudnn_deterministic", "full_determinism"),
    "mesh.data": ("dp", "data_parallel", "num_devices", "gpus", "devices", "num_gpus", "ngpus"),
    "mesh.fsdp": ("sharding", "fully_sharded", "zero"),
    "mesh.tensor": ("tp", "tensor_parallel", "model_parallel"),
}
# Flags of commands, likewise.
FLAGS = {
    "workdir": ("output_dir", "output", "out_dir", "logdir", "log_dir", "save_dir", "work_dir"),
    "config": ("cfg", "config_file", "conf"),
    "weights": ("checkpoint_path", "resume", "ckpt", "pretrained", "model_path"),
    "topk": ("top_k", "k"),
    "out": ("output", "output_file", "results_file", "o"),
    "image_size": ("img_size", "input_size"),
    "num_classes": ("nb_classes",),
    "workers": ("num_workers", "j"),
    "max_side": ("size", "image_size"),
}


def fields(wrong: str, known: Collection[str]) -> list[str]:
    """Return which of the known dotted fields may be meant, the likeliest first, three at most."""
    plain = wrong.lower().replace("-", "_")
    if plain in known:
        return [plain]
    if found := _called(plain, known):
        return [found]
    last = plain.rpartition(".")[2]
    if last == plain or len(last) > 1:
        same = [field for field in known if field.rpartition(".")[2] == last]
        if same:
            return sorted(same, key=lambda field: -_likeness(plain, field))[:MOST]
    return _alike(plain, known)


def flags(wrong: str, known: Collection[str]) -> list[str]:
    """Return which of the known flags may be meant, the likeliest first, three at most."""
    plain = wrong.lower().replace("-", "_")
    if found := [flag for flag, names in FLAGS.items() if plain in names and flag in known]:
        return found
    return difflib.get_close_matches(plain, known, MOST, _SHORT)


def called(wrong: str, known: Collection[str]) -> str | None:
    """Return the field that goes by just this name, its own last or another; None without one."""
    plain = wrong.lower().replace("-", "_")
    same = [field for field in known if field.rpartition(".")[2] == plain]
    return _called(plain, known) or min(same, key=len, default=None)


def either(names: Iterable[str]) -> str:
    """Return `a`, `a or b`, `a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


_FIELD_OF = {name: field for field, names in SYNONYMS.items() for name in names}


def _called(plain: str, known: Collection[str]) -> str | None:
    """Return the field that goes by a usual name, in the group that is named if it is there."""
    group, _, last = plain.rpartition(".")
    if group and (field := _FIELD_OF.get(last)):
        own = f"{group}.{field.rpartition('.')[2]}"
        if own in known:
            return own
    for name in (plain.replace(".", "_"), last):
        if (field := _FIELD_OF.get(name)) in known:
            return field
        joined = [f for f in known if "." in plain and f.rpartition(".")[2] == name]
        if name != last and len(joined) == 1:
            return joined[0]
    return None


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _alike(plain: str, known: Collection[str]) -> list[str]:
    """Return the fields whose dotted, last or usual names are written nearly so."""
    group, _, last = plain.rpartition(".")
    scores = {}
    for field in known:
        own = field.rpartition(".")[0]
        score = _likeness(plain, field)
        score = max(
            score, _likeness(last, field.rpartition(".")[2]) * (1 if own == group else 0.95)
        )
        usual = [_likeness(last, name) * 0.95 for name in SYNONYMS.get(field, ()) if len(name) > 3]
        scores[field] = max(score, *usual, 0)
    best = max(scores.values(), default=0)
    near = [f for f, score in scores.items() if score >= max(_CUTOFF, best - 0.05)]
    return sorted(near, key=lambda field: -scores[field])[:MOST]
