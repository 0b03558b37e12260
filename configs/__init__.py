"""The config files that come with deit_jax: `from deit_jax.configs import base`."""
