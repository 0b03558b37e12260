"""Make photographs like ImageNet's out of what PyPI and Debian distribute; the same every time.

    python benchmarks/corpus.py FOLDER [COUNT]

Windows of 34 photographs from scikit-image, scikit-learn and Debian's wallpaper packages (fetched
by apt-get, which a Debian system has) are scaled to ImageNet's sizes and saved as JPEG files with
its quality and chroma subsampling: on average about 480 x 420 pixels and 100 kB. FOLDER then has
one class folder for each source, as `--config.data.source=folder:FOLDER` takes.
"""

import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

# The photographs among each package's pictures; a name is a file or a folder of one in many sizes.
PACKAGES = {
    "lomiri-wallpapers-16.04": (
        "Dragonfly_by_Bolly Picture_0B_by_freespace "
        "Picture_1A_by_freespace Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi "
        "friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich "
        "life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
        "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi"
    ),
    "lomiri-wallpapers-20.04": "Kleiber_by_Lukas_Baubkus",
    "mate-backgrounds": ("Blinds Dune GreenMeadow LadyBird RainDrops Wood YellowFlower"),
    "plasma-workspace-wallpapers": (
        "Autumn BytheWater ColorfulCups EveningGlow FallenLeaf Grey OneStandsOut Path Volna"
    ),
}
SCIKIT_IMAGES = ("astronaut", "cat", "coffee", "rocket")

# Width, height and share of the pictures; the rest of ImageNet is 500 wide and of any height.
SIZES = ((500, 375, 0.45), (500, 333, 0.17), (375, 500, 0.13), (333, 500, 0.06), (640, 480, 0.04))
SUBSAMPLED, GREY, PROGRESSIVE = 0.84, 0.01, 0.005  # shares of the files
SHARPENED = 150  # percent
QUALITY = (95.0, 2.5)  # mean and standard deviation


def main(folder: str, count: str = "238") -> None:
    """Write the files and print what they are like."""
    photographs = [*_from_pypi(), *_from_debian()]
    sizes, pixels = [], []
    for number in range(int(count)):
        name, photograph = photographs[number % len(photographs)]
        encoded, size = _make(photograph, np.random.default_rng([2021, number]))
        path = Path(folder) / name / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
        sizes.append(len(encoded))
        pixels.append(size)
    width, height = np.mean(pixels, axis=0)
    print(
        f"{count} files in {folder}: on average {width:.0f} x {height:.0f} pixels, "
        f"{np.mean(sizes) / 1000:.0f} kB (median {np.median(sizes) / 1000:.0f})"
    )


def _make(photograph: Image.Image, rng: np.random.Generator) -> tuple[bytes, tuple[int, int]]:
    """Cut a window of a size and quality drawn from ImageNet's; return its file and its size."""
    shares = [share for *_, share in SIZES]
    kind = int(np.searchsorted(np.cumsum(shares), rng.random()))
    width, height = (*SIZES, (500, int(rng.integers(260, 640)), 0))[kind][:2]
    # As large a part of the photograph as a camera's picture of it would be, six tenths at least.
    most = min(photograph.width / width, photograph.height / height)
    scale = most * rng.uniform(0.6, 1.0)
    w, h = min(photograph.width, int(width * scale)), min(photograph.height, int(height * scale))
    left = int(rng.integers(photograph.width - w + 1))
    top = int(rng.integers(photograph.height - h + 1))
    window = photograph.crop((left, top, left + w, top + h))
    window = window.resize((width, height), Image.Resampling.LANCZOS)
    # As sites that show photographs do after scaling; without it the files are half ImageNet's.
    window = window.filter(ImageFilter.UnsharpMask(radius=1, percent=SHARPENED, threshold=0))
    if rng.random() < GREY:
        window = window.convert("L")
    buffer = io.BytesIO()
    window.save(
        buffer,
        "jpeg",
        quality=int(np.clip(rng.normal(*QUALITY), 75, 100)),
        subsampling="4:2:0" if rng.random() < SUBSAMPLED else "4:4:4",
        progressive=bool(rng.random() < PROGRESSIVE),
    )
    return buffer.getvalue(), (width, height)


def _from_pypi() -> Iterator[tuple[str, Image.Image]]:
    from skimage import data
    from sklearn.datasets import load_sample_image

    for name in SCIKIT_IMAGES:
        yield name, Image.fromarray(getattr(data, name)())
    for name in ("china", "flower"):
        yield name, Image.fromarray(load_sample_image(f"{name}.jpg"))


def _from_debian() -> Iterator[tuple[str, Image.Image]]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        for names in PACKAGES.values():
            for name in names.split():
                root = Path(folder)
                files = (*root.rglob(f"{name}.jpg"), *root.rglob(f"{name}/**/*.jpg"))
                largest = max(files, key=lambda file: file.stat().st_size)
                photograph = Image.open(largest)
                photograph.draft("RGB", (2400, 1800))  # no window needs more
                yield name, photograph.convert("RGB")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
