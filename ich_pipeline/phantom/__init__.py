"""Synthetic head CT with hemorrhages, made from anatomy and physics and known to the voxel."""

from ich_pipeline.detection import Box
from ich_pipeline.phantom.cases import make_case
from ich_pipeline.phantom.dataset import write_dataset
from ich_pipeline.phantom.settings import PhantomCase, PhantomSettings

__all__ = ["Box", "PhantomCase", "PhantomSettings", "make_case", "write_dataset"]
