"""Every field, its default and its meaning: the only schema. The defaults are DeiT's recipe.

A config file imports this one and changes a few lines. Any field can be changed on the command
line (`--config.optim.lr=1e-3`); a mistyped key or a value of the wrong type stops at start-up.
Batch sizes are global. A field that is None takes the value that belongs to the model's name.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_model_config(name: str) -> ConfigDict:
    """Return the fields that choose and reshape an architecture."""
    m = ConfigDict()
    m.name = name  # see `python -c "import deit_jax; print(deit_jax.list_models())"`
    m.image_size = placeholder(object)  # pixels: a side of a square, or (height, width)
    m.in_channels = placeholder(int)  # None = data.channels
    m.drop_path = placeholder(float)  # stochastic depth, rate of the last block
    m.dropout = placeholder(float)  # rate; none of the recipes has any
    m.remat = placeholder(bool)  # recompute activations in the backward pass: less memory, slower
    # Vision transformers:
    m.patch_size = placeholder(int)  # pixels, a side
    m.width = placeholder(int)  # numbers a token
    m.depth = placeholder(int)  # blocks
    m.num_heads = placeholder(int)  # of attention; they divide the width
    m.layer_scale = placeholder(float)  # first value of LayerScale's factors, as in DeiT III
    # Which kernel computes attention; changes no weight. auto: cuDNN's flash attention on NVIDIA
    # GPUs that take it, cudnn: that or an error, xla: two products. None = auto.
    m.attention = placeholder(str)
    m.dist_head = placeholder(bool)  # False: a distillation token without a head of its own
    # RegNetY:
    m.widths = placeholder(tuple)  # per stage
    m.depths = placeholder(tuple)  # per stage
    m.group_width = placeholder(int)  # channels a group of the 3 x 3 convolutions
    m.stem_width = placeholder(int)  # channels of the first convolution
    m.stem_stride = placeholder(int)  # of the first convolution
    return m


def get_config() -> ConfigDict:
    """Return DeiT-B, without distillation, on ImageNet-1k for 300 epochs."""
    c = ConfigDict()
    c.seed = 0  # of first weights, order of images, augmentation and mixing
    c.epochs = 300.0  # as many examples each as there are images; see augment.repeats
    c.batch_size = 1024  # examples per update; counts every copy of repeated augmentation
    c.model = get_model_config("deit_base_patch16_224")
    c.model.drop_path = 0.1
    c.dtype = "auto"  # compute: bfloat16, float32, or auto = bfloat16 on TPU and GPU

    c.init = ConfigDict()
    # Start from a run's workdir, a weight file or folder (FILE::KEY where it has several),
    # hf-hub:ORG/NAME, or `pretrained`, what is published for the model's name. See docs/weights.md.
    c.init.weights = ""
    c.init.head = "error"  # where heads differ: error, drop = all anew, cls = keep the class head
    c.init.checkpoint = "latest"  # of a run: latest, best or a step; best of those that are kept
    c.init.ema = False  # the moving average of its weights
    c.init.required = False  # whether this config makes sense without weights to start from

    c.data = ConfigDict()
    # tfds:NAME, folder:PATH, wds:PATH, hf:PATH, hf:ORG/NAME, fashion_mnist, mnist or digits;
    # images:PATH, all images below a folder, without labels (distill.kind=feature).
    c.data.source = "tfds:imagenet2012"
    c.data.dir = ""  # where TFDS keeps its data sets; "" = TFDS's default
    # Parts of the data by their names; others for the same do: training, val, Valid, dev, test.
    # `validation` is the test split where there is no other; `.` all of a folder, in eval_split for
    # `deit eval` alone.
    c.data.train_split = "train"
    c.data.eval_split = "validation"  # the part that is evaluated
    c.data.eval_fraction = 0.2  # held out where the source has no split for evaluation
    c.data.labels = ""  # csv, tsv, json or text files of path and label; "" = folders are classes
    c.data.classes = ""  # file with the classes in order, or `imagenet` for its ids; "" = sorted
    # True: an image has any number of classes, none too; loss.kind is then binary. Several in one
    # cell of data.labels stand between |, ; or , ("" = what is found there) or `space`.
    c.data.multi_label = False
    c.data.label_separator = ""  # of data.multi_label
    c.data.image_column = ""  # of hf: or data.labels; "" = found by its type or name
    c.data.label_column = ""  # the same of labels
    c.data.nested = "auto"  # folders in folders: the class is leaf, top, path = joined; or ask
    # How often a class is met: none = as it has images, sqrt = by the root of that, equal.
    c.data.balance = "none"
    c.data.min_images = 0  # leave out classes with fewer training images; 0 = none may be empty
    # How folders are read and parts held out. None = the newest, or those a run began with; 1 is
    # what was done until 2026. See deit_jax/data/sources/assemble.py.
    c.data.rules = placeholder(int)
    # 3 = RGB, 1 = grey, 4 = RGB and alpha as it is stored; another number, or 4, also of arrays
    # (.npy) and TIFF files. See deit_jax/data/channels.py.
    c.data.channels = 3
    c.data.mean = (0.485, 0.456, 0.406)  # of each channel in [0, 1]; one value is for all
    c.data.std = (0.229, 0.224, 0.225)  # likewise
    c.data.eval_crop_ratio = 0.875  # resize=crop: shorter side to image_size / ratio, centre
    # How training images become pixels. Decoders differ by rounding, so a run keeps the one that it
    # began with: auto is replaced by the fastest one installed, fast (pip install deit_jax[fast]),
    # portable or pillow (the reference). See deit_jax/data/decoders.py.
    c.data.decoder = "auto"
    # Images that cannot be read: in training the next one takes the place of such a one, evaluation
    # leaves it out. False: the first one ends the run.
    c.data.skip_unreadable = False
    c.data.exif = False  # True: turn images as their camera noted; published models did not
    c.data.resize = "crop"  # or squash, pad: images that are not square. See deit_jax/data/view.py
    c.data.bits = 0  # of deeper images than 8: 9 … 32, 0 = what each holds. deit_jax/data/depth.py
    c.data.threads = 0  # decoding threads per process; 0 = as many as help, one per core at most
    c.data.prefetch_batches = 8  # decoded ahead of the step

    c.augment = ConfigDict()
    c.augment.crop = "random_resized"  # or simple: shorter side resized, padded by 4, random square
    c.augment.crop_scale = (0.08, 1.0)  # share of the image's area
    c.augment.crop_ratio = (3 / 4, 4 / 3)  # width / height
    c.augment.flip_prob = 0.5  # left-right
    c.augment.auto = "rand-m9-mstd0.5-inc1"  # timm's grammar; "3aug" = 3-Augment; "" = none
    c.augment.color_jitter = 0.3  # as in timm, only where `auto` is not RandAugment
    c.augment.repeats = 3  # copies of an image in a batch; an epoch sees 1/repeats of the images
    c.augment.erase_prob = 0.25  # random erasing, on device

    c.mixing = ConfigDict()  # mixup and cutmix, on device
    c.mixing.prob = 1.0  # that a group of examples is mixed
    c.mixing.mixup_alpha = 0.8  # Beta(alpha, alpha); 0 = no mixup
    c.mixing.cutmix_alpha = 1.0  # 0 = no cutmix
    c.mixing.switch_prob = 0.5  # of cutmix where both are on
    c.mixing.group_size = 64  # consecutive examples that share one draw and mix among themselves

    c.loss = ConfigDict()
    c.loss.kind = "softmax"  # or binary: one sigmoid a class, targets 1 for every class in the mix
    # Of the labels' loss: "" = none, balanced = inverse to their images, numbers in the classes'
    # order (1,0.5,2), or a csv or json file of names and weights.
    c.loss.class_weights = ""
    c.loss.smoothing = 0.1  # of the labels, not of a teacher's
    c.loss.heads = "cls"  # learns the labels; "both": without a teacher, the distillation head too

    c.distill = ConfigDict()
    # none, soft, hard (through the distillation token if the model has one), feature, or both:
    # soft+feature, hard+feature. See docs/teachers.md.
    c.distill.kind = "none"
    c.distill.alpha = 0.5  # weight of the teacher's term; the labels' is 1 - alpha
    c.distill.label_weight = placeholder(float)  # or each by itself; None = as alpha says
    c.distill.teacher_weight = placeholder(float)  # beside label_weight
    c.distill.feature_weight = 1.0  # of the features' term beside soft or hard
    c.distill.tau = 1.0  # temperature of soft distillation
    # Of soft distillation: "numel" = the reference code's / (B K).
    c.distill.reduction = "batchmean"
    # Of features: cosine, smooth_l1 (to standardised ones) or mse, between the teacher's and, in a
    # projection that is trained, the student's: its (distillation) token, cls or patches' mean.
    c.distill.feature_loss = "cosine"
    c.distill.student_features = "token"  # which of them learn
    # Numbers above that change over the run, from what they are to an end, linear or cosine:
    # alpha=linear:0.1,tau=cosine:1
    c.distill.schedule = ""

    c.teacher = ConfigDict()
    # A trained model: a workdir or whatever init.weights takes, a teacher folder, timm:NAME[@FILE],
    # torch:MODULE:FUNCTION or python:MODULE:FUNCTION. Several with commas between them.
    c.teacher.weights = ""
    c.teacher.shares = ""  # of several: how much each counts, as in 2,1; "" = equally
    c.teacher.combine = "logits"  # of several: average logits, or count votes of their first choice
    c.teacher.checkpoint = "latest"  # of a run: latest, best or a step
    c.teacher.ema = False  # the moving average of its weights
    c.teacher.epochs = 0.0  # without weights: first train teacher.model so long, in WORKDIR/teacher
    # Resize its images on device: a side or (height, width); None = the student's or, of a model
    # that is not ours and takes one size, its own.
    c.teacher.image_size = placeholder(object)
    # What the teacher says, on disk: record writes it to tape_path ("" = WORKDIR/tape) in training,
    # replay trains from there without running the teacher. See docs/tape.md.
    c.teacher.tape = "off"
    c.teacher.tape_path = ""  # where teacher.tape lies
    c.teacher.tape_top_k = 16  # classes kept of each answer in soft distillation
    c.teacher.lr = c.get_ref("batch_size").to_float() * 5e-4 / 512  # of one trained first
    c.teacher.model = get_model_config("regnety_160")

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw, sgd or lamb
    c.optim.lr = (
        c.get_ref("batch_size").to_float() * 5e-4 / 512
    )  # peak; follows --config.batch_size
    c.optim.warmup_lr = 1e-6  # where the rate begins
    c.optim.warmup_epochs = 5.0  # a straight line up to lr
    c.optim.min_lr = 1e-5  # where the cosine ends
    # Whether min_lr and warmup_lr may be above lr, so that the rate climbs where it should fall.
    # None = no, but for runs that began when that was not asked.
    c.optim.may_rise = placeholder(bool)
    c.optim.weight_decay = 0.05  # not of vectors, class token and positions
    c.optim.b1 = 0.9  # momentum, for sgd
    c.optim.b2 = 0.999  # of the second moment
    c.optim.eps = 1e-8  # beside the root of the second moment
    c.optim.clip_norm = 0.0  # of the global gradient; 0 = no clipping
    c.optim.accum_steps = 1  # micro-batches per update, for memory's sake
    # What is trained: all; linear_probe = the heads; attention_only = attention, positions, heads.
    # Of it, freeze what fits patterns of paths with commas between them, where * stands for
    # anything: blocks_[0-5],patch_embed. Frozen parameters have no gradient and no moments.
    c.optim.tune = "all"
    c.optim.freeze = ""  # patterns
    # Rates of single layers: times layer_decay for every layer further from the heads, as in timm;
    # and times the number of the first pattern that fits: head*=10,patch_embed=0.1
    c.optim.layer_decay = 1.0
    c.optim.lr_multipliers = ""  # patterns and factors
    c.optim.ema_decay = 0.99996  # exponential moving average of the weights; 0 = none

    c.mesh = ConfigDict()
    # Devices along each axis; they multiply to all there are, and one may be -1 = the rest.
    c.mesh.data = -1  # each has its own examples and a copy of the weights
    c.mesh.fsdp = 1  # each has its own examples; together they hold one copy of the weights
    c.mesh.tensor = 1  # share the examples; each computes some heads, hidden units and classes
    c.mesh.slices = 1  # TPU slices of the job; data runs across them and must be a multiple

    c.train = ConfigDict()
    c.train.log_every_steps = 50  # a line in metrics.jsonl
    # What follows the run: tensorboard, wandb, mlflow, trackio, with commas. See docs/trackers.md.
    c.train.trackers = ("tensorboard",)
    c.train.eval_every_epochs = 1.0  # and at the end
    # Stop early, once no evaluation was better than the best for so many epochs; 0 = never.
    c.train.patience_epochs = 0.0
    c.train.save_every_epochs = 1.0  # and at the end, and when told to stop
    c.train.keep_checkpoints = 2  # the latest ones; the best one is kept besides
    c.train.eval_batch_size = 1024  # images evaluated at a time, on all devices
    # A device takes at most so many examples at a time, with the same gradient but for rounding:
    # 0 = all of its share, None = what is fastest on TPUs and what fits into a GPU's memory.
    # Batch norm and dropout would make another gradient of parts: accum_steps alone parts those.
    c.train.micro_batch = placeholder(int)
    # On a GPU, only kernels that give the same bits for the same operands: slower. Without effect
    # elsewhere, where all are so. See docs/reliability.md for what holds then.
    c.train.deterministic = False
    # A step whose loss or gradient is not finite changes no weight. After more than so many in a
    # row: stop, or rollback = go back to the last good checkpoint and on with other random data.
    c.train.max_bad_steps = 5
    c.train.on_divergence = "stop"  # or rollback
    c.train.max_rollbacks = 3  # then stop
    return c


def parse_args(text: str, **defaults):
    """Return the defaults changed by a config file's arguments, `variant=small,distilled=True`.

    Each value takes the type of its default. Raise ValueError for an unknown name or a bad value.
    """
    args = dict(defaults)
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in defaults:
            raise ValueError(f"unknown argument {key!r}; this config takes {', '.join(defaults)}")
        kind = type(defaults[key])
        if kind is bool:
            if value not in ("True", "False", ""):
                raise ValueError(f"{key}={value}: give True or False")
            args[key] = value != "False"
        else:
            args[key] = kind(value)
    return ConfigDict(args)
