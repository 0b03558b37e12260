"""Take the picture of the page in docs/demo.md, with a headless browser.

    python docs/figures/demo.py --weights=runs/quickstart [--examples=12] [--example=7]

It needs the extras `demo` and `test`, and a browser (CONTRIBUTING.md).
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from tests.demo_server import served  # noqa: E402

SIZE = {"width": 1240, "height": 1000}
COLOURS = 160  # a palette: a third of the bytes


def main() -> None:
    """Serve, click on an example, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--example", type=int, default=0)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "demo.png")
    args = parser.parse_args()
    weights = str(Path(args.weights).resolve())
    words = ["demo", f"--weights={weights}", "--port=0", f"--examples={args.examples}"]
    with (
        tempfile.TemporaryDirectory(prefix="deit-demo-") as folder,
        served(Path(folder), *words) as server,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=SIZE)
        page.goto(server.address)
        page.click(f"#examples button >> nth={args.example}")
        page.mouse.move(0, 0)
        page.wait_for_timeout(2000)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        browser.close()
    picture.convert("RGB").quantize(COLOURS).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
