"""Pour a big diffusion model into a small one, and prove what was kept."""

__version__ = "0.1.0"
