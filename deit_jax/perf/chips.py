"""Data sheets of accelerator chips: peak rate, memory, clock, and JAX's names for them."""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip; what only TPUs are asked for is 0 for others."""

    peak_tflops: float  # dense bfloat16, from the makers' data sheets
    hbm_bytes: int = 0  # what the compiler lets one program use, a little less than there is
    # The peak divided by 131072 (v5e), 262144 (v4, v5p), 524288 (v6e) or 1048576 (tpu7x) operations
    # a cycle: the compiler's estimates of large matrix products come to 81-97% of that and no more.
    clock_ghz: float = 0.0
    devices: int = 1  # that JAX makes of one chip
    config: str = "default"  # libtpu's name of a chip as one device


CHIPS = {
    "v4": Chip(275.0, int(30.75 * GIB), 1.05, config="megacore"),
    "v5e": Chip(197.0, int(15.75 * GIB), 1.5),
    "v5p": Chip(459.0, int(95.73 * GIB), 1.75, config="megacore"),
    "v6e": Chip(918.0, int(31.24 * GIB), 1.75),
    "tpu7x": Chip(2307.0, int(2 * 94.74 * GIB), 2.2, devices=2),
    "a100": Chip(312.0),
    "h100": Chip(989.0),
    "h100nvl": Chip(835.0),
    "h100pcie": Chip(756.0),
    "h200": Chip(989.0),
    "gh200": Chip(989.0),
    "b200": Chip(2250.0),
    "l4": Chip(121.0),
    "l40s": Chip(362.0),
    "a10": Chip(125.0),
    "rtx3090": Chip(71.0),  # of GeForce cards, with sums in float32
    "rtx4090": Chip(165.0),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.hbm_bytes)
# What JAX calls them, the first that fits.
KINDS = {
    r"TPU v4": "v4",
    r"TPU v5 ?(lite|e)": "v5e",
    r"TPU v5(p|$)": "v5p",
    r"TPU v6 ?(lite|e)": "v6e",
    r"TPU ?7x": "tpu7x",
    r"A100": "a100",
    r"H100 NVL": "h100nvl",
    r"H100 PCIe": "h100pcie",
    r"H100": "h100",
    r"GH200": "gh200",
    r"H200": "h200",
    r"\bB200": "b200",
    r"L40S": "l40s",
    r"L4$": "l4",
    r"A10$": "a10",
    r"RTX 3090$": "rtx3090",
    r"RTX 4090$": "rtx4090",
}


def device_of(kind: str) -> str | None:
    """Return which chip JAX's `device_kind` is, None for one that is not known."""
    return next((name for pattern, name in KINDS.items() if re.search(pattern, kind)), None)
