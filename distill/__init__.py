"""Distil a diffusion model into a small, label-efficient vision backbone."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Version of this package; `unknown` where it runs from a checkout that was never installed."""
    try:
        return version("diffusion-distill")
    except PackageNotFoundError:
        return "unknown"
