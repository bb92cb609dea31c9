"""Hemorrhage subtypes and their values in a label file, once.

The order is that of BHSD (Wu et al., 2023), so that its label files need no remapping.
"""

from enum import IntEnum


class Subtype(IntEnum):
    """Value of a hemorrhage subtype in a multi-class label; 0 is everything else."""

    EDH = 1
    IPH = 2
    IVH = 3
    SAH = 4
    SDH = 5


LONG_NAMES = {
    Subtype.EDH: "epidural hemorrhage",
    Subtype.IPH: "intraparenchymal hemorrhage",
    Subtype.IVH: "intraventricular hemorrhage",
    Subtype.SAH: "subarachnoid hemorrhage",
    Subtype.SDH: "subdural hemorrhage",
}
