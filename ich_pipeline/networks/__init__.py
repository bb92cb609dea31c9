"""Architectures that MONAI lacks, one a file."""
