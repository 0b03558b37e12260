"""How fast images become input here: a second of decoding and cropping."""

import io
import time

import numpy as np
from PIL import Image

from deit_jax.configs import base
from deit_jax.data import decode
from deit_jax.data.decoders import available, choose
from deit_jax.data.loader import usable_cores
from deit_jax.data.view import random_view
from deit_jax.doctor.findings import NOTE, Finding


def photograph() -> bytes:
    """Return a JPEG file of ImageNet's usual size, 500 x 375: smooth shapes and some noise."""
    rows, columns = np.mgrid[0:375, 0:500]
    bands = [127 + 90 * np.sin(rows / (17 + k) + columns / (29 - k)) for k in range(3)]
    noise = np.random.default_rng(0).normal(0, 12, (375, 500, 3))
    pixels = np.clip(np.stack(bands, axis=-1) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=90)
    return file.getvalue()


def look(seconds: float = 1.0) -> list[Finding]:
    """Return which decoder `data.decoder=auto` means, and images a second and core with it."""
    decoder, data, augment = choose("auto"), photograph(), base.get_config().augment
    rng, resize = np.random.default_rng(0), decode.resize_of(data, decoder, decode.PLAIN)
    count, began = -1, time.perf_counter()
    while count < 1 or time.perf_counter() - began < seconds:
        if count == 0:  # the first image loads the libraries
            began = time.perf_counter()
        pixels = decode.read(data, "a photograph", decoder, None, decode.PLAIN)
        random_view(pixels, 224, augment, rng, resize)
        count += 1
    rate = count / (time.perf_counter() - began)
    facts = {"decoder": decoder.name, "images_per_second_core": round(rate, 1)}
    text = f"{decoder}: {rate:.0f} images of 500 x 375 a second and core, {usable_cores()} cores"
    if available()[-1] != "fast":
        remedy = "pip install 'deit_jax[fast]', where there is a wheel for the machine"
        return [Finding("decoder", text, NOTE, remedy, facts)]
    return [Finding("decoder", text, facts=facts)]
