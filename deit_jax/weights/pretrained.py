"""Where published weights of a name lie on the Hugging Face hub: `pretrained`, instead of a path.

The files are timm's copies of the authors' own; those trained on ImageNet-1k alone where there are
several, and of ViTs timm's first choice. Others go by their id:
hf-hub:timm/deit3_base_patch16_224.fb_in22k_ft_in1k.
"""

import difflib

from deit_jax.errors import UserError

PRETRAINED = "pretrained"  # said instead of a path

_OF_DEIT = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit_base_distilled_patch16_384",
    "deit3_small_patch16_224",
    "deit3_small_patch16_384",
    "deit3_medium_patch16_224",
    "deit3_base_patch16_224",
    "deit3_base_patch16_384",
    "deit3_large_patch16_224",
    "deit3_large_patch16_384",
    "deit3_huge_patch14_224",
)
_OF_VIT = (
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_384",
    "vit_small_patch16_224",
    "vit_small_patch16_384",
    "vit_small_patch32_224",
    "vit_small_patch32_384",
    "vit_base_patch16_384",
    "vit_base_patch32_224",
    "vit_base_patch32_384",
    "vit_large_patch16_224",
    "vit_large_patch16_384",
)
# By the name of the model; of regnety_160 the one that taught the published DeiTs.
PUBLISHED = {
    **{name: f"timm/{name}.fb_in1k" for name in _OF_DEIT},
    **{name: f"timm/{name}.augreg_in21k_ft_in1k" for name in _OF_VIT},
    "vit_base_patch8_224": "timm/vit_base_patch8_224.augreg2_in21k_ft_in1k",
    "vit_base_patch16_224": "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_large_patch32_384": "timm/vit_large_patch32_384.orig_in21k_ft_in1k",
    "regnety_002": "timm/regnety_002.pycls_in1k",
    "regnety_004": "timm/regnety_004.tv2_in1k",
    "regnety_040": "timm/regnety_040.ra3_in1k",
    "regnety_080": "timm/regnety_080.ra3_in1k",
    "regnety_120": "timm/regnety_120.pycls_in1k",
    "regnety_160": "timm/regnety_160.deit_in1k",
    "efficientnet_lite0": "timm/tf_efficientnet_lite0.in1k",
    "efficientnet_lite1": "timm/tf_efficientnet_lite1.in1k",
    "efficientnet_lite2": "timm/tf_efficientnet_lite2.in1k",
}


def hub_id(name: str | None) -> str:
    """Return the hub's ORG/NAME of a model's published weights; raise UserError without any."""
    if name is None:
        raise UserError(f"{PRETRAINED}: whose? give the model's name, as in --model=NAME")
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=3, cutoff=0.4)
        raise UserError(
            f"{PRETRAINED}: no published weights of {name} are known here; name a file, a folder "
            f"or hf-hub:ORG/NAME, or take {', '.join(near) or 'another model'}"
        )
    return PUBLISHED[name]
